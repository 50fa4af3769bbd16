"""The plans of a session: made together, published one at a time, as runs need them."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from .bank.boundary import Wish
from .bank.reader import Bank
from .engine.graph import Part
from .engine.native import Store
from .mix import MixProblem, plan_mix, smallest_mix_limit
from .pilot import Pilot
from .planner import Plan, Problem, Request, plan, problem_of, smallest_limit

__all__ = ["Plans"]


class Plans:
    """One plan for every wish of a policy; without a policy one, under None.

    `begin` is safe to call from several threads, and beside any other method.
    """

    def __init__(self, bank: Bank, store: Store, pilot: Pilot | None) -> None:
        """Nothing is planned or published yet."""
        self.problem: Problem = problem_of(bank)
        self._bank, self._store, self._pilot = bank, store, pilot
        self._by_wish: dict[Wish | None, Plan] = {}
        self._bits: dict[Wish | None, dict[Part, float]] = {}
        self._published: Wish | None = None
        self._threads = 1
        self._publishing = threading.Lock()  # short: a run begins on the plan just published
        self._mix_problem = MixProblem.of(bank, self.problem)

    def add_regions(self) -> None:
        """Tell the store what stands in for rows that a wish skips."""
        models = [each.model for each in self._bank.manifest.boundary if each.model.skips]
        if self._pilot is None or not models:
            return
        arrays = self._bank.boundary_arrays(models[0])
        for values in arrays["row_values"]:
            self._store.add_region(values)  # numbered as the regions are
        self._mix_problem = replace(self._mix_problem, skipped=arrays["skipped"] > 0)

    @property
    def main(self) -> Wish | None:
        """What most runs are made at."""
        return None if self._pilot is None else self._pilot.main

    @property
    def by_wish(self) -> Mapping[Wish | None, Plan]:
        """All plans."""
        return self._by_wish

    @property
    def current(self) -> Plan | None:
        """Its plan."""
        return self._by_wish.get(self.main)

    def __contains__(self, wish: Wish | None) -> bool:
        """Whether there is a plan for the wish."""
        return wish in self._by_wish

    def smallest_limit(self, request: Request) -> int:
        """Smallest `weight_bytes_limit` at which the request, or every wish, can be met."""
        if self._pilot is None:
            return smallest_limit(self.problem, request)
        return smallest_mix_limit(self._mix_problem, self._pilot.mix, request)

    def make(self, request: Request) -> dict[Wish | None, Plan]:
        """Plans for a request, or for all wishes within its limits; publishes nothing.

        Raises what `planner.plan` raises.
        """
        resident = None if self.current is None else self.current.pinned
        if self._pilot is None:
            return {None: plan(self.problem, request, resident)}
        made = plan_mix(self._mix_problem, self._pilot.mix, request, resident)
        return dict(made.items())

    def adopt(self, plans: dict[Wish | None, Plan], threads: int) -> None:
        """Make these the plans of the runs that begin from now on."""
        bits = {wish: self._bits_by_part(each) for wish, each in plans.items()}
        with self._publishing:
            previous = self._by_wish, self._bits, self._threads
            self._by_wish, self._bits, self._threads = plans, bits, threads
            try:
                self._publish(self.main)
            except BaseException:
                self._by_wish, self._bits, self._threads = previous
                raise

    def begin(self, part: Part, wish: Wish | None) -> tuple[int, float]:
        """Ticket of a run on the plan of a wish, and the bits per weight that it reads."""
        with self._publishing:
            if wish != self._published:
                self._publish(wish)
            return self._store.begin_run(), self._bits[wish][part]

    def rest(self) -> None:
        """Go back to the main plan: what only rare runs need gives its memory back at once."""
        with self._publishing:
            if self._published != self.main:
                self._publish(self.main)

    def levels_differ(self, plans: Mapping[Wish | None, Plan]) -> bool:
        """Whether runs would be made at other levels."""
        own = self._by_wish
        return any(not np.array_equal(plans[w].levels, own[w].levels) for w in plans)

    def places_differ(self, plans: Mapping[Wish | None, Plan]) -> bool:
        """Whether other planes would be in memory."""
        return any(_places(plans[wish]) != _places(self._by_wish[wish]) for wish in plans)

    def _publish(self, wish: Wish | None) -> None:
        new = self._by_wish[wish]
        self._store.publish(
            new.levels,
            new.pinned,
            new.ring_bytes,
            new.resident_bytes - new.ring_bytes,
            self._threads,
            kept=new.kept,
            region=new.region,
        )
        self._published = wish

    def _bits_by_part(self, made: Plan) -> dict[Part, float]:
        """Bits per weight, all weights of the bank counted, that a run of each part reads."""
        split, layers = self._bank.manifest.split, self._bank.manifest.layers
        head = split.head_layers if split else 0
        first = layers[head].first_chunk if head < len(layers) else len(made.levels)
        weights = self.problem.weights
        bits = float((made.levels * weights)[:first].sum()) / float(weights.sum())
        return {"whole": made.bits_per_weight, "head": bits, "body": made.bits_per_weight - bits}


def _places(made: Plan) -> tuple[bytes, bytes, int]:
    kept = b"" if made.kept is None else made.kept.tobytes()
    return made.pinned.tobytes(), kept, made.ring_bytes
