"""Every way to break a bank on disk, each refused by name; no file here may crash a reader."""

from __future__ import annotations

import hashlib
import os
import random
import zlib

import numpy as np
import pytest

from bapq_edge.bank.exchange import unpack
from bapq_edge.bank.layout import PLANES
from bapq_edge.bank.npy import to_npy
from bapq_edge.bank.reader import Bank
from bapq_edge.bank.verify import verify
from bapq_edge.errors import (
    BankError,
    BankFormatError,
    BankIntegrityError,
    BankNotFoundError,
    BankPathError,
    BankTruncatedError,
    BankVersionError,
    MissingPlaneWarning,
)
from support.golden_bank import GOLDEN

pytestmark = pytest.mark.usefixtures("no_descriptor_left")

FILES = sorted(str(p.relative_to(GOLDEN)) for p in GOLDEN.rglob("*") if p.is_file())
SIZES = {name: (GOLDEN / name).stat().st_size for name in FILES}
SEEDED = random.Random(1)
PLACES = [(name, SEEDED.randrange(SIZES[name])) for name in SEEDED.choices(FILES, k=100)]


def read_everything(path):
    """What a run needs: open, then graph and all chunks."""
    bank = Bank.open(path)
    bank.graph_bytes()
    for layer in bank.manifest.layers:
        bank.layer_codes(layer)


@pytest.mark.parametrize(("name", "length"), PLACES, ids=lambda value: str(value))
def test_truncated_anywhere(victim, name, length):
    os.truncate(victim.file(name), length)
    if name == "manifest.json":
        victim.refused(Bank.open, BankFormatError, name)
    else:
        words = (name, f"{length} bytes, expected {SIZES[name]}")
        victim.refused(Bank.open, BankTruncatedError, *words)


@pytest.mark.parametrize("name", FILES)
def test_file_that_is_longer(victim, name):
    with victim.file(name).open("ab") as file:
        file.write(b"\0")
    victim.refused(Bank.open, BankFormatError, name)


@pytest.mark.parametrize("name", [name for name in FILES if not name.startswith("planes/")])
def test_file_that_is_absent(victim, name):
    victim.file(name).unlink()
    error = BankNotFoundError if name == "manifest.json" else BankFormatError
    victim.refused(Bank.open, error, name)


@pytest.mark.parametrize("name", FILES)
def test_flipped_bit_anywhere(victim, name):
    """In a sample of positions: either reading everything or `verify` must notice."""
    whole = victim.file(name).read_bytes()
    for position in random.Random(name).sample(range(SIZES[name]), k=min(SIZES[name], 40)):
        victim.flip(name, position)
        try:
            noticed = not verify(victim.path).ok
        except BankError as error:
            noticed = "\n" not in str(error)
        assert noticed, position
        victim.file(name).write_bytes(whole)


@pytest.mark.parametrize("plane", PLANES)
def test_flipped_bit_in_a_chunk(victim, plane):
    offset = int(Bank.open(victim.path).chunks(plane)[1]["offset"])
    victim.flip(f"planes/{plane}.bin", offset + 3)
    bank = Bank.open(victim.path)
    bank.read_chunk(plane, 0)
    words = (f"planes/{plane}.bin", "chunk 1 (layer dense.1)", "CRC-32")
    victim.refused(lambda path: bank.read_chunk(plane, 1), BankIntegrityError, *words)
    victim.refused(lambda path: unpack(path, path.parent / "tree"), BankIntegrityError, *words)
    report = verify(victim.path)
    assert not report.ok
    bad = [file for file in report.files if file.problems]
    assert [(file.file, file.problems) for file in bad] == [(f"planes/{plane}.bin", 1)]
    assert all(word in str(report) for word in words)
    assert "\n" not in str(report)


def test_flipped_bits_are_counted_per_file(victim):
    chunks = Bank.open(victim.path).chunks("p4")
    victim.flip("graph/main.onnx", 5)
    for chunk in (0, 2):
        victim.flip("planes/p4.bin", int(chunks[chunk]["offset"]))
    problems = {file.file: file.problems for file in verify(victim.path).files}
    assert problems.pop("graph/main.onnx") == 1
    assert problems.pop("planes/p4.bin") == 2
    assert not any(problems.values())


def test_flipped_bit_in_the_graph(victim):
    victim.flip("graph/main.onnx", 0)
    bank = Bank.open(victim.path)
    victim.refused(lambda path: bank.graph_bytes(), BankIntegrityError, "main.onnx has BLAKE2b")


@pytest.mark.parametrize("key", ["bytes", "rows", "stored_rows", "columns", "chunk_rows"])
def test_giant_sizes_allocate_nothing(victim, key):
    def grow(document):
        if key == "bytes":
            document["graph"]["bytes"] = (1 << 53) - 1
        else:
            document["layers"][0][key] = 1 << 24

    victim.edit_manifest(grow)
    victim.refused(Bank.open, BankFormatError)


