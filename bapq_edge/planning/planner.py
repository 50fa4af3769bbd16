"""The planner: which level every chunk runs at, and which chunks stay in memory.

A pure function of numbers: no file, no clock, no chance. `chunk_costs` once per bank, then `plan`
at every change of what is wanted or allowed. docs/explanation/planner.md explains the method.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ..bank.layout import CHUNK_ALIGNMENT, PLANES_OF_LEVEL, Level
from ..bank.reader import Bank
from ..errors import BudgetTooSmallError, RequestError, UnknownLevelError
from ..units import format_size

__all__ = [
    "ChunkCosts",
    "Plan",
    "Request",
    "aligned",
    "chunk_costs",
    "columns_for",
    "pin_evenly",
    "plan",
    "ring_bytes_for",
    "smallest_for",
    "smallest_limit",
]

_RING_CHUNKS = 3
"""One chunk being computed on, one ready, one being read: reading and computing never wait for a
free place, only for each other."""

_LEAST_RING_CHUNKS = 2
"""One being computed on, one being read."""

_RING_SHARE = 8
"""Where an eighth of the limit is more than `_RING_CHUNKS`, the ring takes that much."""

_RING_BYTES = 4 << 20
"""No ring is larger: this one rides out 100 ms of a slow card (40 MB/s). More memory is better
spent on pinned chunks: a larger ring reads no byte less."""


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
    latency_s: float | None = None
    """Time that reading may take in a run; "auto" then streams what can be read in it, if that
    lowers the error. None: "auto" streams only what it cannot avoid."""
    storage_bytes_s: float | None = None
    """Read speed; without it nothing is assumed to be read in time."""

    def __post_init__(self) -> None:
        """Refuse what contradicts itself."""
        if self.bits is not None and self.level != "auto":
            raise RequestError(
                f"level {self.level} and {self.bits:g} bits are both asked for: choose one"
            )


@dataclass(frozen=True, eq=False)
class Plan:
    """The planner's answer."""

    levels: NDArray[np.uint8]
    """(chunks,): level of each; 0: skipped, neither read nor computed."""
    pinned: NDArray[np.bool_]
    """(chunks,): whether it is always in memory; the others are streamed, or read row by row."""
    ring_bytes: int
    """Size of the buffer that streamed chunks pass through; 0 when nothing is streamed."""
    resident_bytes: int
    """Bytes of pinned chunks and ring."""
    streamed_bytes: int
    """Bytes that every run reads through the ring."""
    bits_per_weight: float
    """Nominal bits, all weights of the bank counted."""
    predicted_error: float
    """Sum of the chunks' sensitivities."""
    reason: str
    """The plan in one line, for people."""
    kept: NDArray[np.uint8] | None = None
    """(chunks,) bit p: the p-th of `layout.PLANES`, if it is in memory, stays there, for plans
    to come too; None: what this plan does not pin may go."""
    region: int | None = None
    """Number of the region (`Store.add_region`) whose values stand in for skipped rows."""

    @property
    def uniform_level(self) -> int | None:
        """The level of all chunks; None when they differ."""
        first = int(self.levels[0])
        return first if bool((self.levels == first).all()) else None


def chunk_costs(bank: Bank) -> ChunkCosts:
    """The planner's view of a bank; reads its sensitivity table."""
    manifest = bank.manifest
    chunk_count = manifest.chunk_count
    weights = np.empty(chunk_count, np.int64)
    row_read = np.empty(chunk_count, np.bool_)
    runs_at = np.empty((chunk_count, len(bank.levels)), np.uint8)
    for layer in manifest.layers:
        chunks = layer.chunk_range
        weights[chunks] = layer.chunk_rows * layer.columns
        last_rows = layer.chunk_slice(chunks.stop - 1)
        weights[chunks.stop - 1] = (last_rows.stop - last_rows.start) * layer.columns
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
    return ChunkCosts(bank.levels, weights, level_bytes, sensitivity, row_read, runs_at)


