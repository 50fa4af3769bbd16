"""Every way to break a table of a bank: what reads it neither runs, allocates nor believes it."""

from __future__ import annotations

import os
import pickle
import struct

import numpy as np
import pytest

from bapq_edge.bank.layout import LEVELS
from bapq_edge.bank.npy import to_npy
from bapq_edge.bank.reader import Bank
from bapq_edge.bank.verify import verify
from bapq_edge.errors import BankFormatError, BankIntegrityError
from support.golden_bank import GOLDEN

pytestmark = pytest.mark.usefixtures("no_descriptor_left")


def size_of(table):
    return (GOLDEN / f"tables/{table}.npy").stat().st_size


TABLE_BYTES = size_of("p4_chunks")
SENSITIVITY_BYTES = size_of("sensitivity")
CHUNKS = (TABLE_BYTES - 128) // 16


@pytest.mark.parametrize("kind", ["chunks", "digests"])
def test_flipped_bit_in_a_table(victim, kind):
    victim.flip(f"tables/p4_{kind}.npy", 140)
    victim.refused(Bank.open, BankIntegrityError, f"p4_{kind}.npy has BLAKE2b")


def test_wrong_crc_in_the_table(victim):
    table = np.load(victim.file("tables/p4_chunks.npy"))
    table["crc32"][2] ^= 1
    victim.replace_table("p4", "chunks", to_npy(table))
    bank = Bank.open(victim.path)
    victim.refused(
        lambda path: bank.read_chunk("p4", 2), BankIntegrityError, "chunk 2 (layer words)"
    )


def test_wrong_digest_in_the_table(victim):
    digests = np.load(victim.file("tables/p4_digests.npy"))
    digests[1, 0] ^= 1
    victim.replace_table("p4", "digests", to_npy(digests))
    assert "chunk 1 (layer dense.1) has BLAKE2b" in str(verify(victim.path))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("offset", 1 << 40),
        ("offset", 0),
        ("offset", 705),
        ("offset", 704),
        ("bytes", 0),
        ("bytes", 0xFFFFFFFF),
    ],
    ids=["past the end", "overlapping", "misaligned", "after a gap", "empty chunk", "giant chunk"],
)
def test_chunk_that_lies_elsewhere(victim, field, value):
    table = np.load(victim.file("tables/p4_chunks.npy"))
    table[field][1] = value
    victim.replace_table("p4", "chunks", to_npy(table))
    victim.refused(Bank.open, BankFormatError, "p4_chunks.npy", "chunk 1 (layer dense.1)")


def test_chunks_in_another_order(victim):
    table = np.load(victim.file("tables/p4_chunks.npy"))
    victim.replace_table("p4", "chunks", to_npy(table[[1, 0, *range(2, CHUNKS)]]))
    victim.refused(Bank.open, BankFormatError, "chunk 0 (layer dense.1)", "must have")


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


@pytest.fixture
def in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def npy(header, values=b""):
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + values


def padded_to_size(data):
    return data.ljust(TABLE_BYTES, b"\0")[:TABLE_BYTES]


HEADER = b"{'descr': [('offset', '<u8'), ('bytes', '<u4'), ('crc32', '<u4')], "
HOSTILE_TABLES = {
    "pickle": pickle.dumps([Bomb()]),
    "pickled objects": npy(
        b"{'descr': '|O', 'fortran_order': False, 'shape': (%d,), }\n" % CHUNKS,
        pickle.dumps([Bomb()]),
    ),
    "giant shape": npy(HEADER + b"'fortran_order': False, 'shape': (1152921504606846976,), }\n"),
    "negative shape": npy(HEADER + b"'fortran_order': False, 'shape': (-1,), }\n"),
    "code in the header": npy(b"__import__('os').mkdir('exploded')\n"),
    "deep header": npy(b"(" * 120),
    "header longer than the file": b"\x93NUMPY\x01\x00\xff\xff{",
    "version 2 with a huge header": b"\x93NUMPY\x02\x00\xff\xff\xff\xff{",
    "other fields": to_npy(
        np.zeros(CHUNKS, [("offset", "<u8"), ("size", "<u4"), ("crc32", "<u4")])
    ),
    "other byte order": to_npy(
        np.zeros(CHUNKS, [("offset", ">u8"), ("bytes", "<u4"), ("crc32", "<u4")])
    ),
    "not .npy": b"PK\x03\x04",
    "zeros": b"",
}


@pytest.mark.usefixtures("in_tmp")
@pytest.mark.parametrize("name", HOSTILE_TABLES)
def test_hostile_table(victim, name):
    victim.replace_table("p4", "chunks", padded_to_size(HOSTILE_TABLES[name]))
    victim.refused(Bank.open, BankFormatError, "p4_chunks.npy", "the bank again")
    assert not os.path.exists("exploded")