@pytest.mark.parametrize("position", ["column", "row", "scale", "bias", "record"])
def test_non_zero_padding(victim, position):
    """Padding that checksum and digest vouch for is still refused: banks are canonical."""
    # Chunk 1 of p4: 5 rows of 37 columns: 2 blocks of 256, 2 groups of 32, bias of 64.
    offsets = {"column": 256 + 64 * 1, "row": 5 * 4, "scale": 512 + 5 * 2, "bias": 576 + 5 * 4}
    chunks = Bank.open(victim.path).chunks("p4")
    chunk = 1
    if position == "record":  # chunk 2 of p4 has 256 + 32 bytes in use
        chunk, offsets["record"] = 2, 300
    victim.flip("planes/p4.bin", int(chunks[chunk]["offset"]) + offsets[position])
    data = victim.file("planes/p4.bin").read_bytes()
    row = chunks[chunk]
    chunk_bytes = data[row["offset"] :][: row["bytes"]]
    table = np.load(victim.file("tables/p4_chunks.npy"))
    table["crc32"][chunk] = zlib.crc32(chunk_bytes)
    victim.replace_table("p4", "chunks", to_npy(table))
    digests = np.load(victim.file("tables/p4_digests.npy"))
    digest = hashlib.blake2b(chunk_bytes, digest_size=16).digest()
    digests[chunk] = np.frombuffer(digest, np.uint8)
    victim.replace_table("p4", "digests", to_npy(digests))

    words = (f"chunk {chunk}", "padding of plane p4 is not zero")
    assert all(word in str(verify(victim.path)) for word in words)
    victim.refused(
        lambda path: unpack(path, path.parent / "tree"), BankFormatError, "planes/p4.bin", *words
    )


@pytest.mark.parametrize("file", ["/etc/hostname", "../secret", "planes/../../secret"])
def test_path_outside_the_bank(victim, file):
    victim.path.with_name("secret").write_bytes(b"secret")
    victim.edit_manifest(lambda document: document["graph"].update(file=file))
    victim.refused(Bank.open, BankPathError, "graph.file is", file)


@pytest.mark.parametrize("name", FILES)
def test_symbolic_link_outside_the_bank(victim, name):
    victim.file(name).rename(victim.path.with_name("outside"))
    victim.file(name).symlink_to("../../outside" if "/" in name else "../outside")
    victim.refused(Bank.open, BankPathError, name, "outside the bank")


def test_symbolic_link_of_a_folder_outside_the_bank(victim):
    victim.file("planes").rename(victim.path.with_name("outside"))
    victim.file("planes").symlink_to("../outside")
    victim.refused(Bank.open, BankPathError, "outside the bank")


def test_symbolic_link_to_nowhere(victim):
    victim.file("planes/r8.bin").unlink()
    victim.file("planes/r8.bin").symlink_to("f33.bin")
    victim.refused(Bank.open, BankFormatError, "is absent")


def test_symbolic_link_that_stays_inside(victim):
    """A bank may share its bytes between names, and may itself be reached by a link."""
    victim.file("planes/r8.bin").rename(victim.file("planes/other.bin"))
    victim.file("planes/r8.bin").symlink_to("other.bin")
    link = victim.path.with_name("link.bank")
    link.symlink_to("m.bank")
    read_everything(link)


@pytest.mark.parametrize("name", FILES)
def test_pipe_in_place_of_a_file(victim, name):
    victim.file(name).unlink()
    os.mkfifo(victim.file(name))
    victim.refused(Bank.open, BankFormatError, name, "is not a regular file")


@pytest.mark.parametrize("name", FILES)
def test_directory_in_place_of_a_file(victim, name):
    victim.file(name).unlink()
    victim.file(name).mkdir()
    victim.refused(Bank.open, BankFormatError, name, "is not a regular file")


def test_unknown_key(victim):
    victim.edit_manifest(lambda document: document.update(surprise=1))
    victim.refused(Bank.open, BankFormatError, "manifest.json: unknown key surprise")


def test_duplicate_key(victim):
    data = victim.file("manifest.json").read_bytes()
    victim.file("manifest.json").write_bytes(data.replace(b"{", b'{"format": "bapq-bank",', 1))
    victim.refused(Bank.open, BankFormatError, 'key "format" stands twice')


def test_other_version(victim):
    victim.edit_manifest(lambda document: document.update(format_version=2))
    victim.refused(Bank.open, BankVersionError, "format_version is 2, this program reads 1")


def test_manifest_of_gigabytes(victim):
    os.truncate(victim.file("manifest.json"), 1 << 34)
    with pytest.raises(BankFormatError, match="allowed are 4194304"):
        Bank.open(victim.path)


def test_file_that_shrinks_after_opening(victim):
    bank = Bank.open(victim.path)
    os.truncate(victim.file("planes/p4.bin"), 1000)
    victim.refused(
        lambda path: bank.read_chunk("p4", 2),
        BankTruncatedError,
        "p4.bin ends at byte 1280, expected 1600",
    )


def test_directory_that_is_no_bank(tmp_path):
    (tmp_path / "thesis.txt").write_bytes(b"precious")
    with pytest.raises(BankNotFoundError, match="is not a bank"):
        Bank.open(tmp_path)


def test_random_damage_never_escapes_the_bank_errors(victim):
    """A small fuzzer: whatever bytes are overwritten, the answer is a bank or a BankError."""
    rng = random.Random(2)
    for _ in range(150):
        name = rng.choice(FILES)
        whole = victim.file(name).read_bytes()
        data = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            position = rng.randrange(len(data))
            data[position : position + rng.randint(1, 8)] = rng.randbytes(rng.randint(0, 8))
        victim.file(name).write_bytes(data)
        try:
            read_everything(victim.path)
        except BankError as error:
            assert "\n" not in str(error)
        victim.file(name).write_bytes(whole)


def test_absent_planes_only_warn(victim):
    victim.file("planes/f32.bin").unlink()
    with pytest.warns(MissingPlaneWarning, match="only these levels can run: 8, 4, 2, 1"):
        read_everything(victim.path)
