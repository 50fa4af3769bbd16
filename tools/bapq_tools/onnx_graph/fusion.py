"""Biases and activations that an operator can take over from the nodes around it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from . import graphs
from .functions import find_function
from .heavy_nodes import HeavyNode
from .ir import Activation, Function
from .neighbours import Neighbours

_FLOAT32_MAX = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class Bias:
    """A constant that is added to every output row of a layer."""

    values: np.ndarray
    """Shape (rows,), float32, finite."""
    initializer: str
    add: onnx.NodeProto | None
    """The Add node behind the layer; None when the bias is the node's own third input."""


@dataclass(frozen=True)
class Epilogue:
    """What an operator does behind the bias: a function, the sum with a tensor, a clip."""

    function: Function | None
    residual: str
    """The tensor, of the same shape; empty for none."""
    activation: Activation
    nodes: tuple[onnx.NodeProto, ...]
    """The nodes that this stands for, in order."""


def own_bias_input(node: onnx.NodeProto) -> str:
    """The third input of a Gemm or Conv; empty when there is none, or it counts nothing."""
    if node.op_type not in ("Gemm", "Conv") or len(node.input) < 3:
        return ""
    beta = graphs.attribute(node, "beta", 1.0) if node.op_type == "Gemm" else 1.0
    return node.input[2] if beta != 0 else ""


def find_bias(
    node: onnx.NodeProto, heavy: HeavyNode, output_rank: int | None, around: Neighbours
) -> Bias | None:
    """Find the bias that the operator can take over: the node's own, or that of an Add behind it.

    `output_rank` is None when unknown: then only a bias that cannot change the rank is taken.
    """
    rows = len(heavy.weight)
    name = own_bias_input(node)
    if name:
        values = _bias_values(name, around.scope, rows, channel_last=True, output_rank=2)
        if values is not None and node.op_type == "Gemm":
            values = values * np.float32(graphs.attribute(node, "beta", 1.0))
        return _finite(values, name, None)
    add = around.only_reader(node.output[0])
    if add is None or not graphs.is_standard(add, "Add"):
        return None
    name = add.input[1] if add.input[0] == node.output[0] else add.input[0]
    channel_last = heavy.conv is None
    values = _bias_values(name, around.scope, rows, channel_last, output_rank)
    return _finite(values, name, add)


def _bias_values(
    name: str, scope: graphs.Scope, rows: int, channel_last: bool, output_rank: int | None
) -> np.ndarray | None:
    """Read a constant, (rows,), that broadcasts along nothing but the channels; else None."""
    tensor = scope.constant(name)
    if tensor is None or tensor.data_type != TensorProto.FLOAT:
        return None
    shape = list(tensor.dims)
    if len(shape) > 1 and (output_rank is None or len(shape) > output_rank):
        return None
    # The rank of a Conv's output is always known.
    channels = [rows] if channel_last or output_rank is None else [rows] + [1] * (output_rank - 2)
    while len(shape) > len(channels) and shape[0] == 1:
        del shape[0]
    if shape != channels and graphs.tensor_size(tensor) != 1:
        return None
    return np.broadcast_to(graphs.tensor_array(tensor).reshape(-1), (rows,))


def _finite(values: np.ndarray | None, name: str, add: onnx.NodeProto | None) -> Bias | None:
    if values is None or not np.isfinite(values).all():
        return None
    return Bias(np.ascontiguousarray(values, np.float32), name, add)


def split_own_bias(
    graph: onnx.GraphProto, node: onnx.NodeProto, scope: graphs.Scope, opset: int, taken: set[str]
) -> None:
    """Move the third input of a Gemm or Conv into an Add behind the node, in place.

    That of a Conv is a constant (see heavy_nodes.py); that of a Gemm may be computed.
    """
    output, name = node.output[0], own_bias_input(node)
    product = node.output[0] = graphs.fresh_name(f"{output}_product", taken)
    behind = []
    if node.op_type == "Conv":
        space = [1] * (len(scope.initializer(node.input[1]).dims) - 2)
        values = graphs.tensor_array(scope.initializer(name)).reshape([-1, *space])
        name = graphs.fresh_name(f"{name}_channels", taken)
        graph.initializer.append(numpy_helper.from_array(values, name))
    elif (beta := graphs.attribute(node, "beta", 1.0)) != 1:
        factor, scaled = (graphs.fresh_name(f"{output}_{what}", taken) for what in ("beta", "bias"))
        graph.initializer.append(numpy_helper.from_array(np.array(beta, np.float32), factor))
        behind.append(helper.make_node("Mul", [name, factor], [scaled]))
        name = scaled
    behind.append(helper.make_node("Add", [product, name], [output]))
    _drop_own_bias(graph, node, opset, taken)
    position = next(i for i, other in enumerate(graph.node) if other is node)
    for offset, new in enumerate(behind, 1):
        graph.node.insert(position + offset, new)