def smallest_limit(costs: ChunkCosts, request: Request) -> int:
    """Smallest `weight_bytes_limit` at which the request can be met; its own is not looked at.

    It holds all chunks or a ring of two of the largest, whichever is less.
    """
    if request.level == "auto" and request.bits is None:
        columns = np.full(len(costs.weights), len(costs.levels) - 1)
    else:
        columns = columns_for(costs, request)
    sizes = costs.level_bytes[np.arange(len(columns)), columns]
    return smallest_for(sizes[~costs.row_read])


def plan(costs: ChunkCosts, request: Request, resident: NDArray[np.bool_] | None = None) -> Plan:
    """The plan for a request; the same arguments give the same plan.

    `resident` (chunks,) are the chunks that are pinned now: as far as it costs nothing they stay,
    so that a new plan reads little.

    Raises UnknownLevelError for a level that the bank lacks, RequestError for fewer bits than
    its lowest level, BudgetTooSmallError with the smallest limit that works.
    """
    columns = columns_for(costs, request)
    first = _first_allowed(costs, request)
    precision = "auto" if request.level == "auto" else f"level {request.level}"
    if request.bits is not None:
        precision = f"{request.bits:g} bits"
    if first and (request.level == "auto" or _column(costs, request.level) < first):
        precision += f", capped at {costs.levels[first]}"
    return _pin(costs, columns, request.weight_bytes_limit, resident, precision)


def columns_for(costs: ChunkCosts, request: Request) -> NDArray[np.intp]:
    """(chunks,): column of `costs.levels` that each chunk runs at. Raises what `plan` raises."""
    first = _first_allowed(costs, request)
    if request.bits is not None:
        return _columns_for_bits(costs, request.bits, first)
    if request.level == "auto":
        return _columns_for_limit(costs, request, first)
    return np.full(len(costs.weights), max(_column(costs, request.level), first))


def _first_allowed(costs: ChunkCosts, request: Request) -> int:
    """Levels stand highest first, so those allowed are the columns from this one on."""
    return sum(level > request.highest_level for level in costs.levels[:-1])


def _column(costs: ChunkCosts, level: Level) -> int:
    if level not in costs.levels:
        raise UnknownLevelError(
            f"level {level!r} is not in the bank, which holds {', '.join(map(str, costs.levels))}"
        )
    return costs.levels.index(level)


