"""The plans of a session: one for every precision that its runs may ask for, made together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from ..bank.boundary import Precision
from ..bank.reader import Bank
from ..engine.graph import Part
from .joint import JointCosts, plan_jointly, smallest_joint_limit
from .planner import ChunkCosts, Plan, Request, chunk_costs, plan, smallest_limit

__all__ = ["PlanMaker", "PlanSet"]


@dataclass(frozen=True, eq=False)
class PlanSet:
    """Plans that fit in memory together, and how they are to be run."""

    by_precision: Mapping[Precision | None, Plan]
    """A plan for every precision; without a policy one, under None."""
    main: Precision | None
    """What most runs are made at."""
    threads: int
    """Threads that one operator runs on."""
    overhead_bytes: int
    """Memory besides weights that the plans leave room for."""
    measured: bool
    """Whether runs tell what memory they needed: there is a budget."""
    minimal: bool
    """Whether the plans hold as little in memory as can be."""
    head_weights: NDArray[np.int64]
    """(chunks of the head,): number of weights of each."""
    weights: int
    """Number of weights of the whole bank."""
    over_budget: bool = False
    """Whether even these need more memory than the budget leaves."""

    @property
    def main_plan(self) -> Plan:
        """The plan of most runs."""
        return self.by_precision[self.main]

    def bits(self, part: Part, precision: Precision | None) -> float:
        """Bits per weight, all weights of the bank counted, that a run of the part reads."""
        made = self.by_precision[precision]
        if part == "whole":
            return made.bits_per_weight
        head = self._head_bits[precision]
        return head if part == "head" else made.bits_per_weight - head

    @cached_property
    def _head_bits(self) -> dict[Precision | None, float]:
        weights = self.head_weights
        return {
            precision: float((made.levels[: len(weights)] * weights).sum()) / self.weights
            for precision, made in self.by_precision.items()
        }

    def levels_differ(self, other: PlanSet) -> bool:
        """Whether runs would be made at other levels."""
        return any(
            not np.array_equal(made.levels, other.by_precision[precision].levels)
            for precision, made in self.by_precision.items()
        )

    def differs(self, other: PlanSet) -> bool:
        """Whether runs would be made otherwise: other levels, other planes in memory, threads."""
        return (
            self.threads != other.threads
            or self.levels_differ(other)
            or any(
                _places(made) != _places(other.by_precision[precision])
                for precision, made in self.by_precision.items()
            )
        )


def _places(made: Plan) -> tuple[bytes, bytes, int]:
    kept = b"" if made.kept is None else made.kept.tobytes()
    return made.pinned.tobytes(), kept, made.ring_bytes


class PlanMaker:
    """Makes the plans of one bank. Its methods are pure: they change nothing."""

    def __init__(
        self,
        bank: Bank,
        shares: Mapping[Precision, float] | None,
        skipped: NDArray[np.bool_] | None,
    ) -> None:
        """Read the bank's costs.

        `shares` gives the share of runs at each precision, as far as the policy tells; None: there
        is no policy. `skipped` (regions, chunks) is what regions skip.
        """
        self.costs: ChunkCosts = chunk_costs(bank)
        self._joint = None if shares is None else JointCosts.of(bank, self.costs, skipped)
        self._shares = shares or {}
        self.main = max(self._shares, key=self._shares.__getitem__, default=None)
        """What most runs are made at; None without a policy."""
        split = bank.manifest.split
        head = bank.manifest.layers[: split.head_layers if split else 0]
        self._head_weights = self.costs.weights[: head[-1].chunk_range.stop if head else 0]
        self.announced: tuple[Precision | None, ...] = tuple(self._shares) or (None,)
        """The precisions that are known from the start."""

    def smallest_limit(self, request: Request, precisions: Iterable[Precision | None]) -> int:
        """Smallest `weight_bytes_limit` at which the request, or every precision, can be met."""
        if self._joint is None:
            return smallest_limit(self.costs, request)
        return smallest_joint_limit(self._joint, self._shares_of(precisions), request)

    def make(
        self,
        request: Request,
        precisions: Iterable[Precision | None],
        resident: NDArray[np.bool_] | None,
        *,
        threads: int,
        overhead_bytes: int,
        measured: bool,
        minimal: bool,
    ) -> PlanSet:
        """Plans for a request, or for all precisions within its limits.

        `resident` (chunks,) are pinned now; the rest is what `PlanSet` tells of it. Raises what
        `planner.plan` raises.
        """
        by_precision: dict[Precision | None, Plan]
        if self._joint is None:
            by_precision = {None: plan(self.costs, request, resident)}
        else:
            shares = self._shares_of(precisions)
            by_precision = dict(plan_jointly(self._joint, shares, request, resident).items())
        return PlanSet(
            by_precision=by_precision,
            main=self.main,
            threads=threads,
            overhead_bytes=overhead_bytes,
            measured=measured,
            minimal=minimal,
            head_weights=self._head_weights,
            weights=int(self.costs.weights.sum()),
        )

    def _shares_of(self, precisions: Iterable[Precision | None]) -> dict[Precision, float]:
        return {
            precision: self._shares.get(precision, 0.0)
            for precision in precisions
            if precision is not None
        }
