"""Levels, planes and tile geometry: the constants of the bank format.

The same constants stand in native/src/kernels/kernels.h; a test holds the two together. Their
reasons are in docs/reference/bank_format.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

__all__ = [
    "BLOCK_COLUMNS",
    "CHUNK_ALIGNMENT",
    "LEVELS",
    "PLANES",
    "PLANES_OF_LEVEL",
    "SCALED_PLANES",
    "TILE_ROWS",
    "Level",
    "Plane",
    "TileGeometry",
    "blocks_of",
    "level_within",
    "planes_for",
    "scaled_levels",
    "tiles_of",
]

Level = Literal[32, 8, 4, 2, 1]
Plane = Literal["f32", "p4", "r8", "s1", "m1"]

LEVELS: tuple[Level, ...] = (32, 8, 4, 2, 1)
"""Every level, highest first."""

PLANES: dict[Plane, Level] = {"f32": 32, "r8": 8, "p4": 4, "m1": 2, "s1": 1}
"""Every plane and the level that it completes: the level runs once this plane is there too.

Their order is that of every per-plane table and mask, in bapq.h too; they are compared when the
library is loaded.
"""

PLANES_OF_LEVEL: dict[Level, tuple[Plane, ...]] = {
    32: ("f32",),
    8: ("p4", "r8"),
    4: ("p4",),
    2: ("s1", "m1"),
    1: ("s1",),
}
"""Planes that a level reads, in the order of `bapq_tile.code` in kernels.h."""

SCALED_PLANES: dict[Plane, Level] = {"p4": 4, "m1": 2, "s1": 1}
"""Planes that may carry scales, and whose: level 8 divides level 4's by `residual_steps`."""

TILE_ROWS = 16
"""Output rows per tile: one AVX-512 register, two AVX2, four NEON registers of int32 sums."""

BLOCK_COLUMNS = 32
"""Columns that share one activation scale; a scale group is a whole number of blocks."""

CHUNK_ALIGNMENT = 64
"""Bytes that the start of every chunk is a multiple of: one cache line, one widest vector load."""

_CODE_BITS: dict[Plane, int] = {"f32": 32, "p4": 4, "r8": 4, "s1": 1, "m1": 1}


def planes_for(levels: tuple[Level, ...]) -> tuple[Plane, ...]:
    """Planes that a bank of these levels stores, in the order of `PLANES`."""
    wanted = {plane for level in levels for plane in PLANES_OF_LEVEL[level]}
    return tuple(plane for plane in PLANES if plane in wanted)


def scaled_levels(levels: tuple[Level, ...]) -> set[Level]:
    """Levels whose scales a layer of these levels stores: those that it has, and 4 for level 8."""
    return {4 if level == 8 else level for level in levels if level != 32}


def level_within(own: tuple[Level, ...], level: Level) -> Level:
    """The level that runs where `level` is asked for and only `own` are there, highest first.

    It is the next higher of them, or else the highest.
    """
    return min((candidate for candidate in own if candidate >= level), default=own[0])


def tiles_of(rows: int) -> int:
    """Tiles that hold this many rows."""
    return -(-rows // TILE_ROWS)


def blocks_of(columns: int) -> int:
    """Blocks that hold this many columns."""
    return -(-columns // BLOCK_COLUMNS)


@dataclass(frozen=True)
class TileGeometry:
    """Byte layout of one tile record of one plane: codes, then scales, then bias, then padding.

    A chunk of a plane is its tiles' records, one after another; all records of a layer's plane have
    the same size, so tile t of a chunk starts at t * record_bytes.
    """

    plane: Plane
    columns: int
    scale_columns: int
    """Columns per scale, a multiple of 32; 0 without scales."""
    has_bias: bool
    depthwise: bool = False
    """Columns are taps of a depthwise kernel: they lie one after another, not in blocks."""

    @classmethod
    def of_layer(
        cls,
        plane: Plane,
        levels: tuple[Level, ...],
        columns: int,
        scale_columns: Mapping[Level, int],
        has_bias: bool,
        depthwise: bool = False,
    ) -> TileGeometry:
        """Geometry of a layer of these levels in a plane: only scales and bias that they read."""
        scaled = SCALED_PLANES.get(plane)
        group = scale_columns[scaled] if scaled in scaled_levels(levels) else 0
        return cls(plane, columns, group, has_bias and PLANES[plane] in levels, depthwise)

    @property
    def code_bytes(self) -> int:
        """Bytes of the codes (level 32: of the float32 weights)."""
        columns = self.columns if self.depthwise else blocks_of(self.columns) * BLOCK_COLUMNS
        return -(-columns * _CODE_BITS[self.plane] // 8) * TILE_ROWS

    @property
    def scale_groups(self) -> int:
        """Scales per row."""
        if self.scale_columns == 0:
            return 0
        return -(-self.columns // self.scale_columns)

    @property
    def scale_bytes(self) -> int:
        """Bytes of the bf16 scales, (scale_groups, 16)."""
        return self.scale_groups * TILE_ROWS * 2

    @property
    def bias_bytes(self) -> int:
        """Bytes of the float32 bias, (16,)."""
        return TILE_ROWS * 4 if self.has_bias else 0

    @property
    def record_bytes(self) -> int:
        """Bytes of one record, padded with zeros to a multiple of `CHUNK_ALIGNMENT`."""
        used = self.code_bytes + self.scale_bytes + self.bias_bytes
        return -(-used // CHUNK_ALIGNMENT) * CHUNK_ALIGNMENT
