"""Runs a bank's graph, or a half of it, at any precision: what the device computes, bit for bit."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from bapq_edge.bank.boundary import Precision
from bapq_edge.bank.layout import PLANES
from bapq_edge.bank.reader import Bank
from bapq_edge.engine.executor import execute
from bapq_edge.engine.graph import Graph, open_graph
from bapq_edge.engine.store import Store
from bapq_edge.planning.planner import Plan, Request, chunk_costs, plan

__all__ = ["Feed", "Runner", "Skip", "map_feeds"]

Feed = Mapping[str, NDArray[Any]]
T = TypeVar("T")

_ALL_PLANES = (1 << len(PLANES)) - 1


@dataclass(frozen=True, eq=False)
class Skip:
    """Chunks that are neither read nor computed."""

    chunks: NDArray[np.bool_]
    """Whether a chunk is skipped, (chunks,)."""
    region: int
    """Number by `Runner.add_region`: its values stand in for the skipped rows."""


def map_feeds(
    work: Callable[[Feed], T], feeds: Sequence[Feed], advance: Callable[..., None]
) -> list[T]:
    """The results of `work` for every feed, on one thread per usable core."""
    results: list[T] = []
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for result in pool.map(work, feeds):
            results.append(result)
            advance()
    return results


class Runner:
    """The bank's chunks, all in memory, and the graphs that ran on them; `close` frees them."""

    def __init__(self, bank: Bank) -> None:
        self._bank = bank
        self._costs = chunk_costs(bank)
        self._store = Store(bank)
        self._graphs: dict[bytes, Graph] = {}

    def close(self) -> None:
        """Give the memory back."""
        self._graphs.clear()
        self._store.close()

    def plan(self, precision: Precision) -> Plan:
        """The device's plan for the precision where memory is no limit.

        Raises UnknownLevelError, RequestError.
        """
        level = "auto" if precision.level is None else precision.level
        return plan(self._costs, Request(level=level, bits=precision.bits))

    def bits(self, precision: Precision, layers: slice = slice(None)) -> float:
        """Nominal bits of the chunks of some layers, per weight of the whole bank."""
        weights = np.zeros(len(self._costs.weights))
        for layer in self._bank.manifest.layers[layers]:
            weights[layer.chunk_range] = self._costs.weights[layer.chunk_range]
        return float(self.plan(precision).levels @ weights / self._costs.weights.sum())

    def add_region(self, values: NDArray[np.float32]) -> int:
        """Register what stands in for skipped rows: see `Store.add_region`."""
        return self._store.add_region(values)

    def run(
        self,
        graph: bytes,
        precision: Precision,
        outputs: Sequence[str],
        feeds: Sequence[Feed],
        keep: Callable[[list[NDArray[Any]]], T],
        advance: Callable[..., None] = lambda: None,
        skip: Skip | None = None,
    ) -> list[T]:
        """What `keep` makes of the outputs of one run per feed; a feed may hold more than is read.

        Raises ExecutionError where the graph fails, BankIntegrityError and its like where the
        weights cannot be read.
        """
        if graph not in self._graphs:
            opened = open_graph(graph, self._store, threads=1)
            self._graphs[graph] = Graph(opened, str(self._bank.path))
        opened = self._graphs[graph]
        chosen = self.plan(precision)
        levels, region = chosen.levels, None
        if skip is not None:
            levels, region = np.where(skip.chunks, 0, levels), skip.region
        # What one region skips another one reads.
        kept = np.full(len(levels), _ALL_PLANES, np.uint8)
        self._store.publish(
            levels, chosen.pinned, chosen.ring_bytes, None, threads=1, kept=kept, region=region
        )

        def once(feed: Feed) -> T:
            found, report = execute(self._store, opened, feed, outputs)
            if report is not None and report.degraded_by is not None:
                raise report.degraded_by  # its answer is not that of the precision
            return keep([found[name] for name in outputs])

        return map_feeds(once, feeds, advance)
