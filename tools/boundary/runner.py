"""Runs a bank's graph, or a half of it, at any wish: what the device computes, bit for bit."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from bapq_edge.bank.boundary import Wish
from bapq_edge.bank.reader import Bank
from bapq_edge.engine.graph import RUN_INPUT, open_graph
from bapq_edge.engine.native import Store
from bapq_edge.errors import ExecutionError
from bapq_edge.planner import Plan, Request, plan, problem_of

__all__ = ["Feed", "Runner", "spread"]

Feed = Mapping[str, NDArray[Any]]
T = TypeVar("T")


def spread(
    work: Callable[[Feed], T], feeds: Sequence[Feed], advance: Callable[..., None]
) -> list[T]:
    """`work` of every feed, on one thread per usable core."""
    results: list[T] = []
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for result in pool.map(work, feeds):
            results.append(result)
            advance()
    return results


class Runner:
    """Context manager: the bank's chunks, all in memory, and the graphs that ran on them."""

    def __init__(self, bank: Bank) -> None:
        self._bank = bank
        self._problem = problem_of(bank)
        self._store = Store(bank)
        self._graphs: dict[bytes, Any] = {}

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, *exception: object) -> None:
        self._graphs.clear()
        self._store.close()

    def plan(self, wish: Wish) -> Plan:
        """The device's plan for the wish where memory is no limit.

        Raises UnknownLevelError, RequestError.
        """
        level = "auto" if wish.level is None else wish.level
        return plan(self._problem, Request(level=level, bits=wish.bits))

    def bits(self, wish: Wish, layers: slice = slice(None)) -> float:
        """Nominal bits of the chunks of some layers, per weight of the whole bank."""
        weights = np.zeros(len(self._problem.weights))
        for layer in self._bank.manifest.layers[layers]:
            weights[layer.chunk_range] = self._problem.weights[layer.chunk_range]
        return float(self.plan(wish).levels @ weights / self._problem.weights.sum())

    def run(
        self,
        graph: bytes,
        wish: Wish,
        outputs: Sequence[str],
        feeds: Iterable[Feed],
        advance: Callable[..., None],
    ) -> list[list[NDArray[Any]]]:
        """The outputs of one run per feed.

        Raises ExecutionError where the graph fails, BankIntegrityError and its like where the
        weights cannot be read.
        """
        if graph not in self._graphs:
            self._graphs[graph] = open_graph(graph, threads=1)
        session = self._graphs[graph]
        chosen = self.plan(wish)
        self._store.publish(chosen.levels, chosen.pinned, chosen.ring_bytes, None, threads=1)
        return spread(lambda feed: self._once(session, outputs, feed), list(feeds), advance)

    def _once(self, session: Any, outputs: Sequence[str], feed: Feed) -> list[NDArray[Any]]:
        ticket = self._store.begin_run()
        failure: Exception | None = None
        found: list[NDArray[Any]] = []
        try:
            found = session.run(outputs, {**feed, RUN_INPUT: np.array(ticket, dtype=np.int64)})
        except Exception as error:  # ONNX Runtime raises classes of its own, without a common base
            failure = error
        finally:
            report = self._store.end_run(ticket)
        if failure is not None:
            reason = str(failure).splitlines()[0]
            raise ExecutionError(f"{self._bank.path}: ONNX Runtime: {reason}") from failure
        if report.degraded_by is not None:  # its answer is not that of the wish
            raise report.degraded_by
        return found
