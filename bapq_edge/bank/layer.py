"""What the manifest tells about a layer, and what follows from it: chunks, planes, tiles."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .fields import ChunkRows, Columns, Fraction, Name, Rows, ScaleColumns, Size, Steps, Yes
from .layout import LEVELS, Level, Plane, TileGeometry, planes_for
from .strict_json import Place, decode, encode

__all__ = ["Layer", "Method", "Operator"]

Operator = Literal["MatMul", "Gemm", "Conv", "DepthwiseConv", "Gather"]
Method = Literal["nearest", "compensated"]


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One weight-heavy operator, or several that share their weights."""

    name: Name
    """Unique; letters, digits, '.', '_' and '-' only; also its folder in the exchange form."""
    operators: tuple[Operator, ...]
    """Operators that read it, in execution order, each once. DepthwiseConv is alone: its layers
    have a layout of their own."""
    rows: Rows
    stored_rows: Rows
    """Rows that chunks hold; the others are dropped, since their weights are all zero."""
    reordered: bool = False
    """Whether tables/row_order.npy says where each row stands in the output."""
    columns: Columns
    chunk_rows: ChunkRows
    """Stored rows per chunk, a multiple of 16; the last chunk may have fewer."""
    first_chunk: Size = 0
    """Number of its first chunk: the writer numbers chunks through the whole bank."""
    has_bias: bool
    residual_steps: Steps
    """Steps of level 8 in one step of level 4, 8 to 16."""
    scale_columns: dict[Level, ScaleColumns]
    """Columns per scale of the levels 4 (and 8), 2 and 1 that the layer has."""
    method: dict[Level, Method]
    """How the codes of most rows were chosen, for the levels below 32: as the nearest to each
    weight, or such that they make up for each other's errors."""
    looped: Yes | None = None
    """Whether a Loop or Scan runs it, so that a run asks for it again and again."""
    relative_error: dict[Level, Fraction]
    """||(w - w_level) x|| / ||w x|| on the calibration data (uncalibrated: x = 1s), for the levels
    that the layer has: those of the bank, or some of them."""

    @property
    def levels(self) -> tuple[Level, ...]:
        """Levels that the layer has, highest first."""
        return tuple(level for level in LEVELS if level in self.relative_error)

    @property
    def planes(self) -> tuple[Plane, ...]:
        """Planes that hold the layer, in the order of `PLANES`."""
        return planes_for(self.levels)

    @property
    def depthwise(self) -> bool:
        """Whether it is laid out for a depthwise convolution."""
        return self.operators == ("DepthwiseConv",)

    @property
    def chunk_count(self) -> int:
        """Number of chunks; the first is `first_chunk`."""
        return -(-self.stored_rows // self.chunk_rows)

    @property
    def chunks(self) -> range:
        """Numbers of its chunks in the bank."""
        return range(self.first_chunk, self.first_chunk + self.chunk_count)

    @property
    def weights(self) -> int:
        """Number of weights that are stored."""
        return self.stored_rows * self.columns

    @property
    def chunk_range(self) -> slice:
        """Its chunks, in a table of all chunks of the bank."""
        return slice(self.first_chunk, self.first_chunk + self.chunk_count)

    def check(self, where: str) -> None:
        """Raise BankFormatError when a field breaks its rule."""
        decode(Layer, encode(self), Place(where, ""))

    def chunk_slice(self, chunk: int) -> slice:
        """Stored rows of a chunk, which is numbered through the whole bank."""
        start = (chunk - self.first_chunk) * self.chunk_rows
        return slice(start, min(start + self.chunk_rows, self.stored_rows))

    def geometry(self, plane: Plane) -> TileGeometry:
        """Tile records of this layer in a plane that holds it."""
        return TileGeometry.of_layer(
            plane,
            self.levels,
            self.columns,
            self.scale_columns,
            self.has_bias,
            self.depthwise,
        )
