"""The weights behind a layer in a bank's graph: how strongly each of its rows is read."""

from __future__ import annotations

import numpy as np
import onnx

from bapq_edge.bank.codes import dequantize, join_rows
from bapq_edge.bank.layer import Layer
from bapq_edge.bank.layout import PLANES_OF_LEVEL
from bapq_edge.bank.reader import Bank

from ..boundary.rewrite import output_rows
from ..onnx_graph import graphs
from ..onnx_graph.assemble import DOMAIN, reads_layer

__all__ = ["DownstreamWeights"]

_CHANNELWISE = (
    *("Relu", "Clip", "LeakyRelu", "PRelu", "Elu", "HardSigmoid", "HardSwish", "Sigmoid", "Tanh"),
    *("Gelu", "Erf", "Softplus", "Identity", "Dropout", "Add", "Sub", "Mul", "Div", "Max", "Min"),
    *("BatchNormalization", "MaxPool", "AveragePool", "GlobalMaxPool", "GlobalAveragePool"),
    *("ReduceMean", "ReduceMax", "Pad", "Resize", "Flatten", "Squeeze", "Unsqueeze", "Reshape"),
)
"""Operators behind which a channel is still that channel, or a run of as many values."""


class DownstreamWeights:
    """The weights of the products behind each tensor."""

    def __init__(self, bank: Bank, graph: onnx.GraphProto) -> None:
        self._bank = bank
        self._scope = graphs.Scope.of(graph, None)
        self._readers: dict[str, list[onnx.NodeProto]] = {}
        for node in graph.node:
            for name in dict.fromkeys(node.input):
                self._readers.setdefault(name, []).append(node)
        self._known: dict[str, np.ndarray | None] = {}

    def strength(self, tensor: str, channels: int) -> np.ndarray:
        """Sum of the squared weights that read each channel, (channels,) float64.

        It is all ones where no product is found whose columns the channels are.
        """
        total, found = np.zeros(channels), False
        pending, seen = [(tensor, np.ones(channels))], {tensor}
        while pending:
            name, factor = pending.pop()
            for node in self._readers.get(name, ()):
                squares = self._squares(node, name)
                each = None if squares is None else _per_channel(squares, channels)
                if each is not None:
                    total, found = total + factor * each, True
                    continue
                behind = self._filters(node, name, channels)
                if behind is None or node.output[0] in seen:
                    continue
                seen.add(node.output[0])
                pending.append((node.output[0], factor * behind))
        return total if found and total.any() else np.ones(channels)

    def _squares(self, node: onnx.NodeProto, name: str) -> np.ndarray | None:
        """Squares of a product's weights, summed per input channel; None where it is no product."""
        if node.input[0] != name:
            return None
        output = node.output[0]
        if output not in self._known:
            self._known[output] = self._sum(node)
        return self._known[output]

    def _sum(self, node: onnx.NodeProto) -> np.ndarray | None:
        if node.domain == DOMAIN and node.op_type == "DepthwiseConv":
            return None  # it is looked through: see `_filters`
        if reads_layer(node) and node.op_type != "Gather":
            layer = self._bank.manifest.layers[int(graphs.attribute(node, "layer", 0))]
            group = int(graphs.attribute(node, "group", 1))
            squares = self._squares_of_layer(layer, group)
            kernel = [int(graphs.attribute(node, f"kernel_{a}", 1)) for a in "hw"]
            return _summed(squares.reshape(group, np.prod(kernel), -1), 1)
        if not graphs.is_standard(node, "Conv", "Gemm", "MatMul"):
            return None
        tensor = self._scope.constant(node.input[1])
        if tensor is None:
            return None
        weight = np.square(graphs.tensor_array(tensor).astype(np.float64))
        if node.op_type == "Conv":
            group = int(graphs.attribute(node, "group", 1))
            if group > 1 and weight.shape[1] == 1:
                return None  # it is looked through: see `_filters`
            of_group = weight.reshape(group, -1, *weight.shape[1:])
            return _summed(of_group, 1, *range(3, of_group.ndim))
        if weight.ndim != 2:
            return None
        transposed = node.op_type == "Gemm" and graphs.attribute(node, "transB", 0)
        return _summed(weight, 0 if transposed else 1)

    def _squares_of_layer(self, layer: Layer, group: int) -> np.ndarray:
        """Sum the squares of a layer, (groups, columns), chunk by chunk, since it may be large."""
        level = layer.levels[0]
        rows = output_rows(self._bank, layer).astype(np.int64)
        squares = np.zeros((group, layer.columns))
        for chunk in range(layer.first_chunk, layer.first_chunk + layer.chunk_count):
            codes = join_rows([self._bank.chunk_codes(p, chunk) for p in PLANES_OF_LEVEL[level]])
            weight = dequantize(codes, level, layer.residual_steps, layer.scale_columns)
            mine = rows[layer.chunk_slice(chunk)] // (layer.rows // group)
            np.add.at(squares, mine, np.square(weight, dtype=np.float64))
        return squares

    def _filters(self, node: onnx.NodeProto, name: str, channels: int) -> np.ndarray | None:
        """Squared gain of a node that keeps channels apart, (channels,); None where it does not."""
        plain_pool = node.domain == DOMAIN and node.op_type == "MaxPool"
        if plain_pool or graphs.is_standard(node, *_CHANNELWISE):
            return np.ones(channels)
        if node.domain == DOMAIN and node.op_type == "DepthwiseConv" and node.input[0] == name:
            layer = self._bank.manifest.layers[int(graphs.attribute(node, "layer", 0))]
            if layer.rows != channels:
                return None
            return _summed(self._squares_of_layer(layer, channels), 1)
        if not graphs.is_standard(node, "Conv") or node.input[0] != name:
            return None
        tensor = self._scope.constant(node.input[1])
        if tensor is None or tuple(tensor.dims[:2]) != (channels, 1):
            return None
        weight = graphs.tensor_array(tensor).astype(np.float64)
        return _summed(np.square(weight).reshape(channels, -1), 1)


def _per_channel(squares: np.ndarray, channels: int) -> np.ndarray | None:
    """Sum columns that are runs of values of a channel, as Flatten leaves them."""
    if len(squares) % channels:
        return None
    return _summed(squares.reshape(channels, -1), 1)


def _summed(values: np.ndarray, *axes: int) -> np.ndarray:
    """Sum over some axes; what is left is one row."""
    return np.asarray(values.sum(axes)).reshape(-1)
