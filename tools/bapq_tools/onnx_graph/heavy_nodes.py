"""Recognises the weight-heavy nodes, and brings their weights into one matrix form."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx
from onnx import TensorProto

from bapq_edge.errors import ModelError, UnsupportedModelError

from . import graphs, recurrent_node
from .ir import AutoPad, ConvGeometry, Operator
from .recurrent_node import GATES

MIN_WEIGHTS = 1024
"""A layer with fewer saves less than its chunk table, scales and operator call cost."""

MIN_DEPTHWISE_WEIGHTS = 256
"""A depthwise layer saves few bytes but many instructions: its weights meet every pixel."""


@dataclass(frozen=True)
class HeavyNode:
    """A node that a chunk operator can replace."""

    operator: Operator
    activation_input: str
    weight_name: str
    weight: np.ndarray
    """The matrix form of the weight, (rows, columns) float32."""
    conv: ConvGeometry | None = None


@dataclass(frozen=True)
class Refusal:
    """The reason why a node with this many constant weights stays in float."""

    weights: int
    reason: str


QUANTIZED = "already quantized, in a form of its own"
"""The reason of nodes whose weights are integers that the import left as they are."""

_QUANTIZED_TYPES = frozenset(
    {
        "ConvInteger",
        "DequantizeLinear",
        "DynamicQuantizeLSTM",
        "DynamicQuantizeMatMul",
        "MatMulInteger",
        "MatMulIntegerToFloat",
        "MatMulNBits",
        "QAttention",
        "QEmbedLayerNormalization",
        "QGemm",
        "QLinearConv",
        "QLinearMatMul",
    }
)
"""Operators of the standard and of com.microsoft."""

_MICROSOFT_REASONS = {
    "Attention": "attention with rotary positions, part of a past or a mask of unknown rank",
    "EmbedLayerNormalization": "embeddings before opset 11",
}

_REASONS = {
    "ConvTranspose": "transposed convolution with output_shape, of open size with uneven strides, "
    "of 3 dimensions or before opset 11",
}

_WEIGHT_TYPES = frozenset(
    value
    for name, value in TensorProto.DataType.items()
    if name in ("DOUBLE", "INT8", "UINT8", "INT4", "UINT4", "INT2", "UINT2")
    or name.startswith(("FLOAT", "BFLOAT"))
)


_AUTO_PADS: dict[str, AutoPad] = {
    "NOTSET": "NOTSET",
    "VALID": "NOTSET",
    "SAME_UPPER": "SAME_UPPER",
    "SAME_LOWER": "SAME_LOWER",
}


def recognise(node: onnx.NodeProto, scope: graphs.Scope) -> HeavyNode | Refusal | None:
    """Tell whether the node is heavy, kept in float for a reason, or without weights (None).

    Raises:
        ModelError: the weights of a product hold NaN or infinity.
    """
    reader = _READERS.get(node.op_type) if graphs.is_standard(node) else None
    if reader is not None:
        found = reader(node, scope)
        if isinstance(found, HeavyNode):
            return _check(node, found)
        if found is not None:
            return found
    return _refuse_others(node, scope)


def _refuse_others(node: onnx.NodeProto, scope: graphs.Scope) -> Refusal | None:
    constants = [
        tensor
        for tensor in map(scope.constant, node.input)
        if tensor is not None and tensor.data_type in _WEIGHT_TYPES
    ]
    sizes = [graphs.tensor_size(tensor) for tensor in constants]
    sizes += [len(item.floats) for item in node.attribute]
    if max(sizes, default=0) < MIN_WEIGHTS:
        return None
    weights = sum(sizes)
    if node.op_type in _QUANTIZED_TYPES and node.domain in ("", "ai.onnx", "com.microsoft"):
        return Refusal(weights, QUANTIZED)
    if node.domain == "com.microsoft" and node.op_type in _MICROSOFT_REASONS:
        return Refusal(weights, _MICROSOFT_REASONS[node.op_type])
    if not graphs.is_standard(node):
        return Refusal(weights, f"operator of domain {node.domain}")
    if node.op_type in _READERS and TensorProto.DOUBLE in [t.data_type for t in constants]:
        return Refusal(weights, "its weights are float64")
    if node.op_type in GATES:
        return Refusal(weights, recurrent_node.refusal(node, scope))
    return Refusal(weights, _REASONS.get(node.op_type, f"no chunk operator for {node.op_type}"))


def _check(node: onnx.NodeProto, heavy: HeavyNode) -> HeavyNode | Refusal:
    fewest = MIN_DEPTHWISE_WEIGHTS if heavy.operator == "DepthwiseConv" else MIN_WEIGHTS
    if heavy.weight.size < fewest:
        return Refusal(heavy.weight.size, f"fewer than {fewest} weights")
    finite = np.isfinite(heavy.weight).all(axis=1)
    if finite.all():
        return heavy
    if heavy.operator == "Gather":  # a lookup table may hold -inf, for instance of a mask
        return Refusal(heavy.weight.size, "holds NaN or infinity")
    bad = np.flatnonzero(~finite)
    raise ModelError(
        f"weight {heavy.weight_name!r} of {heavy.operator} node {node.name or node.output[0]!r} "
        f"holds NaN or infinity in {bad.size} of {finite.size} rows, first in row {bad[0]}; "
        "train or export the model again"
    )


def _float_weight(node: onnx.NodeProto, index: int, scope: graphs.Scope) -> TensorProto | None:
    tensor = scope.constant(node.input[index])
    return tensor if tensor is not None and tensor.data_type == TensorProto.FLOAT else None


def _refuse(tensor: TensorProto, reason: str) -> Refusal:
    return Refusal(graphs.tensor_size(tensor), reason)


def _refuse_left(node: onnx.NodeProto, scope: graphs.Scope) -> Refusal | None:
    left = _float_weight(node, 0, scope)
    if left is None or graphs.tensor_size(left) < MIN_WEIGHTS:
        return None
    return _refuse(left, "the constant is the left factor")


def _matmul(node: onnx.NodeProto, scope: graphs.Scope) -> HeavyNode | Refusal | None:
    tensor = _float_weight(node, 1, scope)
    if tensor is None:
        return _refuse_left(node, scope)
    if len(tensor.dims) != 2:
        return _refuse(tensor, f"the constant has {len(tensor.dims)} dimensions, not 2")
    weight = np.ascontiguousarray(graphs.tensor_array(tensor).T)
    return HeavyNode("MatMul", node.input[0], tensor.name, weight)


def _gemm(node: onnx.NodeProto, scope: graphs.Scope) -> HeavyNode | Refusal | None:
    tensor = _float_weight(node, 1, scope)
    if tensor is None:
        return _refuse_left(node, scope)
    if graphs.attribute(node, "transA", 0):
        return _refuse(tensor, "the activation is transposed")
    weight = graphs.tensor_array(tensor)
    if not graphs.attribute(node, "transB", 0):
        weight = weight.T
    alpha = np.float32(graphs.attribute(node, "alpha", 1.0))
    if alpha != 1:
        weight = weight * alpha
    return HeavyNode("Gemm", node.input[0], tensor.name, np.ascontiguousarray(weight))


def _gather(node: onnx.NodeProto, scope: graphs.Scope) -> HeavyNode | Refusal | None:
    tensor = _float_weight(node, 0, scope)
    if tensor is None or len(tensor.dims) < 2:
        return None
    if len(tensor.dims) > 2 or graphs.attribute(node, "axis", 0) not in (0, -2):
        return _refuse(tensor, "looked up along another axis, by indices of unknown rank")
    return HeavyNode("Gather", node.input[1], tensor.name, graphs.tensor_array(tensor))


def _conv(node: onnx.NodeProto, scope: graphs.Scope) -> HeavyNode | Refusal | None:
    tensor = _float_weight(node, 1, scope)
    if tensor is None:
        return None
    dimensions = len(tensor.dims) - 2
    if dimensions not in (1, 2):
        return _refuse(tensor, f"{dimensions}-D convolution in groups or with SAME pads")
    group = graphs.attribute(node, "group", 1)
    if len(node.input) > 2 and node.input[2] and scope.constant(node.input[2]) is None:
        return _refuse(tensor, "its bias is computed")
    weight = graphs.tensor_array(tensor)
    if dimensions == 1:
        weight = weight[:, :, np.newaxis, :]
    kernel = weight.shape[2], weight.shape[3]
    geometry = _geometry(node, kernel, 1 if dimensions == 1 else 2, group)
    # (outputs, channels, y, x) to columns in the order (y, x, channel)
    matrix = np.ascontiguousarray(weight.transpose(0, 2, 3, 1)).reshape(len(weight), -1)
    operator: Operator = "DepthwiseConv" if group > 1 and tensor.dims[1] == 1 else "Conv"
    return HeavyNode(operator, node.input[0], tensor.name, matrix, geometry)


def _geometry(
    node: onnx.NodeProto, kernel: tuple[int, int], dimensions: Literal[1, 2], group: int
) -> ConvGeometry:
    strides = graphs.attribute(node, "strides") or [1] * dimensions
    dilations = graphs.attribute(node, "dilations") or [1] * dimensions
    pads = graphs.attribute(node, "pads") or [0] * (2 * dimensions)
    if dimensions == 1:
        strides, dilations = [1, *strides], [1, *dilations]
        pads = [0, pads[0], 0, pads[1]]
    name = graphs.attribute(node, "auto_pad", b"NOTSET").decode() or "NOTSET"
    if name != "NOTSET":
        pads = [0, 0, 0, 0]
    auto_pad = _AUTO_PADS.get(name)
    if auto_pad is None:
        raise UnsupportedModelError(
            f"Conv node {node.name or node.output[0]!r} has auto_pad {name!r}; "
            "ONNX knows NOTSET, VALID, SAME_UPPER and SAME_LOWER"
        )
    return ConvGeometry(
        kernel=kernel,
        strides=tuple(strides),
        pads=tuple(pads),
        dilations=tuple(dilations),
        group=group,
        auto_pad=auto_pad,
        dimensions=dimensions,
    )


_READERS: dict[str, Callable[[onnx.NodeProto, graphs.Scope], HeavyNode | Refusal | None]] = {
    "MatMul": _matmul,
    "Gemm": _gemm,
    "Conv": _conv,
    "Gather": _gather,
}
