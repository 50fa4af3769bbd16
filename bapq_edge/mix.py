"""Plans for a mix of wishes: what a policy may ask for, planned together.

Every wish has a plan of its own; what they share stays in memory from one to the next. Planes that
most runs read are worth their memory, planes that only rare regions need are streamed when those
come. Pure functions of numbers, as the planner is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from .bank.boundary import Wish
from .bank.layout import PLANES, PLANES_OF_LEVEL
from .bank.reader import Bank
from .errors import BudgetTooSmallError
from .planner import (
    Plan,
    Problem,
    Request,
    aligned,
    columns_for,
    ring_bytes_for,
    smallest_for,
    spread,
)
from .units import format_size

__all__ = ["MixProblem", "plan_mix", "smallest_mix_limit"]

_MAIN_SHARE = 0.5
"""A wish of so many runs is held whole in memory; a rarer one streams what others do not share."""


@dataclass(frozen=True, eq=False)
class MixProblem:
    """What a bank offers, plane by plane."""

    problem: Problem
    plane_bytes: NDArray[np.int64]
    """(chunks, planes), in the order of `PLANES`"""
    skipped: NDArray[np.bool_] | None = None
    """(regions, chunks): what `Wish.region` skips"""

    @classmethod
    def of(
        cls, bank: Bank, problem: Problem, skipped: NDArray[np.bool_] | None = None
    ) -> MixProblem:
        """The view of an open bank."""
        sizes = np.zeros((len(problem.weights), len(PLANES)), np.int64)
        for number, plane in enumerate(PLANES):
            if plane in bank.planes:
                sizes[:, number] = bank.chunks(plane)["bytes"]
        return cls(problem, sizes, skipped)


@dataclass(frozen=True)
class _Wanted:
    """One wish, worked out."""

    levels: NDArray[np.uint8]
    """(chunks,), 0: skipped"""
    planes: NDArray[np.bool_]
    """(chunks, planes): what is read and could be in memory"""
    error: float


def smallest_mix_limit(mix: MixProblem, wishes: Mapping[Wish, float], request: Request) -> int:
    """Smallest `weight_bytes_limit` that every wish can be met at."""
    return max(
        smallest_for((mix.plane_bytes * _wanted(mix, wish, request).planes).sum(1))
        for wish in wishes
    )


def plan_mix(
    mix: MixProblem,
    wishes: Mapping[Wish, float],
    request: Request,
    resident: NDArray[np.bool_] | None = None,
) -> dict[Wish, Plan]:
    """A plan for every wish; `wishes` gives the share of runs that read it, 0 to 1.

    Of the request, `highest_level` and `weight_bytes_limit` hold for each of them. `resident`
    (chunks,) are chunks that are pinned now: as far as it costs nothing they stay.

    Raises what `planner.plan` raises.
    """
    wanted = {wish: _wanted(mix, wish, request) for wish in wishes}
    value = np.zeros(mix.plane_bytes.shape)
    for wish, share in wishes.items():
        value += share * wanted[wish].planes
    used = np.logical_or.reduce([each.planes for each in wanted.values()])
    # What is worth nothing is used all the same: by wishes whose share nobody knows.
    value = np.where(used, np.maximum(value, 1e-9), 0)
    limit = request.weight_bytes_limit
    return {
        wish: _place(mix, wish, each, value, wishes[wish] >= _MAIN_SHARE, limit, resident)
        for wish, each in wanted.items()
    }


def _wanted(mix: MixProblem, wish: Wish, request: Request) -> _Wanted:
    problem = mix.problem
    level = "auto" if wish.level is None else wish.level
    own = replace(request, level=level, bits=wish.bits, latency_s=None)
    columns = columns_for(problem, own)
    rows = np.arange(len(columns))
    levels = problem.runs_at[rows, columns]
    error = float(problem.sensitivity[rows, columns].sum(dtype=np.float64))
    if wish.region is not None and mix.skipped is not None:
        levels = np.where(mix.skipped[wish.region], 0, levels).astype(np.uint8)
    planes = np.zeros(mix.plane_bytes.shape, np.bool_)
    for held, read in PLANES_OF_LEVEL.items():
        for plane in read:
            planes[:, list(PLANES).index(plane)] |= levels == held
    return _Wanted(levels, planes & ~problem.row_read[:, None], error)


def _place(
    mix: MixProblem,
    wish: Wish,
    wanted: _Wanted,
    value: NDArray[np.float64],
    main: bool,
    limit: int | None,
    resident: NDArray[np.bool_] | None,
) -> Plan:
    """Which planes this wish's plan keeps in memory: its own first if it is the main one."""
    sizes = mix.plane_bytes
    needed = int((sizes * wanted.planes).sum())
    ring_bytes = 0
    if limit is None or int(sizes[value > 0].sum()) <= limit:
        kept = value > 0
    else:
        largest = aligned(int((sizes * wanted.planes).sum(1).max()))
        ring_bytes = ring_bytes_for(limit, largest)
        whole = needed <= limit
        if 2 * largest > limit and not whole:
            smallest = smallest_for((sizes * wanted.planes).sum(1))
            raise BudgetTooSmallError(
                f"{limit} bytes are allowed for weights, {wish} needs {smallest}: allow more"
            )
        if whole and (main or 2 * largest > limit):
            ring_bytes = 0
            value = np.where(wanted.planes, 2.0, value)  # its own first
        kept = _most_valuable(sizes, value, limit - ring_bytes, resident)
        if not (wanted.planes & ~kept).any():
            ring_bytes = 0
    missing = wanted.planes & ~kept
    pinned: NDArray[np.bool_] = np.logical_and(wanted.planes.any(1), ~missing.any(1))
    streamed = int((sizes * missing).sum())
    weights = mix.problem.weights
    kept_bytes = int(sizes[kept].sum())
    bits = int((wanted.levels * weights).sum()) / int(weights.sum())
    rest = f", {format_size(streamed)} streamed" if streamed else ""
    masks = (kept << np.arange(len(PLANES))).sum(1).astype(np.uint8)
    return Plan(
        levels=wanted.levels,
        pinned=pinned,
        ring_bytes=ring_bytes,
        resident_bytes=kept_bytes + ring_bytes,
        streamed_bytes=streamed,
        bits_per_weight=bits,
        predicted_error=wanted.error,
        reason=f"{wish}: {format_size(needed - streamed)} pinned{rest}",
        kept=masks,
        region=wish.region,
    )


def _most_valuable(
    sizes: NDArray[np.int64],
    value: NDArray[np.float64],
    limit: int,
    resident: NDArray[np.bool_] | None,
) -> NDArray[np.bool_]:
    """(chunks, planes): planes of the highest value that fit in the limit."""
    kept = np.zeros(sizes.shape, np.bool_)
    left = limit
    for worth in np.unique(value[value > 0])[::-1]:
        group = value == worth
        chunks = np.flatnonzero(group.any(1))
        group_sizes = (sizes * group).sum(1)[chunks]
        total = int(group_sizes.sum())
        if total <= left:
            kept |= group
            left -= total
            continue
        stay = None if resident is None else resident[chunks]
        chosen = chunks[spread(group_sizes, left, stay)]
        kept[chosen] |= group[chosen]
        break
    return kept
