"""A bank to damage, and a check that nothing stays open."""

from __future__ import annotations

import contextlib
import gc
import os
import shutil

import pytest

from support.golden_bank import GOLDEN
from support.hostile import Victim


@pytest.fixture
def victim(tmp_path):
    shutil.copytree(GOLDEN, tmp_path / "m.bank")
    return Victim(tmp_path / "m.bank")


@pytest.fixture
def no_descriptor_left():
    """Fails when the test leaves a file open."""
    gc.collect()  # what earlier tests dropped must not close during this one
    before = open_files()
    yield
    assert open_files() == before


def open_files() -> list[str]:
    """Files that are open; threads of others may open sockets and event counters meanwhile."""
    found = []
    for descriptor in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the one that listed the directory
            found.append(os.readlink(f"/proc/self/fd/{descriptor}"))
    return sorted(name for name in found if name.startswith("/"))
