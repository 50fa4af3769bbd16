"""Measures what each row of a layer contributes in each region: its mean, and the mean's cost.

Both are measured on the bank itself, at the precision that is asked for: behind the clip, where
the next layer reads; or before the sum with another tensor, which a skipped row does not lose. A
mean of clipped values passes the clip unchanged, and of all constants it is the one with the
smallest squared error.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from bapq_edge.bank.boundary import Precision
from bapq_edge.bank.layer import Layer
from bapq_edge.bank.reader import Bank

from ..boundary.runner import Feed, Runner
from ..onnx_graph import graphs
from ..onnx_graph.assemble import reads_layer, split_residuals
from .downstream_weights import DownstreamWeights

__all__ = ["Contribution", "contributions"]

_BLOCK_SAMPLES = 32
"""Number of runs whose sums are in memory at a time."""


@dataclass(frozen=True)
class Contribution:
    """The contribution of the output rows of one layer."""

    mean: NDArray[np.float32]
    """Mean of the output over samples and positions, (regions, rows)."""
    cost: NDArray[np.float64]
    """Variance of the output times the squared weights that read the row, (regions, rows).

    It is the squared error, up to a factor of the layer, that the mean leaves in place of the row.
    """


def contributions(
    bank: Bank,
    precision: Precision,
    feeds: Sequence[Feed],
    regions: NDArray[np.intp],
    count: int,
    advance: Callable[[], None] = lambda: None,
) -> dict[str, Contribution]:
    """Measure the contributions of the rows by the layer's name, in regions 0 to `count` - 1.

    `regions`, (n,), is the region of each feed. Layers are left out whose rows cannot easily be
    skipped: those that a Gather reads, that several operators read, that stand in a body of the
    graph, or whose output is one of the model's. A region without samples gives zeros.
    """
    model = onnx.load_from_string(bank.graph_bytes())
    split_residuals(model.graph)
    observed = list(_observed(bank, model.graph))
    visible = onnx.ModelProto()
    visible.CopyFrom(model)
    visible.graph.output.extend(onnx.ValueInfoProto(name=node.output[0]) for _, node in observed)
    outputs = [node.output[0] for _, node in observed]
    graph = visible.SerializeToString()
    sums = [np.zeros((3, count, layer.rows)) for layer, _ in observed]

    def keep(values: list[NDArray[Any]]) -> list[NDArray[np.float64]]:
        return [_row_sums(node, v) for (_, node), v in zip(observed, values, strict=True)]

    with contextlib.closing(Runner(bank)) as runner:
        for start in range(0, len(feeds), _BLOCK_SAMPLES) if observed else ():
            block = slice(start, start + _BLOCK_SAMPLES)
            found = runner.run(graph, precision, outputs, feeds[block], keep, advance)
            for region, added in zip(regions[block], found, strict=True):
                for total, each in zip(sums, added, strict=True):
                    total[:, region] += each
    weights = DownstreamWeights(bank, model.graph)
    result = {}
    for (layer, node), (seen, total, squares) in zip(observed, sums, strict=True):
        mean = total / np.maximum(seen, 1)
        variance = np.maximum(squares / np.maximum(seen, 1) - mean**2, 0)
        cost = variance * weights.strength(node.output[0], layer.rows)
        result[layer.name] = Contribution(mean.astype(np.float32), cost)
    return result


def _observed(bank: Bank, graph: onnx.GraphProto) -> Iterator[tuple[Layer, onnx.NodeProto]]:
    """The layers whose rows may be skipped, and the node that reads each."""
    nodes: dict[int, list[onnx.NodeProto]] = {}
    outside = {node.output[0] for node in graph.node}
    for part in graphs.walk(graph):
        for node in part.node:
            if reads_layer(node):
                nodes.setdefault(int(graphs.attribute(node, "layer")), []).append(node)
    answers = {item.name for item in graph.output}
    for index, layer in enumerate(bank.manifest.layers):
        uses = nodes.get(index, [])
        if "Gather" in layer.operators or len(uses) != 1:
            continue
        output = uses[0].output[0]
        if output in outside and output not in answers:
            yield layer, uses[0]


def _row_sums(node: onnx.NodeProto, value: NDArray[np.float32]) -> NDArray[np.float64]:
    """Number, sum and sum of squares of the values of each row, (3, rows)."""
    value = np.moveaxis(value, 1, -1) if node.op_type in ("Conv", "DepthwiseConv") else value
    rows = value.reshape(-1, value.shape[-1]).astype(np.float64)
    return np.stack([np.full(rows.shape[1], len(rows)), rows.sum(0), np.square(rows).sum(0)])
