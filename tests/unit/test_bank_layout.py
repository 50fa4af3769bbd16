"""The constants of the format, and that the kernels were built for the same ones."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from bapq_edge.bank.layout import (
    BLOCK_COLUMNS,
    LEVELS,
    PLANES,
    PLANES_OF_LEVEL,
    TILE_ROWS,
    TileGeometry,
    planes_for,
)
from bapq_edge.bank.writer import chunk_rows_for
from bapq_edge.engine import library
from bapq_edge.errors import PlatformError

KERNELS_H = Path(__file__).parents[2] / "native/src/kernels/kernels.h"


def test_kernels_share_the_constants():
    header = KERNELS_H.read_text()
    assert int(re.search(r"BAPQ_TILE_ROWS = (\d+)", header)[1]) == TILE_ROWS
    assert int(re.search(r"BAPQ_BLOCK = (\d+)", header)[1]) == BLOCK_COLUMNS
    order = re.search(r"enum \{ (BAPQ_L32.*?), BAPQ_LEVELS \}", header)[1]
    assert order == ", ".join(f"BAPQ_L{level}" for level in LEVELS)


def test_a_library_with_another_order_of_planes_is_refused(monkeypatch):
    load = library.load_library.__wrapped__
    load()
    for planes in (list(PLANES)[::-1], list(PLANES)[:-1]):
        monkeypatch.setattr(library, "PLANES", dict.fromkeys(planes))
        with pytest.raises(PlatformError, match=r"libbapq has planes .*'f32'"):
            load()


def test_the_plane_that_completes_a_level_is_the_last_that_it_reads():
    for plane, level in PLANES.items():
        assert PLANES_OF_LEVEL[level][-1] == plane


@pytest.mark.parametrize(
    ("levels", "planes"),
    [
        ((8, 4, 2, 1), ("r8", "p4", "m1", "s1")),
        ((8,), ("r8", "p4")),
        ((32, 1), ("f32", "s1")),
        ((2,), ("m1", "s1")),
    ],
)
def test_planes_of_a_set_of_levels(levels, planes):
    assert planes_for(levels) == planes


def test_record_sizes():
    # 2 blocks of 256, 2 groups of 16 bf16, 16 float32: 512 + 64 + 64
    assert TileGeometry("p4", 33, 32, True).record_bytes == 640
    # 2 blocks of 64, 1 group, no bias: 128 + 32, padded
    assert TileGeometry("s1", 64, 64, False).record_bytes == 192
    assert TileGeometry("f32", 1, 0, True).record_bytes == 2048 + 64


@pytest.mark.parametrize("columns", [1, 32, 100, 384, 1536, 4096, 8192, 20000, 150528])
@pytest.mark.parametrize("rows", [1, 16, 17, 80, 96, 384, 1000, 4096, 30522])
def test_chunks_are_near_128_kib(rows, columns):
    chunk_rows = chunk_rows_for(rows, columns, ("MatMul",))
    row_bytes = -(-columns // 32) * 16
    assert chunk_rows % 16 == 0
    assert 16 <= chunk_rows <= -(-rows // 16) * 16
    assert chunk_rows * row_bytes <= 3 * 128 * 1024 or chunk_rows == 16
    if chunk_rows < rows:
        assert chunk_rows >= 64 or 64 * row_bytes > 256 * 1024
        assert chunk_rows * row_bytes >= 64 * 1024


def test_rows_that_a_gather_reads_come_one_tile_at_a_time():
    assert chunk_rows_for(30522, 384, ("Gather", "MatMul")) == 16
