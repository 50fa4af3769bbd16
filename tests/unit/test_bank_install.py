"""Installing a bank: all of it or nothing, every byte checked, nothing copied that is there."""

from __future__ import annotations

import errno
import os
import shutil
from types import SimpleNamespace

import pytest

from bapq_edge.bank import staging, writer
from bapq_edge.bank.install import install
from bapq_edge.bank.layout import PLANES
from bapq_edge.bank.manifest import seal
from bapq_edge.bank.reader import Bank
from bapq_edge.bank.verify import verify
from bapq_edge.errors import (
    BankError,
    BankFormatError,
    BankIntegrityError,
    BankNotFoundError,
    BankPathError,
    InterruptedUpdateWarning,
    MissingPlaneWarning,
    RequestError,
    StorageError,
    UnknownLevelError,
)
from support.bank_samples import PRUNED, Shape, files_of, sound_files_of, write_bank

OLD = (Shape(40, 20), Shape(50, 33))
NEW = (Shape(18, 70), *OLD)
"""The layers of `OLD` at other places, after one more."""


@pytest.fixture
def new(tmp_path):
    write_bank(tmp_path / "stick/new.bank", NEW)
    return tmp_path / "stick/new.bank"


@pytest.fixture
def board(tmp_path):
    (tmp_path / "board").mkdir()
    return tmp_path / "board"


@pytest.fixture
def bank(board):
    """The old bank, on the board."""
    write_bank(board / "m.bank", OLD)
    return board / "m.bank"


@pytest.fixture(autouse=True)
def _stick(tmp_path):
    (tmp_path / "stick").mkdir()


def flip(file, position):
    data = bytearray(file.read_bytes())
    data[position] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("shapes", [NEW, PRUNED], ids=["plain", "pruned"])
def test_a_bank_is_installed_where_nothing_was(board, tmp_path, shapes):
    write_bank(tmp_path / "stick/new.bank", shapes)
    report = install(tmp_path / "stick/new.bank", board / "m.bank")
    files = sound_files_of(board / "m.bank")
    assert files == files_of(tmp_path / "stick/new.bank")
    assert report.bytes_copied == sum(map(len, files.values())) and report.bytes_reused == 0
    assert str(report).startswith(f"{board / 'm.bank'}: sample, levels 32, 8, 4, 2, 1: ")
    assert str(report).endswith(" KiB copied, 0 B reused")


@pytest.mark.parametrize("links", [True, False])
def test_an_update_takes_what_did_not_change_from_the_old_bank(new, bank, links, monkeypatch):
    if not links:
        monkeypatch.setattr(os, "link", refused_link)
    report = install(new, bank)
    files = sound_files_of(bank)
    assert files == files_of(new)
    assert report.bytes_copied + report.bytes_reused == sum(map(len, files.values()))
    first = Bank.open(new)
    planes = sum(
        int(first.chunks(plane)["bytes"][first.layer("layer0").chunk_range].sum())
        for plane in first.planes
    )
    small = sum(len(data) for name, data in files.items() if not name.startswith("planes/"))
    # The graph is the same in both; the tables are not.
    assert report.bytes_copied == planes + small - len(files["graph/main.onnx"])


def refused_link(*_):
    raise PermissionError(errno.EPERM, "Operation not permitted")


@pytest.mark.parametrize("links", [True, False])
def test_what_is_there_is_not_copied_again(new, bank, links, monkeypatch):
    install(new, bank)
    before = (bank / "planes/p4.bin").stat().st_ino
    if not links:
        monkeypatch.setattr(os, "link", refused_link)
    report = install(new, bank)
    files = sound_files_of(bank)
    assert files == files_of(new)
    assert report.bytes_copied == len(files["manifest.json"])
    assert report.bytes_reused == sum(map(len, files.values())) - len(files["manifest.json"])
    assert ((bank / "planes/p4.bin").stat().st_ino == before) == links
    assert (bank / "planes/p4.bin").stat().st_nlink == 1


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("chunk", range(4))
def test_damage_in_the_old_bank_is_not_taken_over(board, tmp_path, links, chunk, monkeypatch):
    """Also where another chunk of the plane has the same bytes."""
    twice = (Shape(32, 40), Shape(32, 40))
    write_bank(tmp_path / "stick/new.bank", twice)
    install(tmp_path / "stick/new.bank", board / "m.bank")
    row = Bank.open(board / "m.bank").chunks("p4")[chunk]
    flip(board / "m.bank/planes/p4.bin", int(row["offset"]) + 5)
    if not links:
        monkeypatch.setattr(os, "link", refused_link)
    install(tmp_path / "stick/new.bank", board / "m.bank")
    assert sound_files_of(board / "m.bank") == files_of(tmp_path / "stick/new.bank")


@pytest.mark.parametrize("file", ["manifest.json", "tables/p4_digests.npy", "graph/main.onnx"])
def test_a_damaged_bank_is_repaired(new, board, file):
    install(new, board / "m.bank")
    (board / "m.bank" / file).write_bytes((board / "m.bank" / file).read_bytes()[:-1] + b"?")
    if file == "manifest.json":
        (board / "m.bank" / file).write_bytes(b'{"format": "bapq-bank"')
    install(new, board / "m.bank")
    assert sound_files_of(board / "m.bank") == files_of(new)


