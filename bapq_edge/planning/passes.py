"""Passes: a part of the graph, run once at a precision, and what follows from how it went."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..bank.boundary import Precision
from ..engine.executor import execute
from ..engine.feeds import element_count, zeros
from ..engine.graph import Graphs, Part
from ..engine.store import Run, RunReport, Store
from ..errors import DegradedWarning, ExecutionError, RunInputError
from ..telemetry import warn_caller
from .ledger import MemoryLedger
from .replanner import Replanner

__all__ = ["Passes"]

_WARM_UP_RUNS = 2
"""ONNX Runtime's arena takes its final size in the second."""


class Passes:
    """Runs the parts of a bank's graph at the plans of a replanner. Thread-safe."""

    def __init__(
        self, store: Store, graphs: Graphs, replanner: Replanner, ledger: MemoryLedger
    ) -> None:
        """Take the parts of an open session."""
        self._store, self._graphs = store, graphs
        self._replanner, self._ledger = replanner, ledger

    def run(
        self,
        part: Part,
        precision: Precision | None,
        feed: Mapping[str, Any],
        names: Sequence[str] | None,
        run_options: Any = None,
    ) -> tuple[dict[str, Any], float]:
        """One pass; its outputs by name, all or those of `names`, and the bits per weight read.

        Raises what `execute` raises. Where a lower level stood in for one that could not be read,
        that is an event and a DegradedWarning.
        """
        outputs, bits, report = self._pass(part, precision, feed, names, run_options)
        if report is not None:
            if report.degraded_by is not None:
                reason = (
                    f"{report.degraded_chunks} chunks ran at a lower level: {report.degraded_by}"
                )
                self._replanner.record("degraded", reason)
                warn_caller(reason, DegradedWarning)
            self._replanner.settle(report)
        return outputs, bits

    def warm_up(self) -> bool:
        """Run on zeros and measure what runs need besides weights.

        False when that is impossible.
        """
        feed = zeros(self._graphs.inputs)
        if feed is None:
            return False  # strings, sequences
        self._ledger.is_heavier(element_count(feed))
        for _ in range(_WARM_UP_RUNS):
            values = dict(feed)
            try:
                for part in self._graphs.parts:
                    outputs, _, report = self._pass(part, self._replanner.main, values)
                    values |= outputs
                    if report is not None:
                        self._ledger.settle(report.rss_bytes, report.weight_bytes)
            except (RunInputError, ExecutionError):
                return False  # a model that zeros of the smallest shape do not fit
        return True

    def _pass(
        self,
        part: Part,
        precision: Precision | None,
        feed: Mapping[str, Any],
        names: Sequence[str] | None = None,
        run_options: Any = None,
    ) -> tuple[dict[str, Any], float, RunReport | None]:
        bits = 0.0

        def begin() -> Run:
            nonlocal bits
            run, bits = self._replanner.begin(part, precision)
            return run

        graph = self._graphs[part]
        outputs, report = execute(self._store, graph, feed, names, run_options, begin=begin)
        return outputs, bits, report
