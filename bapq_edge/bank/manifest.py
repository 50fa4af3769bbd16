"""The manifest: frozen dataclasses, strict in both directions."""

from __future__ import annotations

from dataclasses import dataclass, field

from .layout import Level, Plane

__all__ = [
    "FORMAT_NAME",
    "FORMAT_VERSION",
    "Calibration",
    "FileEntry",
    "KeptNode",
    "Layer",
    "Manifest",
    "PlaneEntry",
    "SourceModel",
]

FORMAT_NAME = "bapq-bank"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class FileEntry:
    """A file of the bank: its path relative to the bank, its size, its BLAKE2b-128 digest."""

    file: str
    bytes: int
    blake2b: str


@dataclass(frozen=True)
class PlaneEntry:
    """One plane file and its chunk table.

    The digests of the chunks stand in the table; the plane file as a whole has none.
    """

    file: str
    bytes: int
    chunks: FileEntry
    """tables/<plane>_chunks.npy, (chunk_count,): offset u8, bytes u4, crc32 u4."""
    digests: FileEntry
    """tables/<plane>_digests.npy, (chunk_count, 16) uint8: BLAKE2b-128 of each chunk."""


@dataclass(frozen=True)
class Layer:
    """One weight-heavy operator, or several that share their weights."""

    name: str
    """Unique; letters, digits, '.', '_' and '-' only; also its folder in the exchange form."""
    operators: tuple[str, ...]
    """What reads it: MatMul, Gemm, Conv, Gather, in execution order, each once."""
    rows: int
    columns: int
    chunk_rows: int
    """Rows per chunk, a multiple of 16; the last chunk may have fewer."""
    first_chunk: int
    has_bias: bool
    residual_steps: int
    """Level-8 steps in one level-4 step, 8 to 16."""
    scale_columns: dict[Level, int]
    """Columns per scale of levels 4, 2 and 1, as far as the bank holds their planes."""
    relative_error: dict[Level, float]
    """||(w - w_level) x|| / ||w x|| on the calibration data, per level (uncalibrated: x = 1s)."""

    @property
    def chunk_count(self) -> int:
        """Number of chunks, numbered from `first_chunk` through the whole bank."""
        return -(-self.rows // self.chunk_rows)


@dataclass(frozen=True)
class KeptNode:
    """A node with weights that stays with the graph engine in float, and why."""

    name: str
    operator: str
    weights: int
    reason: str


@dataclass(frozen=True)
class SourceModel:
    """Where the bank came from."""

    name: str
    bytes: int
    blake2b: str
    producer: str
    """Program and version that wrote the bank."""


@dataclass(frozen=True)
class Calibration:
    """What the quantizer saw; absent from the manifest when it saw nothing."""

    samples: int
    blake2b: str


@dataclass(frozen=True)
class Manifest:
    """The whole manifest.json."""

    model: SourceModel
    levels: tuple[Level, ...]
    """Levels the bank was built for, highest first."""
    graph: FileEntry
    planes: dict[Plane, PlaneEntry]
    layers: tuple[Layer, ...]
    kept_in_float: tuple[KeptNode, ...] = ()
    calibration: Calibration | None = None
    format: str = field(default=FORMAT_NAME)
    format_version: int = field(default=FORMAT_VERSION)