# ---- what is refused leaves everything as it was ----


def refuse(error, new, bank, match=None, **options):
    before = files_of(bank.parent)
    with pytest.raises(error, match=match) as caught:
        install(new, bank, **options)
    assert "\n" not in str(caught.value)
    assert files_of(bank.parent) == before
    assert sorted(os.listdir(bank.parent)) == ([bank.name] if before else [])


def test_damage_in_the_new_bank_is_refused_file_by_file(bank, tmp_path):
    source = tmp_path / "stick/new.bank"
    write_bank(source, PRUNED, seed=3, graph=b"\x12\x07another")
    names = sorted(files_of(source))
    assert len(names) == 20
    for name in names:
        data = (source / name).read_bytes()
        damages = [data[:-1], data + b"\0", b""]
        damages += [data[:-1] + bytes([data[-1] ^ 1]), bytes([data[0] ^ 1]) + data[1:]]
        for damaged in damages:
            (source / name).write_bytes(damaged)
            refuse(BankError, source, bank, "new.bank")
        (source / name).unlink()
        (source / name).mkdir()
        refuse(BankError, source, bank, "new.bank")
        (source / name).rmdir()
        if not name.startswith("planes/"):
            refuse(BankError, source, bank, "new.bank")
        (source / name).write_bytes(data)
    install(source, bank)
    assert sound_files_of(bank) == files_of(source)


def test_padding_that_is_not_zero_is_refused(new, bank, monkeypatch):
    """Checksum and digest fit the bytes."""
    real = writer.pack_chunk
    monkeypatch.setattr(writer, "pack_chunk", lambda *chunk: real(*chunk)[:-1] + b"\1")
    write_bank(new, [Shape(3, 5)])
    refuse(BankFormatError, new, bank, "padding")


def test_links_that_lead_out_are_refused_and_others_become_files(new, bank, tmp_path):
    outside = tmp_path / "outside.bin"
    file = new / "planes/p4.bin"
    shutil.copy(file, outside)
    file.rename(new / "planes/other.bin")
    file.symlink_to(outside)
    refuse(BankPathError, new, bank, "outside the bank")
    file.unlink()
    file.symlink_to("other.bin")
    install(new, bank)
    assert not (bank / "planes/p4.bin").is_symlink()
    assert not (bank / "planes/other.bin").exists()
    assert (bank / "planes/p4.bin").read_bytes() == outside.read_bytes()


def test_a_name_that_leads_out_is_refused(new, bank):
    manifest = new / "manifest.json"
    manifest.write_bytes(seal(manifest.read_bytes().replace(b"planes/p4.bin", b"../../p4.bin")))
    refuse(BankPathError, new, bank)


def test_only_what_the_manifest_names_is_copied(new, bank):
    (new / "planes/old.bin").write_bytes(b"x")
    (new / "notes.txt").write_bytes(b"x")
    install(new, bank)
    assert set(files_of(new)) - set(sound_files_of(bank)) == {"planes/old.bin", "notes.txt"}


def test_a_new_bank_that_changes_during_the_copy_is_refused(new, bank):
    def progress(done, total):
        (new / "planes/p4.bin").write_bytes(bytes((new / "planes/p4.bin").stat().st_size))

    refuse(BankIntegrityError, new, bank, "p4.bin: chunk 0", progress=progress)


def test_something_else_is_not_replaced(new, board):
    (board / "m.bank").mkdir()
    (board / "m.bank/thesis.txt").write_bytes(b"precious")
    refuse(BankFormatError, new, board / "m.bank", "is there and is not a bank")


def test_no_bank_to_install(bank, tmp_path):
    refuse(BankNotFoundError, tmp_path / "stick/none.bank", bank, "there is no bank")


def test_too_little_space_is_said_before_anything_is_copied(new, bank, monkeypatch):
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_bavail=3, f_frsize=4096))
    copied = []
    match = r"12.0 KiB are free, the bank needs .* KiB more: free some space or install fewer"
    refuse(StorageError, new, bank, match, progress=lambda *done: copied.append(done))
    assert not copied


def test_files_that_are_linked_need_no_space(new, bank, monkeypatch):
    install(new, bank)
    size = (new / "manifest.json").stat().st_size + 8192
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_bavail=size, f_frsize=1))
    install(new, bank)
    assert sound_files_of(bank) == files_of(new)


