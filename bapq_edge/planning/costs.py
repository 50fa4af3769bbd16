"""What the planner weighs: the costs of a bank's chunks, and what is wanted of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ..bank.layout import PLANES_OF_LEVEL, Level
from ..bank.manifest import Expected
from ..bank.reader import Bank
from ..errors import RequestError
from .timing import Speeds

__all__ = ["ChunkCosts", "Request", "chunk_costs"]


@dataclass(frozen=True, eq=False)
class ChunkCosts:
    """What a bank offers."""

    levels: tuple[Level, ...]
    """Levels that can run, highest first."""
    weights: NDArray[np.int64]
    """(chunks,): number of weights of each."""
    level_bytes: NDArray[np.int64]
    """(chunks, levels): bytes of the planes that the level reads; no level reads more than a higher
    one."""
    sensitivity: NDArray[np.float32]
    """(chunks, levels): squared relative error that the chunk adds to the output of its layer."""
    row_read: NDArray[np.bool_]
    """(chunks,): read row by row on demand; such a chunk is never in memory as a whole."""
    runs_at: NDArray[np.uint8]
    """(chunks, levels): the level itself, or what a chunk whose layer lacks it runs at instead;
    bytes and sensitivity are those of that one."""
    chunks_of_layer: NDArray[np.intp]
    """(layers,): number of chunks of each layer; layers follow each other."""
    guessed: bool = False
    """Whether the sensitivities are a guess: the bank was built without calibration data."""
    expected: Expected | None = None
    """What the build has measured of plans."""
    looped: NDArray[np.bool_] | None = None
    """(chunks,): asked for again and again in a run, in a loop; None: none is."""

    def error_of(self, columns: NDArray[np.intp]) -> float:
        """Squared relative error of the outputs, as predicted; columns (chunks,).

        The sum of the sensitivities, read by what the build has measured of other mixtures; of a
        uniform level, what was measured of that one. Chunks that are read by row may be at another
        level: what their sensitivities differ by counts in proportion.
        """
        total = float(self.sensitivity[np.arange(len(columns)), columns].sum(dtype=np.float64))
        if self.expected is None or total == 0:
            return total
        of_others = columns[~self.row_read]
        if len(of_others) and (of_others == of_others[0]).all():
            measured = self.expected.level(self.levels[of_others[0]])
            if measured is not None and measured.table > 0:
                return measured.error * min(total / measured.table, 1.0)
        return self.expected.of_mixture(total)

    def by_layer(self, values: NDArray[np.int64]) -> NDArray[np.float64]:
        """Sums of values, (chunks,), over the chunks of each layer: (layers,)."""
        first = np.cumsum(self.chunks_of_layer) - self.chunks_of_layer
        return np.add.reduceat(values.astype(np.float64), first)


@dataclass(frozen=True)
class Request:
    """What is wanted, and what the device allows."""

    level: Level | Literal["auto"] = "auto"
    """One level for all chunks, or the planner's choice."""
    bits: float | None = None
    """Bits per weight, at most, on average over all weights of the bank; needs level "auto"."""
    highest_level: Level = 32
    """No chunk runs above it, unless even its lowest level is above it."""
    weight_bytes_limit: int | None = None
    """Most bytes of pinned chunks and ring; None is no limit."""
    max_slowdown: float | None = 1.0
    """What a run of "auto" may take at most, in times of one with all weights in memory; None: only
    `latency_s` counts."""
    latency_s: float | None = None
    """Time that a run may take at most, if that is possible; None: only `max_slowdown` counts."""
    speeds: Speeds | None = None
    """How fast the device is; without them nothing is assumed to be read in time."""

    def __post_init__(self) -> None:
        """Refuse what contradicts itself."""
        if self.bits is not None and self.level != "auto":
            raise RequestError(
                f"level {self.level} and {self.bits:g} bits are both asked for: choose one"
            )


def chunk_costs(bank: Bank) -> ChunkCosts:
    """The planner's view of a bank; reads its sensitivity table."""
    manifest = bank.manifest
    chunk_count = manifest.chunk_count
    weights = np.empty(chunk_count, np.int64)
    row_read = np.empty(chunk_count, np.bool_)
    looped = np.zeros(chunk_count, np.bool_)
    runs_at = np.empty((chunk_count, len(bank.levels)), np.uint8)
    for layer in manifest.layers:
        chunks = layer.chunk_range
        weights[chunks] = layer.chunk_rows * layer.columns
        last_rows = layer.chunk_slice(chunks.stop - 1)
        weights[chunks.stop - 1] = (last_rows.stop - last_rows.start) * layer.columns
        looped[chunks] = bool(layer.looped)
        row_read[chunks] = layer.operators == ("Gather",)
        runs_at[chunks] = [bank.level_of(layer, level) for level in bank.levels]
    level_bytes = np.zeros((chunk_count, len(bank.levels)), np.int64)
    sensitivity = np.zeros((chunk_count, len(bank.levels)), np.float32)
    table = bank.sensitivity()
    for level in bank.levels:
        here = runs_at == level
        for plane in PLANES_OF_LEVEL[level]:
            level_bytes += here * bank.chunks(plane)["bytes"][:, None].astype(np.int64)
        sensitivity += here * table[:, [manifest.levels.index(level)]]
    return ChunkCosts(
        bank.levels,
        weights,
        level_bytes,
        sensitivity,
        row_read,
        runs_at,
        np.array([layer.chunk_count for layer in manifest.layers]),
        looped=looped if looped.any() else None,
        guessed=manifest.calibration is None,
        expected=manifest.expected,
    )
