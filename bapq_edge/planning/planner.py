"""The planner: which level every chunk runs at, and which chunks stay in memory.

A pure function of numbers: no file, no clock, no chance. `chunk_costs` once per bank, then `plan`
at every change of what is wanted or allowed. docs/explanation/planner.md explains the method.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..bank.layout import Level
from ..errors import BudgetTooSmallError, RequestError, UnknownLevelError
from ..units import format_size
from .automatic import Choice, choose
from .costs import ChunkCosts, Request, chunk_costs
from .knapsack import GreedyKnapsack
from .placing import aligned, pin_evenly, place, smallest_for

__all__ = [
    "ChunkCosts",
    "Plan",
    "Request",
    "chunk_costs",
    "columns_for",
    "plan",
    "smallest_limit",
]


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
    """Squared relative error of the outputs."""
    reason: str
    """The plan in one line, for people."""
    predicted_s: float = 0.0
    """Time of a run; 0 where the device's speeds are not known."""
    held_back: str | None = None
    """Why "auto" took no better levels that the memory allows, in one line; None: it did."""
    kept: NDArray[np.uint8] | None = None
    """(chunks,) bit p: the p-th of `layout.PLANES`, if it is in memory, stays there, for plans
    to come too; None: what this plan does not pin may go."""
    region: int | None = None
    """Number of the region (`Store.add_region`) whose values stand in for skipped rows."""

    @property
    def relative_error(self) -> float:
        """Norm of the outputs' error over norm of the outputs, as predicted."""
        return math.sqrt(self.predicted_error)

    @property
    def uniform_level(self) -> int | None:
        """The level of all chunks; None when they differ."""
        first = int(self.levels[0])
        return first if bool((self.levels == first).all()) else None


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
    chosen = _choice(costs, request)
    first = _first_allowed(costs, request)
    precision = "auto" if request.level == "auto" else f"level {request.level}"
    if request.bits is not None:
        precision = f"{request.bits:g} bits"
    if first and (request.level == "auto" or _column(costs, request.level) < first):
        precision += f", capped at {costs.levels[first]}"
    return _pin(costs, chosen, request, resident, precision)


def columns_for(costs: ChunkCosts, request: Request) -> NDArray[np.intp]:
    """(chunks,): column of `costs.levels` that each chunk runs at. Raises what `plan` raises."""
    return _choice(costs, request).columns


def _choice(costs: ChunkCosts, request: Request) -> Choice:
    first = _first_allowed(costs, request)
    if request.bits is not None:
        return Choice(_columns_for_bits(costs, request.bits, first))
    if request.level == "auto":
        return choose(costs, request, first)
    return Choice(np.full(len(costs.weights), max(_column(costs, request.level), first)))


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
    floor = weight_bits.shape[1] - 1
    if costs.guessed:  # no chunk runs below the level that all can have
        floor = int(np.argmax(weight_bits.sum(0) <= most))
    kept = slice(first, first + floor + 1)
    knapsack = GreedyKnapsack(weight_bits[:, : floor + 1], costs.sensitivity[:, kept])
    uniform = [np.full(len(weight_bits), c) for c in np.flatnonzero(weight_bits.sum(0) <= most)]
    # A level of no more bits may have been found to do better than its errors added up.
    return min([knapsack.climb(most), *uniform], key=lambda c: costs.error_of(c + first)) + first


def _pin(
    costs: ChunkCosts,
    chosen: Choice,
    request: Request,
    resident: NDArray[np.bool_] | None,
    precision: str,
) -> Plan:
    """Pin all chunks, or as many as the limit leaves room for beside a ring for the others."""
    columns, limit = chosen.columns, request.weight_bytes_limit
    rows = np.arange(len(columns))
    sizes = np.where(costs.row_read, 0, costs.level_bytes[rows, columns])
    total = int(sizes.sum())
    placed = place(costs.by_layer(sizes), aligned(int(sizes.max())), limit, request.speeds)
    pinned, ring_bytes, pinned_bytes = ~costs.row_read, placed.ring_bytes, total
    reason = f"{precision}: all {format_size(total)} pinned"
    if limit is not None and total > limit:
        smallest = smallest_for(sizes)
        if smallest > limit:
            raise BudgetTooSmallError(
                f"{limit} bytes are allowed for weights, {precision} needs {smallest}: allow more"
            )
        pinned = _pinned(costs, sizes, limit - ring_bytes, placed.pinned_share, resident)
        pinned_bytes = int(sizes[pinned].sum())
        reason = (
            f"{precision}: {format_size(pinned_bytes)} of {format_size(total)} pinned, "
            f"the rest streamed through {format_size(ring_bytes)}"
        )
    if chosen.held_back is not None:
        reason += f"; {chosen.held_back}"
    levels = costs.runs_at[rows, columns]
    return Plan(
        levels=levels,
        pinned=pinned,
        ring_bytes=ring_bytes,
        resident_bytes=pinned_bytes + ring_bytes,
        streamed_bytes=total - pinned_bytes,
        bits_per_weight=int((levels * costs.weights).sum()) / int(costs.weights.sum()),
        predicted_error=costs.error_of(columns),
        reason=reason,
        predicted_s=placed.run_s,
        held_back=chosen.held_back,
    )


def _pinned(
    costs: ChunkCosts,
    sizes: NDArray[np.int64],
    pinned_bytes: int,
    layer_share: NDArray[np.float64],
    resident: NDArray[np.bool_] | None,
) -> NDArray[np.bool_]:
    """(chunks,): those in loops first, which a run would read in every turn, then of all alike."""
    pinned = np.zeros(len(sizes), np.bool_)
    others = ~costs.row_read
    share: NDArray[np.float64] | None = np.repeat(layer_share, costs.chunks_of_layer)
    if costs.looped is not None:
        looped = np.flatnonzero(costs.looped & others)
        fitting = looped[np.cumsum(sizes[looped]) <= pinned_bytes]
        pinned[fitting] = True
        pinned_bytes -= int(sizes[fitting].sum())
        others, share = others & ~costs.looped, None
    if others.any():
        stay = None if resident is None else resident[others]
        due = None if share is None else share[others]
        pinned[others] = pin_evenly(sizes[others], pinned_bytes, stay, due)
    return pinned
