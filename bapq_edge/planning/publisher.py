"""The publisher: the store has one plan at a time, that of the run which begins next."""

from __future__ import annotations

import threading

import numpy as np
from numpy.typing import NDArray

from ..bank.boundary import Precision
from ..bank.reader import Bank
from ..engine.graph import Part
from ..engine.store import Run, Store
from .plan_set import PlanSet
from .planner import Plan

__all__ = ["Publisher", "register_regions"]


class Publisher:
    """Holds the plans of a session and publishes each as runs need it.

    Safe to use from several threads.
    """

    def __init__(self, store: Store) -> None:
        """There are no plans yet: `publish` comes before any run."""
        self._store = store
        self._plans: PlanSet | None = None
        self._published: Plan | None = None
        self._lock = threading.Lock()  # short: a run begins on the plan just published

    @property
    def plans(self) -> PlanSet | None:
        """The plans of the runs that begin now; None before the first."""
        return self._plans

    def publish(self, plans: PlanSet) -> None:
        """Take these for the runs that begin from now on.

        Raises UnknownLevelError where the store refuses the plan, and then keeps those before.
        """
        with self._lock:
            self._publish(plans.main_plan, plans.threads)
            self._plans = plans

    def begin_run(self, part: Part, precision: Precision | None) -> tuple[Run, float] | None:
        """Begin a run on the plan of a precision; it, and the bits per weight that it reads.

        None: there is no such plan, or no more.
        """
        with self._lock:
            plans = self._plans
            assert plans is not None, "a run came before the first plans"
            made = plans.by_precision.get(precision)
            if made is None:
                return None
            if made is not self._published:
                self._publish(made, plans.threads)
            return self._store.begin_run(measured=plans.measured), plans.bits(part, precision)

    def publish_main(self) -> None:
        """After a run's last pass: what only rare runs need gives its memory back at once."""
        with self._lock:
            plans = self._plans
            if plans is not None and plans.main_plan is not self._published:
                self._publish(plans.main_plan, plans.threads)

    def _publish(self, made: Plan, threads: int) -> None:
        self._store.publish(
            made.levels,
            made.pinned,
            made.ring_bytes,
            made.resident_bytes - made.ring_bytes,
            threads,
            kept=made.kept,
            region=made.region,
        )
        self._published = made


def register_regions(bank: Bank, store: Store) -> NDArray[np.bool_] | None:
    """Tell the store what stands in for rows that regions skip.

    What each skips is returned, (regions, chunks); None: no boundary model of the bank skips any.
    """
    models = [each.model for each in bank.manifest.boundary if each.model.skips]
    if not models:
        return None
    arrays = bank.boundary_arrays(models[0])
    for values in arrays["row_values"]:
        store.add_region(values)  # numbered as the regions are
    skipped: NDArray[np.bool_] = arrays["skipped"] > 0
    return skipped
