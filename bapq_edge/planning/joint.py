"""Plans for several precisions at once: what a policy may ask for, planned together.

Every precision has a plan of its own; what they share stays in memory from one to the next. Planes
that most runs read are worth their memory; planes that only rare regions need are streamed when
those come. Pure functions of numbers, as the planner is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ..bank.boundary import Precision
from ..bank.layout import PLANES, PLANES_OF_LEVEL
from ..bank.reader import Bank
from ..errors import BudgetTooSmallError, RequestError
from ..units import format_size
from .costs import ChunkCosts, Request
from .placing import aligned, pin_evenly, ring_bytes_for, smallest_for
from .planner import Plan, columns_for

__all__ = ["JointCosts", "plan_jointly", "smallest_joint_limit"]

_MAIN_SHARE = 0.5
"""A precision of so many runs is held whole; a rarer one streams what it does not share."""


@dataclass(frozen=True, eq=False)
class JointCosts:
    """What a bank offers, plane by plane."""

    costs: ChunkCosts
    plane_bytes: NDArray[np.int64]
    """(chunks, planes): bytes of each, in the order of `PLANES`."""
    skipped: NDArray[np.bool_] | None = None
    """(regions, chunks): what `Precision.region` skips; None: no region skips anything."""

    @classmethod
    def of(
        cls, bank: Bank, costs: ChunkCosts, skipped: NDArray[np.bool_] | None = None
    ) -> JointCosts:
        """The view of an open bank."""
        sizes = np.zeros((len(costs.weights), len(PLANES)), np.int64)
        for number, plane in enumerate(PLANES):
            if plane in bank.planes:
                sizes[:, number] = bank.chunks(plane)["bytes"]
        return cls(costs, sizes, skipped)


@dataclass(frozen=True)
class _Wanted:
    """One precision, worked out."""

    levels: NDArray[np.uint8]
    """(chunks,): level of each; 0: skipped."""
    planes: NDArray[np.bool_]
    """(chunks, planes): what is read and could be in memory."""
    error: float
    """Squared relative error of the outputs."""


def smallest_joint_limit(
    joint: JointCosts, precisions: Mapping[Precision, float], request: Request
) -> int:
    """Smallest `weight_bytes_limit` that every precision can be met at."""
    return max(
        smallest_for((joint.plane_bytes * _wanted(joint, precision, request).planes).sum(1))
        for precision in precisions
    )


def plan_jointly(
    joint: JointCosts,
    precisions: Mapping[Precision, float],
    request: Request,
    resident: NDArray[np.bool_] | None = None,
) -> dict[Precision, Plan]:
    """A plan for every precision; `precisions` gives the share of runs that read it, 0 to 1.

    Of the request, `highest_level` and `weight_bytes_limit` hold for each of them. `resident`
    (chunks,) are chunks that are pinned now: as far as it costs nothing they stay.

    Raises what `planner.plan` raises.
    """
    wanted = {precision: _wanted(joint, precision, request) for precision in precisions}
    value = np.zeros(joint.plane_bytes.shape)
    for precision, share in precisions.items():
        value += share * wanted[precision].planes
    used = np.logical_or.reduce([each.planes for each in wanted.values()])
    # What is worth nothing is used all the same: by precisions whose share nobody knows.
    value = np.where(used, np.maximum(value, 1e-9), 0)
    limit = request.weight_bytes_limit
    return {
        precision: _keep_planes(
            joint, precision, each, value, precisions[precision] >= _MAIN_SHARE, limit, resident
        )
        for precision, each in wanted.items()
    }


def _wanted(joint: JointCosts, precision: Precision, request: Request) -> _Wanted:
    costs = joint.costs
    level = "auto" if precision.level is None else precision.level
    own = replace(request, level=level, bits=precision.bits, speeds=None)
    columns = columns_for(costs, own)
    rows = np.arange(len(columns))
    levels = costs.runs_at[rows, columns]
    error = costs.error_of(columns)
    if precision.region is not None and joint.skipped is not None:
        if not 0 <= precision.region < len(joint.skipped):
            raise RequestError(
                f"region {precision.region} is asked for, the bank's boundary models have regions "
                f"0 to {len(joint.skipped) - 1}"
            )
        levels = np.where(joint.skipped[precision.region], 0, levels).astype(np.uint8)
    planes = np.zeros(joint.plane_bytes.shape, np.bool_)
    for held, read in PLANES_OF_LEVEL.items():
        for plane in read:
            planes[:, list(PLANES).index(plane)] |= levels == held
    return _Wanted(levels, planes & ~costs.row_read[:, None], error)


def _keep_planes(
    joint: JointCosts,
    precision: Precision,
    wanted: _Wanted,
    value: NDArray[np.float64],
    main: bool,
    limit: int | None,
    resident: NDArray[np.bool_] | None,
) -> Plan:
    """Which planes this precision's plan keeps in memory: its own first if it is the main one."""
    sizes = joint.plane_bytes
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
                f"{limit} bytes are allowed for weights, {precision} needs {smallest}: allow more"
            )
        if whole and (main or 2 * largest > limit):
            ring_bytes = 0
            value = np.where(wanted.planes, 2.0, value)  # its own first
        if joint.costs.looped is not None:  # a run would read them in every turn of the loop
            value = value + 2.0 * ((value > 0) & joint.costs.looped[:, None])
        kept = _most_valuable(sizes, value, limit - ring_bytes, resident)
        if not (wanted.planes & ~kept).any():
            ring_bytes = 0
    missing = wanted.planes & ~kept
    pinned: NDArray[np.bool_] = np.logical_and(wanted.planes.any(1), ~missing.any(1))
    streamed = int((sizes * missing).sum())
    weights = joint.costs.weights
    kept_bytes = int(sizes[kept].sum())
    bits = int((wanted.levels * weights).sum()) / int(weights.sum())
    others = f", {format_size(streamed)} streamed" if streamed else ""
    masks = (kept << np.arange(len(PLANES))).sum(1).astype(np.uint8)
    return Plan(
        levels=wanted.levels,
        pinned=pinned,
        ring_bytes=ring_bytes,
        resident_bytes=kept_bytes + ring_bytes,
        streamed_bytes=streamed,
        bits_per_weight=bits,
        predicted_error=wanted.error,
        reason=f"{precision}: {format_size(needed - streamed)} pinned{others}",
        kept=masks,
        region=precision.region,
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
        chosen = chunks[pin_evenly(group_sizes, left, stay)]
        kept[chosen] |= group[chosen]
        break
    return kept
