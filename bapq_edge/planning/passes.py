"""Passes: a part of the graph, run once at a precision, and what follows from how it went."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..bank.boundary import Precision
from ..engine.cut_off import cut_off
from ..engine.executor import execute
from ..engine.feeds import check_max_shapes, element_count, has_open_axes, zeros, zeros_bytes
from ..engine.graph import Graphs, Part
from ..engine.store import RunReport, Store
from ..errors import DegradedWarning, ExecutionError, RunInputError
from ..telemetry import warn_caller
from ..units import counted
from .ledger import MemoryLedger
from .publisher import Publisher
from .replanner import Replanner

__all__ = ["Passes"]

_WARM_UP_RUNS = 2
"""ONNX Runtime's arena takes its final size in the second."""


class Passes:
    """Runs the parts of a bank's graph, each on the plan of a precision. Thread-safe."""

    def __init__(
        self,
        store: Store,
        graphs: Graphs,
        publisher: Publisher,
        replanner: Replanner,
        ledger: MemoryLedger,
        *,
        max_shapes: Mapping[str, tuple[int, ...]] | None = None,
    ) -> None:
        """Take the parts of an open session; `max_shapes` are of the largest inputs to come.

        Raises RequestError where the model has no such inputs.
        """
        check_max_shapes(graphs.inputs, max_shapes)
        self._max_shapes = max_shapes or {}
        self._store, self._graphs = store, graphs
        self._publisher, self._replanner, self._ledger = publisher, replanner, ledger

    def run(
        self,
        part: Part,
        precision: Precision | None,
        feed: Mapping[str, Any],
        names: Sequence[str] | None,
        run_options: Any = None,
        *,
        until_s: float | None = None,
    ) -> tuple[dict[str, Any], float, bool]:
        """One pass; its outputs by name, all or those of `names`, the bits per weight that it
        read, and whether it is degraded: a lower level stood in for one that could not be read.

        Raises what `execute` raises, and TimeIsUpError where it is not done at `until_s` of
        time.perf_counter(). A degraded pass is an event and a DegradedWarning.
        """
        with cut_off(run_options, until_s) as options:
            outputs, bits, report = self._pass(part, precision, feed, names, options)
        if report is None:
            return outputs, bits, False
        if report.degraded_by is not None:
            chunks = counted(report.degraded_chunks, "chunk")
            reason = f"{chunks} ran at a lower level: {report.degraded_by}"
            self._replanner.record("degraded", reason)
            warn_caller(reason, DegradedWarning)
        self._replanner.settle(report)
        return outputs, bits, report.degraded_by is not None

    def warm_up(self) -> bool:
        """Run on zeros and measure what runs need besides weights.

        False when that is impossible. Raises BudgetTooSmallError where the inputs alone do not fit
        into the budget.
        """
        self._replanner.check_inputs(zeros_bytes(self._graphs.inputs, self._max_shapes))
        feed = zeros(self._graphs.inputs, self._max_shapes)
        if feed is None:
            return False  # strings, sequences
        self._ledger.is_heavier(element_count(feed))
        for _ in range(_WARM_UP_RUNS):
            values = dict(feed)
            self._store.take_times()  # only the last run counts
            try:
                for part in self._graphs.parts:
                    outputs, _, report = self._pass(part, self._replanner.main, values)
                    values |= outputs
                    if report is not None:
                        self._ledger.settle(report.rss_bytes, report.weight_bytes)
            except (RunInputError, ExecutionError):
                return False  # a model that zeros of the smallest shape do not fit
        open_inputs = [each for each in self._graphs.inputs if each.name not in self._max_shapes]
        self._ledger.is_measured = not has_open_axes(open_inputs)
        return True

    def _pass(
        self,
        part: Part,
        precision: Precision | None,
        feed: Mapping[str, Any],
        names: Sequence[str] | None = None,
        run_options: Any = None,
    ) -> tuple[dict[str, Any], float, RunReport | None]:
        graph, run, bits = self._graphs[part], None, 0.0
        if graph.takes_ticket:
            begun = None
            while begun is None:  # others may learn so many meanwhile that this one is forgotten
                self._replanner.learn(precision)
                begun = self._publisher.begin_run(part, precision)
            run, bits = begun
        outputs, report = execute(self._store, graph, feed, names, run_options, run=run)
        return outputs, bits, report