def test_a_disk_that_fills_up_meanwhile(new, bank, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    refuse(StorageError, new, bank, "No space left on device: free some space")


# ---- planes ----


@pytest.mark.parametrize(
    ("levels", "planes"),
    [
        ((4, 2, 1), ("p4", "m1", "s1")),
        ((8,), ("r8", "p4")),
        ((2,), ("m1", "s1")),
        ((32, 1), ("f32", "s1")),
    ],
    ids=str,
)
def test_only_the_planes_of_some_levels(new, bank, levels, planes):
    install(new, bank, levels=levels)
    with pytest.warns(MissingPlaneWarning):
        opened = Bank.open(bank)
    assert opened.planes == planes and set(levels) <= set(opened.levels)
    with pytest.warns(MissingPlaneWarning):
        files = sound_files_of(bank)
    absent = {f"planes/{plane}.bin" for plane in set(PLANES) - set(planes)}
    assert files == {name: data for name, data in files_of(new).items() if name not in absent}
    install(new, bank)
    assert sound_files_of(bank) == files_of(new)


def test_planes_can_be_taken_from_a_bank_in_its_place(bank):
    before = files_of(bank)
    report = install(bank, bank, levels=[4])
    assert report.levels == (4,) and report.bytes_copied == len(before["manifest.json"])
    assert {name for name in files_of(bank) if "planes" in name} == {"planes/p4.bin"}


def test_a_layer_that_lacks_the_level_keeps_a_plane_to_run_at(bank, tmp_path):
    write_bank(tmp_path / "stick/new.bank", (Shape(20, 40), Shape(9, 40, own_levels=(8,))))
    report = install(tmp_path / "stick/new.bank", bank, levels=[2])
    assert {name for name in files_of(bank) if "planes" in name} == {
        f"planes/{plane}.bin" for plane in ("p4", "r8", "m1", "s1")
    }
    assert report.levels == (8, 4, 2, 1)


def test_levels_that_cannot_be(new, bank):
    (new / "planes/r8.bin").unlink()
    with pytest.warns(MissingPlaneWarning):
        refuse(
            UnknownLevelError, new, bank, "level 8 is not in .*, which holds 32, 4", levels=[8, 4]
        )
    with pytest.warns(MissingPlaneWarning):
        refuse(UnknownLevelError, new, bank, "no levels are asked for", levels=[])


def test_planes_that_the_new_bank_lacks_are_left_out(new, bank):
    (new / "planes/r8.bin").unlink()
    with pytest.warns(MissingPlaneWarning, match="new.bank: without planes/r8.bin"):
        report = install(new, bank)
    assert report.levels == (32, 4, 2, 1)
    with pytest.warns(MissingPlaneWarning):
        assert sound_files_of(bank) == files_of(new)


# ---- cut off at any moment ----


def set_of_synced(monkeypatch):
    """{inode: size} of what was synced so far."""
    synced, real = {}, os.fsync

    def fsync(descriptor):
        status = os.fstat(descriptor)
        synced[status.st_ino] = status.st_size
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    return synced


@pytest.mark.parametrize("fresh", [True, False])
def test_everything_is_synced_before_it_is_put_in_place(new, board, fresh, monkeypatch):
    if not fresh:
        write_bank(board / "m.bank", NEW, graph=b"\x12\x03old")
    synced = set_of_synced(monkeypatch)
    real_exchange, real_rename, moved = staging._exchange, os.rename, []

    def check(first):
        assert {path for path in first.rglob("*")}
        for path in (first, *first.rglob("*")):
            status = path.stat()
            assert status.st_ino in synced, path
            assert path.is_dir() or synced[status.st_ino] == status.st_size, path
        synced.clear()
        moved.append(first)

    monkeypatch.setattr(staging, "_exchange", lambda a, b: (check(a), real_exchange(a, b))[1])
    monkeypatch.setattr(os, "rename", lambda a, b: (check(a), real_rename(a, b))[1])
    install(new, board / "m.bank")
    assert len(moved) == 1
    assert board.stat().st_ino in synced


def test_the_old_bank_that_waits_aside_is_opened_loudly_and_put_back(new, bank):
    before = files_of(bank)
    aside = bank.with_name("m.bank.bapq-replaced")
    bank.rename(aside)
    with pytest.warns(InterruptedUpdateWarning, match=f"{bank}: an update .* {aside} is used"):
        assert verify(bank).ok
    with pytest.raises(RequestError, match=r"is what an update of .*m\.bank that was cut off"):
        install(aside, bank)
    assert files_of(aside) == before
    (new / "planes/p4.bin").write_bytes(b"")
    with pytest.raises(BankError):
        install(new, bank)
    assert os.listdir(bank.parent) == [aside.name]
    write_bank(new, NEW)
    install(new, bank)
    assert sound_files_of(bank) == files_of(new)


def test_two_installs_of_one_bank_do_not_meet(new, bank, monkeypatch):
    """Neither while one copies nor while it removes the old bank."""

    def second(*_, **__):
        with pytest.raises(StorageError, match="another program is building there: wait"):
            install(new, bank)
        seen.append(1)

    seen = []
    install(new, bank, progress=second)
    copying = len(seen)
    assert copying
    real = shutil.rmtree
    monkeypatch.setattr(staging.shutil, "rmtree", lambda *a, **o: (second(), real(*a, **o)))
    install(new, bank)
    assert len(seen) > copying
    monkeypatch.undo()
    assert sound_files_of(bank) == files_of(new)
