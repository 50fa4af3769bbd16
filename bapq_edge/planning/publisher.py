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
    """Publishes the plans of a set as runs need them. Safe to use from several threads."""

    def __init__(self, bank: Bank, store: Store, weights: NDArray[np.int64]) -> None:
        """`weights` (chunks,) are the numbers of weights; `adopt` comes before any run."""
        self._store, self._weights = store, weights
        split, layers = bank.manifest.split, bank.manifest.layers
        head_layers = split.head_layers if split else 0
        self._body_chunk = (
            layers[head_layers].first_chunk if head_layers < len(layers) else len(weights)
        )
        self._plans: PlanSet
        self._bits: dict[Precision | None, dict[Part, float]]
        self._published: Plan
        self._lock = threading.Lock()  # short: a run begins on the plan just published

    def adopt(self, plans: PlanSet) -> None:
        """Make these the plans of the runs that begin from now on."""
        bits = {key: self._bits_by_part(made) for key, made in plans.by_precision.items()}
        with self._lock:
            self._publish(plans.main_plan, plans.threads)
            self._plans, self._bits = plans, bits

    def begin(
        self, part: Part, precision: Precision | None, *, measured: bool
    ) -> tuple[Run, float]:
        """Begin a run on the plan of a precision; it, and the bits per weight that it reads."""
        with self._lock:
            made = self._plans.by_precision[precision]
            if made is not self._published:
                self._publish(made, self._plans.threads)
            return self._store.begin_run(measured=measured), self._bits[precision][part]

    def publish_main(self) -> None:
        """Go back to the main plan: what only rare runs need gives its memory back at once."""
        with self._lock:
            if self._published is not self._plans.main_plan:
                self._publish(self._plans.main_plan, self._plans.threads)

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

    def _bits_by_part(self, made: Plan) -> dict[Part, float]:
        """Bits per weight, all weights of the bank counted, that a run of each part reads."""
        weights, end = self._weights, self._body_chunk
        head = float((made.levels * weights)[:end].sum()) / float(weights.sum())
        return {"whole": made.bits_per_weight, "head": head, "body": made.bits_per_weight - head}


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