def _columns_for_bits(costs: ChunkCosts, bits: float, first: int) -> NDArray[np.intp]:
    weight_bits = costs.weights[:, None] * costs.runs_at[:, first:].astype(np.int64)
    weights, least = int(costs.weights.sum()), int(weight_bits[:, -1].sum())
    if not bits * weights >= least:
        lowest = -(-1000 * least // weights) / 1000  # rounded up, so that it works
        raise RequestError(
            f"{bits:g} bits per weight are asked for, the bank's lowest level takes {lowest:g}: "
            f"ask for {lowest:g} or more"
        )
    most = int(min(bits * weights, int(weight_bits[:, 0].sum())))
    knapsack = _GreedyKnapsack(weight_bits, costs.sensitivity[:, first:])
    columns: NDArray[np.intp] = knapsack.climb(most)
    return columns + first


def _columns_for_limit(costs: ChunkCosts, request: Request, first: int) -> NDArray[np.intp]:
    """The smallest error within the limit, or within the limit and what can be read in time."""
    columns: NDArray[np.intp] = costs.sensitivity[:, first:].argmin(1) + first
    limit = request.weight_bytes_limit
    streamable = ~costs.row_read
    if limit is None or not streamable.any():
        return columns
    sizes = costs.level_bytes[streamable, first:]
    error = costs.sensitivity[streamable, first:]
    knapsack = _GreedyKnapsack(sizes, error)
    candidates = [knapsack.climb(limit)]
    readable = (request.latency_s or 0) * (request.storage_bytes_s or 0)
    if readable > 0:
        # A ring for larger chunks leaves less to pin, so every highest level is tried.
        for top in range(sizes.shape[1]):
            largest = aligned(int(sizes[:, top].max()))
            if _LEAST_RING_CHUNKS * largest <= limit:
                # Pinning whole chunks may fall short of its share by less than one.
                pinned = limit - ring_bytes_for(limit, largest) - largest
                most = int(min(pinned + readable, sizes[:, top].sum()))
                candidates.append(knapsack.climb(most, top))
    rows = np.arange(len(sizes))
    columns[streamable] = first + min(
        candidates, key=lambda found: float(error[rows, found].sum(dtype=np.float64))
    )
    return columns


class _GreedyKnapsack:
    """All steps from the lowest level up, best first, of a multiple-choice knapsack.

    The steps of a chunk are the edges of the convex hull of its (cost, error) points; so each saves
    less error per cost than the one before.
    """

    def __init__(self, cost: NDArray[np.int64], error: NDArray[np.float32]) -> None:
        """Both (chunks, levels); costs never rise from left to right."""
        self._base = int(cost[:, -1].sum())
        # Bytes and bits are exact in float64, and rows of one type and order are quick.
        price_of, error_of = (a.T.astype(np.float64, order="C") for a in (cost, error))
        levels, chunks = price_of.shape
        rows = np.arange(chunks)
        column = np.full(chunks, levels - 1)
        ratio = np.full(chunks, np.inf)
        path = [column]
        steps = [(rows[:0], price_of[0, :0], column[:0], ratio[:0])]
        for _ in range(levels - 1):
            price = price_of - price_of[column, rows]
            saved = error_of[column, rows] - error_of
            # A step that costs nothing comes first, one that saves nothing last: what calibration
            # never saw may matter all the same.
            ratios = np.divide(saved, price, out=np.full(price.shape, np.inf), where=price > 0)
            ratios[(saved < 0) | (np.arange(levels)[:, None] >= column)] = -1
            best = ratios.argmax(0)  # the highest level of equals
            # Rounding must not put a step before the one that it builds on.
            ratio = np.minimum(ratio, ratios[best, rows])
            moved = np.flatnonzero(ratio >= 0)
            steps.append((moved, price[best[moved], moved], best[moved], ratio[moved]))
            column = np.where(ratio >= 0, best, column)
            path.append(column)
        self._path = np.stack(path)
        """(steps + 1, chunks): column after so many steps."""
        chunk, price, column, ratio = (np.concatenate(parts) for parts in zip(*steps, strict=True))
        # Stable: equal steps stay in the order of a chunk's path, then of execution.
        order = _descending(ratio)
        self._chunk, self._column = chunk[order], column[order]
        self._price = price[order].astype(np.int64)

    def climb(self, most: int, top: int = 0) -> NDArray[np.intp]:
        """Columns, none left of `top`, whose total cost is at most `most` if any is; (chunks,).

        Takes every step that still fits; the total error never rises with `most`.
        """
        taken = np.zeros(self._path.shape[1], np.intp)
        left = most - self._base
        steps = np.flatnonzero(self._column >= top)
        while left >= 0 and len(steps):
            spent = np.cumsum(self._price[steps])
            count = int(np.searchsorted(spent, left, side="right"))
            if count:
                taken += np.bincount(self._chunk[steps[:count]], minlength=len(taken))
                left -= int(spent[count - 1])
            steps = steps[count:]
            # A step that does not fit now never will, nor will those that build on it.
            large = steps[self._price[steps] > left]
            reach = np.full(len(taken), -1)
            np.maximum.at(reach, self._chunk[large], self._column[large])
            steps = steps[self._column[steps] > reach[self._chunk[steps]]]
        return self._path[taken, np.arange(len(taken))]


def _descending(values: NDArray[np.float64]) -> NDArray[np.intp]:
    """`argsort(-values, kind="stable")` of values from 0 up, three times as fast.

    Such floats are ordered as their bits are, and NumPy sorts 16-bit numbers by radix.
    """
    bits = ~np.ascontiguousarray(values).view(np.uint64)
    order = np.arange(len(bits))
    for shift in (0, 16, 32, 48):
        part = (bits >> np.uint64(shift)).astype(np.uint16)
        order = order[np.argsort(part[order], kind="stable")]
    return order


def _pin(
    costs: ChunkCosts,
    columns: NDArray[np.intp],
    limit: int | None,
    resident: NDArray[np.bool_] | None,
    precision: str,
) -> Plan:
    """Pin all chunks, or as many as the limit leaves room for beside a ring for the others."""
    rows = np.arange(len(columns))
    sizes = np.where(costs.row_read, 0, costs.level_bytes[rows, columns])
    total = int(sizes.sum())
    pinned, ring_bytes, pinned_bytes = ~costs.row_read, 0, total
    reason = f"{precision}: all {format_size(total)} pinned"
    if limit is not None and total > limit:
        smallest = smallest_for(sizes)
        if smallest > limit:
            raise BudgetTooSmallError(
                f"{limit} bytes are allowed for weights, {precision} needs {smallest}: allow more"
            )
        ring_bytes = ring_bytes_for(limit, aligned(int(sizes.max())))
        streamable = np.flatnonzero(pinned)
        stay = None if resident is None else resident[streamable]
        pinned[streamable] = pin_evenly(sizes[streamable], limit - ring_bytes, stay)
        pinned_bytes = int(sizes[pinned].sum())
        reason = (
            f"{precision}: {format_size(pinned_bytes)} of {format_size(total)} pinned, "
            f"the rest streamed through {format_size(ring_bytes)}"
        )
    levels = costs.runs_at[rows, columns]
    return Plan(
        levels=levels,
        pinned=pinned,
        ring_bytes=ring_bytes,
        resident_bytes=pinned_bytes + ring_bytes,
        streamed_bytes=total - pinned_bytes,
        bits_per_weight=int((levels * costs.weights).sum()) / int(costs.weights.sum()),
        predicted_error=float(costs.sensitivity[rows, columns].sum(dtype=np.float64)),
        reason=reason,
    )


def pin_evenly(
    sizes: NDArray[np.int64], pinned_bytes: int, resident: NDArray[np.bool_] | None
) -> NDArray[np.bool_]:
    """Chunks to pin, spread evenly over the execution order: (chunks,).

    Error diffusion: a chunk is pinned where that brings the pinned bytes so far nearer to their
    share of all bytes so far. The result has `pinned_bytes` or less by under one chunk.
    """
    due = np.cumsum(sizes) * (pinned_bytes / int(sizes.sum()))
    # A chunk that is pinned now stays until it is ahead of the share, another one waits until it is
    # wholly due: a plan made again is the same plan.
    threshold = sizes / 2 if resident is None else np.where(resident, 0, sizes)
    pinned = np.zeros(len(sizes), np.bool_)
    done = 0
    items = zip(sizes.tolist(), due.tolist(), threshold.tolist(), strict=True)
    for i, (size, due_bytes, least) in enumerate(items):
        if due_bytes - done >= least and done + size <= pinned_bytes:
            pinned[i] = True
            done += size
    return pinned


def smallest_for(sizes: NDArray[np.int64]) -> int:
    """Smallest limit for chunks of these sizes."""
    if not len(sizes):
        return 0
    return min(int(sizes.sum()), _LEAST_RING_CHUNKS * aligned(int(sizes.max())))


def ring_bytes_for(limit: int, largest: int) -> int:
    """Ring for chunks of up to `largest` bytes, within a limit."""
    share = min(limit // _RING_SHARE, _RING_BYTES)
    return min(max(_RING_CHUNKS * largest, share), limit) // CHUNK_ALIGNMENT * CHUNK_ALIGNMENT


def aligned(size: int) -> int:
    """What a chunk of this size takes in the ring."""
    return -(-size // CHUNK_ALIGNMENT) * CHUNK_ALIGNMENT
