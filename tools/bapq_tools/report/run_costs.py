"""What a run of a bank costs on any board: products of every layer, and memory besides weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from bapq_edge import Session
from bapq_edge.bank.layout import Level
from bapq_edge.bank.reader import Bank
from bapq_edge.commands.bench_row import Row, Subject
from bapq_edge.commands.feeds import FeedSource
from bapq_edge.engine.executor import execute
from bapq_edge.engine.graph import Graph, open_graph
from bapq_edge.engine.store import Store
from bapq_edge.planning.planner import Request, chunk_costs, smallest_limit

__all__ = ["RunCosts", "levels_shown", "measure_costs"]

_SHOWN = (8, 4, 2)


@dataclass(frozen=True, eq=False)
class RunCosts:
    """What one run needs, whatever it runs on."""

    products: NDArray[np.float64]
    """(layers,): multiply-adds of each; tables that are looked up have none."""
    peak_bytes: Mapping[Level, int]
    """Growth of a process's peak with all weights of the level in memory, as it was here."""
    least_peak_bytes: int
    """The same at the lowest of these levels with as few in memory as can be."""
    besides_bytes: int
    """The part of it that is no weights: ONNX Runtime, the graph, activations."""
    shapes: str
    """Shapes of the inputs, in words."""
    whole: bool
    """Whether all layers ran: those in a branch or a loop are not counted."""


def levels_shown(bank: Bank) -> list[Level]:
    """Levels 8, 4 and 2, or what the bank has instead."""
    return [level for level in bank.levels if level in _SHOWN] or [*bank.levels]


def measure_costs(
    bank: Bank, input_path: Path | None = None, shapes: Mapping[str, tuple[int, ...]] | None = None
) -> RunCosts:
    """Run the bank here on this input, zeros without one.

    Raises RunInputError, and what else a run raises.
    """
    levels = levels_shown(bank)
    source = FeedSource(input_path, shapes)
    with Session(bank.path, level=levels[0], threads=1) as session:
        feed = source.feed(session.get_inputs())
        with source.explained(session.get_inputs()):
            session.run(None, feed)
        store = session.internals.store
        products, whole = _products(bank, store, feed)
        row_cache_bytes = store.stats().row_cache_limit_bytes
    peaks: dict[Level, int] = {}
    besides = []
    for level in levels:
        peaks[level], weight_bytes = _peak(bank, level, None, input_path, shapes or {})
        besides.append(peaks[level] - weight_bytes)
    least_bytes = smallest_limit(chunk_costs(bank), Request(level=levels[-1])) + row_cache_bytes
    least_peak_bytes, _ = _peak(bank, levels[-1], least_bytes, input_path, shapes or {})
    told = ", ".join(f"{name} {[*np.shape(value)]}" for name, value in feed.items())
    return RunCosts(products, peaks, least_peak_bytes, max(besides), told, whole)


def _peak(
    bank: Bank,
    level: Level,
    weight_budget: int | None,
    input_path: Path | None,
    shapes: Mapping[str, tuple[int, ...]],
) -> tuple[int, int]:
    """(growth of the peak over two runs in a process of its own, bytes of weights in it)."""
    settings = {
        "level": level,
        "weight_budget": weight_budget,
        "memory_budget": None,
        "threads": 1,
    }
    row = Row(Subject(Path(bank.path), settings, 1, input_path, shapes), lambda warning: None)
    try:
        row.open()
        row.run()
        row.run()
        report = row.report()
    finally:
        row.close()
    return report["peak_growth_bytes"], report["weight_bytes"] - bank.manifest.graph.bytes


def _products(
    bank: Bank, store: Store, feed: Mapping[str, Any]
) -> tuple[NDArray[np.float64], bool]:
    """(layers,): multiply-adds of a run on the feed, from the sizes of the layers' outputs."""
    model = onnx.load_from_string(bank.graph_bytes())
    layer_of = dict(_outputs_of_layers(model))
    outputs = {value.name for value in model.graph.output}
    model.graph.output.extend(
        onnx.ValueInfoProto(name=name) for name in layer_of if name not in outputs
    )
    graph = Graph(open_graph(model.SerializeToString(), store, 1), str(bank.path))
    values, _ = execute(store, graph, feed, [*layer_of])
    layers = bank.manifest.layers
    products = np.zeros(len(layers))
    for name, number in layer_of.items():
        layer = layers[number]
        products[number] += values[name].size / layer.rows * layer.weights
    looked_up = {i for i, layer in enumerate(layers) if layer.operators == ("Gather",)}
    return products, {*layer_of.values()} | looked_up == {*range(len(layers))}


def _outputs_of_layers(model: onnx.ModelProto) -> Iterator[tuple[str, int]]:
    """Output and number of the layer, of every operator of ours that multiplies."""
    for node in model.graph.node:
        numbers = [attribute.i for attribute in node.attribute if attribute.name == "layer"]
        if node.domain and node.op_type != "Gather" and numbers:
            yield node.output[0], numbers[0]