def _drop_own_bias(
    graph: onnx.GraphProto, node: onnx.NodeProto, opset: int, taken: set[str]
) -> None:
    """Remove the third input; a Gemm before opset 11 must have one, so it gets a zero."""
    if node.op_type == "Gemm" and opset < 11:
        node.input[2] = graphs.fresh_name(f"{node.output[0]}_zero", taken)
        zero = numpy_helper.from_array(np.zeros(1, np.float32), node.input[2])
        graph.initializer.append(zero)
    else:
        del node.input[2:]


def find_epilogue(
    output: str, around: Neighbours, same_shape: Callable[[str, str], bool], only_clip: bool
) -> Epilogue:
    """Find what follows a product and its bias, and take over what an operator can.

    `same_shape` tells whether two tensors are known to have one shape.
    """
    nodes: list[onnx.NodeProto] = []
    function = None if only_clip else find_function(output, around)
    if function is not None:
        nodes += function[1]
        output = nodes[-1].output[0]
    residual = None if only_clip else _residual(output, around, same_shape)
    if residual is not None:
        nodes.append(residual[1])
        output = residual[1].output[0]
    activation, chain = _activation(output, around)
    around.take(nodes)
    return Epilogue(
        function=function and function[0],
        residual=residual[0] if residual else "",
        activation=activation,
        nodes=(*nodes, *chain),
    )


def _residual(
    output: str, around: Neighbours, same_shape: Callable[[str, str], bool]
) -> tuple[str, onnx.NodeProto] | None:
    """The computed tensor of the same shape that is added, and the node that does it."""
    add = around.only_reader(output)
    if add is None or not graphs.is_standard(add, "Add", "Sum") or around.is_taken(add):
        return None
    if len(add.input) != 2:
        return None
    other = add.input[1] if add.input[0] == output else add.input[0]
    if around.scope.constant(other) is not None or not same_shape(output, other):
        return None
    return other, add


def _activation(output: str, around: Neighbours) -> tuple[Activation, tuple[onnx.NodeProto, ...]]:
    """The clipping that a chain of Relu and Clip nodes behind a tensor amounts to."""
    activation, chain = Activation(), []
    while (node := around.only_reader(output)) is not None:
        bounds = _bounds(node, output, around.scope)
        if bounds is None:
            break
        activation = _compose(activation, bounds)
        chain.append(node)
        output = node.output[0]
    return activation, tuple(chain)


def _bounds(node: onnx.NodeProto, source: str, scope: graphs.Scope) -> Activation | None:
    if graphs.is_standard(node, "Relu"):
        return Activation(low=0.0)
    if not graphs.is_standard(node, "Clip") or node.input[0] != source:
        return None
    values = {"min": -_FLOAT32_MAX, "max": _FLOAT32_MAX}
    for index, name in enumerate(values, 1):
        if len(node.input) > index and node.input[index]:
            tensor = scope.constant(node.input[index])
            if tensor is None:
                return None
            values[name] = float(graphs.tensor_array(tensor).item())
        else:
            values[name] = float(graphs.attribute(node, name, values[name]))
    low, high = values.values()
    if np.isnan(low) or np.isnan(high):
        return None
    return Activation(
        low=low if low > -_FLOAT32_MAX else -float("inf"),
        high=high if high < _FLOAT32_MAX else float("inf"),
    )


def _compose(first: Activation, then: Activation) -> Activation:
    """Make one clipping that equals two in a row; where low > high, the result is high."""

    def apply(value: float) -> float:
        return min(max(value, then.low), then.high)

    return Activation(low=apply(min(first.low, first.high)), high=apply(first.high))