@pytest.mark.usefixtures("in_tmp")
@pytest.mark.parametrize("name", HOSTILE_TABLES)
def test_hostile_sensitivity(victim, name):
    victim.replace_sensitivity(
        HOSTILE_TABLES[name].ljust(SENSITIVITY_BYTES, b"\0")[:SENSITIVITY_BYTES]
    )
    victim.refused(Bank.open, BankFormatError, "sensitivity.npy", "the bank again")
    assert not os.path.exists("exploded")


@pytest.mark.parametrize(
    ("level", "value", "rule"),
    [
        (8, np.nan, "finite, 0 or more"),
        (8, -np.float32(np.nan), "finite, 0 or more"),
        (4, np.inf, "finite, 0 or more"),
        (2, -0.25, "finite, 0 or more"),
        (1, -0.0, "finite, 0 or more"),
        (32, 1e-45, "0"),
    ],
)
def test_sensitivity_that_no_layer_can_have(victim, level, value, rule):
    """A planner that computed with it would choose levels at an attacker's will, or none."""
    table = np.load(victim.file("tables/sensitivity.npy"))
    table[1, LEVELS.index(level)] = value
    victim.replace_sensitivity(to_npy(table))
    victim.refused(
        Bank.open,
        BankFormatError,
        f"chunk 1 has the sensitivity {float(np.float32(value))!r} at"
        f" level {level}, must be {rule}",
    )


ROW_TABLES = ("row_order", "dropped_bias")


@pytest.mark.usefixtures("in_tmp")
@pytest.mark.parametrize("key", ROW_TABLES)
@pytest.mark.parametrize("name", HOSTILE_TABLES)
def test_hostile_table_of_rows(victim, key, name):
    size = size_of(key)
    victim.replace_rows(key, HOSTILE_TABLES[name].ljust(size, b"\0")[:size])
    victim.refused(Bank.open, BankFormatError, f"{key}.npy", "the bank again")
    assert not os.path.exists("exploded")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda order: order.__setitem__(0, 24), "holds row 24, the last is 23"),
        (lambda order: order.__setitem__(0, 0xFFFFFFFF), "holds row 4294967295, the last is 23"),
        (lambda order: order.__setitem__(0, order[1]), "another stands twice"),
        (lambda order: order.__setitem__(slice(21, 24), order[23:20:-1]), "not in ascending order"),
        (lambda order: order[:24].sort(), "the rows are in order, though"),
    ],
    ids=["outside", "far outside", "twice", "dropped rows in disorder", "no order at all"],
)
def test_row_order_that_no_layer_can_have(victim, change, message):
    """An operator writes to where it points."""
    order = np.load(victim.file("tables/row_order.npy"))
    change(order)
    victim.replace_rows("row_order", to_npy(order))
    victim.refused(Bank.open, BankFormatError, "row_order.npy: layer dense.1", message)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_bias_of_a_dropped_row_that_is_no_number(victim, value):
    victim.replace_rows("dropped_bias", to_npy(np.array([0, value, 0, 0, 0, 0], "<f4")))
    victim.refused(Bank.open, BankFormatError, "dropped_bias.npy", "dropped row 1 has a bias")


def test_giant_row_order_allocates_nothing(victim):
    """A sparse file of gigabytes would cost a small board its memory."""

    def grow(document):
        document["layers"][0]["rows"] = 1 << 29
        document["row_order"]["bytes"] = 128 + (4 << 29)

    os.truncate(victim.file("tables/row_order.npy"), 128 + (4 << 29))
    victim.edit_manifest(grow)
    with pytest.raises(BankFormatError, match="rows is 536870912, must be within 4194304 rows"):
        Bank.open(victim.path)


@pytest.mark.parametrize("key", ROW_TABLES)
def test_flipped_bit_in_a_table_of_rows(victim, key):
    victim.flip(f"tables/{key}.npy", 130)
    victim.refused(Bank.open, BankIntegrityError, f"{key}.npy has BLAKE2b")


def test_flipped_bit_in_the_sensitivity(victim):
    victim.flip("tables/sensitivity.npy", 140)
    victim.refused(Bank.open, BankIntegrityError, "sensitivity.npy has BLAKE2b")


def test_table_with_a_header_of_megabytes(victim):
    data = npy(b"{" + b" " * 65000 + b"}\n")
    victim.replace_table("p4", "chunks", data)
    words = f"planes.p4.chunks.bytes is 65013, must be {TABLE_BYTES}"
    victim.refused(Bank.open, BankFormatError, words)
