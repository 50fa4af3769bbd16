"""Disks that fill up or fail while a bank is built: the old bank stays whole, nothing is left."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import shutil

import pytest

from bapq_edge.bank import writer
from bapq_edge.bank.exchange import pack, unpack
from bapq_edge.bank.reader import Bank
from bapq_edge.bank.verify import verify
from bapq_edge.errors import StorageError
from support.golden_bank import GOLDEN
from support.hostile import snapshot

pytestmark = pytest.mark.usefixtures("no_descriptor_left")


@pytest.fixture
def tree(tmp_path_factory):
    """An exchange form: packing it is the build that fails."""
    directory = tmp_path_factory.mktemp("exchange")
    unpack(GOLDEN, directory)
    return directory


@contextlib.contextmanager
def no_file_beyond(size):
    """A real error from the operating system. Inside, even the log of the tests may not grow."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def refused(build, directory, *words, limit=resource.RLIM_INFINITY):
    before = snapshot(directory)
    with pytest.raises(StorageError) as caught, no_file_beyond(limit):
        build()
    message = str(caught.value)
    assert "\n" not in message
    assert [word for word in words if word not in message] == [], message
    assert snapshot(directory) == before


@pytest.mark.parametrize("old", ["no bank before", "old bank"])
@pytest.mark.parametrize("limit", [40, 150, 1000, 4100, 4300, 14000])
def test_disk_that_takes_no_more(tree, tmp_path, limit, old):
    target = tmp_path / "m.bank"
    if old == "old bank":
        shutil.copytree(GOLDEN, target)
    words = (str(target), "or choose another place")
    refused(lambda: pack(tree, target), tmp_path, *words, limit=limit)
    if old == "old bank":
        assert verify(target).ok


# 1 to 5: planes; to 18: tables, graph, manifest; to 21: folders; 22: the bank's directory.
@pytest.mark.parametrize("failing", [1, 5, 6, 16, 18, 19, 22])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_disk_that_fails_at_any_sync(tree, tmp_path, monkeypatch, failing, code):
    """Delayed allocation makes a full disk show as late as in fsync."""
    target = tmp_path / "m.bank"
    shutil.copytree(GOLDEN, target)
    calls = iter(range(1, 1000))

    def fsync(descriptor):
        if next(calls) == failing:
            raise OSError(code, os.strerror(code))

    monkeypatch.setattr(writer.os, "fsync", fsync)
    step = "free some space" if code == errno.ENOSPC else "check the disk"
    refused(lambda: pack(tree, target), tmp_path, str(target), os.strerror(code), step)
    assert verify(target).ok


def test_disk_that_is_full_while_unpacking(tmp_path):
    words = ("tree/data/bank/golden", "raise")
    refused(lambda: unpack(GOLDEN, tmp_path / "tree"), tmp_path, *words, limit=500)


def test_disk_that_fails_while_reading(tmp_path, monkeypatch):
    bank = Bank.open(GOLDEN)

    def pread(*arguments):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "pread", pread)
    refused(lambda: bank.read_chunk("p4", 0), tmp_path, "p4.bin cannot be read: Input/output error")
