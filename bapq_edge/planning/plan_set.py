"""The plans of a session: made together, published one at a time, as runs need them."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from ..adaptive.policy_runner import PolicyRunner
from ..bank.boundary import Precision
from ..bank.reader import Bank
from ..engine.graph import Part
from ..engine.native import Store
from .joint import JointCosts, plan_jointly, smallest_joint_limit
from .planner import ChunkCosts, Plan, Request, chunk_costs, plan, smallest_limit

__all__ = ["PlanSet"]


class PlanSet:
    """One plan for every precision of a policy; without a policy one, under None.

    `begin` is safe to call from several threads, and beside any other method.
    """

    def __init__(self, bank: Bank, store: Store, runner: PolicyRunner | None) -> None:
        """Nothing is planned or published yet."""
        self.costs: ChunkCosts = chunk_costs(bank)
        self._bank, self._store, self._runner = bank, store, runner
        self._by_precision: dict[Precision | None, Plan] = {}
        self._bits: dict[Precision | None, dict[Part, float]] = {}
        self._published: Precision | None = None
        self._threads = 1
        self._publishing = threading.Lock()  # short: a run begins on the plan just published
        self._joint_costs = JointCosts.of(bank, self.costs)

    def add_regions(self) -> None:
        """Tell the store what stands in for rows that a precision skips."""
        models = [each.model for each in self._bank.manifest.boundary if each.model.skips]
        if self._runner is None or not models:
            return
        arrays = self._bank.boundary_arrays(models[0])
        for values in arrays["row_values"]:
            self._store.add_region(values)  # numbered as the regions are
        self._joint_costs = replace(self._joint_costs, skipped=arrays["skipped"] > 0)

    @property
    def main(self) -> Precision | None:
        """What most runs are made at."""
        return None if self._runner is None else self._runner.main

    @property
    def by_precision(self) -> Mapping[Precision | None, Plan]:
        """All plans."""
        return self._by_precision

    @property
    def current(self) -> Plan | None:
        """Its plan."""
        return self._by_precision.get(self.main)

    def __contains__(self, precision: Precision | None) -> bool:
        """Whether there is a plan for the precision."""
        return precision in self._by_precision

    def smallest_limit(self, request: Request) -> int:
        """Smallest `weight_bytes_limit` at which the request, or every precision, can be met."""
        if self._runner is None:
            return smallest_limit(self.costs, request)
        return smallest_joint_limit(self._joint_costs, self._runner.shares, request)

    def make(self, request: Request) -> dict[Precision | None, Plan]:
        """Plans for a request, or for all precisions within its limits; publishes nothing.

        Raises what `planner.plan` raises.
        """
        resident = None if self.current is None else self.current.pinned
        if self._runner is None:
            return {None: plan(self.costs, request, resident)}
        made = plan_jointly(self._joint_costs, self._runner.shares, request, resident)
        return dict(made.items())

    def adopt(self, plans: dict[Precision | None, Plan], threads: int) -> None:
        """Make these the plans of the runs that begin from now on."""
        bits = {precision: self._bits_by_part(each) for precision, each in plans.items()}
        with self._publishing:
            previous = self._by_precision, self._bits, self._threads
            self._by_precision, self._bits, self._threads = plans, bits, threads
            try:
                self._publish(self.main)
            except BaseException:
                self._by_precision, self._bits, self._threads = previous
                raise

    def begin(self, part: Part, precision: Precision | None) -> tuple[int, float]:
        """Ticket of a run on the plan of a precision, and the bits per weight that it reads."""
        with self._publishing:
            if precision != self._published:
                self._publish(precision)
            return self._store.begin_run(), self._bits[precision][part]

    def rest(self) -> None:
        """Go back to the main plan: what only rare runs need gives its memory back at once."""
        with self._publishing:
            if self._published != self.main:
                self._publish(self.main)

    def levels_differ(self, plans: Mapping[Precision | None, Plan]) -> bool:
        """Whether runs would be made at other levels."""
        own = self._by_precision
        return any(not np.array_equal(plans[w].levels, own[w].levels) for w in plans)

    def places_differ(self, plans: Mapping[Precision | None, Plan]) -> bool:
        """Whether other planes would be in memory."""
        return any(
            _places(plans[precision]) != _places(self._by_precision[precision])
            for precision in plans
        )

    def _publish(self, precision: Precision | None) -> None:
        new = self._by_precision[precision]
        self._store.publish(
            new.levels,
            new.pinned,
            new.ring_bytes,
            new.resident_bytes - new.ring_bytes,
            self._threads,
            kept=new.kept,
            region=new.region,
        )
        self._published = precision

    def _bits_by_part(self, made: Plan) -> dict[Part, float]:
        """Bits per weight, all weights of the bank counted, that a run of each part reads."""
        split, layers = self._bank.manifest.split, self._bank.manifest.layers
        head = split.head_layers if split else 0
        first = layers[head].first_chunk if head < len(layers) else len(made.levels)
        weights = self.costs.weights
        bits = float((made.levels * weights)[:first].sum()) / float(weights.sum())
        return {"whole": made.bits_per_weight, "head": bits, "body": made.bits_per_weight - bits}


def _places(made: Plan) -> tuple[bytes, bytes, int]:
    kept = b"" if made.kept is None else made.kept.tobytes()
    return made.pinned.tobytes(), kept, made.ring_bytes
