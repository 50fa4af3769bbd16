"""QDQ models become float models: our own kernels quantize, so the pairs have done their work.

A DequantizeLinear of constants is computed here. A QuantizeLinear with a DequantizeLinear behind it
becomes a Clip to the range that its integers span: quantizers drop a Relu that this range implies,
so the range is part of the model's function. What fits neither form stays as it is.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from .. import graphs
from .integer_constants import dequantized

_DOMAINS = ("", "ai.onnx", "com.microsoft")

_INTEGER_RANGE: dict[int, tuple[int, int]] = {
    TensorProto.UINT8: (0, 255),
    TensorProto.INT8: (-128, 127),
    TensorProto.UINT16: (0, 65535),
    TensorProto.INT16: (-32768, 32767),
    TensorProto.UINT4: (0, 15),
    TensorProto.INT4: (-8, 7),
}


def resolve_quantization(model: onnx.ModelProto) -> None:
    """Replace dequantized constants by float32 initializers and Q/DQ pairs by Clip nodes."""
    opset = graphs.standard_opset(model)
    taken = graphs.names(model.graph)
    changed = _resolve(model.graph, None, opset, taken)
    if changed:
        graphs.remove_dead(model.graph)


def _resolve(
    graph: onnx.GraphProto, outer: graphs.Scope | None, opset: int, taken: set[str]
) -> bool:
    scope = graphs.Scope.of(graph, outer)
    outputs = {item.name for item in graph.output}
    quantizers = {n.output[0]: n for n in graph.node if _is(n, "QuantizeLinear")}
    changed = False
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        for body in graphs.bodies(node):
            changed |= _resolve(body, scope, opset, taken)
        replaced = False
        if _is(node, "DequantizeLinear"):
            source = quantizers.get(node.input[0])
            weight = scope.constant(node.input[0])
            if weight is not None and node.output[0] not in outputs:
                values = _dequantize(node, weight, scope)
                if values is not None:
                    graph.initializer.append(numpy_helper.from_array(values, node.output[0]))
                    replaced = True
            elif source is not None:
                bounds = _range(source, node, scope)
                if bounds is not None:
                    nodes.append(_clip(graph, source.input[0], node, bounds, opset, taken))
                    replaced = True
        if replaced:
            changed = True
        else:
            nodes.append(node)
    if changed:
        graphs.replace_nodes(graph, nodes)
    return changed


def _is(node: onnx.NodeProto, op_type: str) -> bool:
    return node.op_type == op_type and node.domain in _DOMAINS


def _constant(node: onnx.NodeProto, index: int, scope: graphs.Scope) -> np.ndarray | None:
    tensor = scope.constant(node.input[index])
    return None if tensor is None else graphs.tensor_array(tensor)


def _has_input(node: onnx.NodeProto, index: int) -> bool:
    return len(node.input) > index and node.input[index] != ""


def _dequantize(
    node: onnx.NodeProto, weight: onnx.TensorProto, scope: graphs.Scope
) -> np.ndarray | None:
    """Compute (quantized - zero point) * scale in float32; None when a part is computed."""
    scale = _constant(node, 1, scope)
    zero = _constant(node, 2, scope) if _has_input(node, 2) else np.int64(0)
    if scale is None or zero is None or scale.dtype != np.float32:
        return None
    axis = graphs.attribute(node, "axis", 1)
    block = graphs.attribute(node, "block_size", 0)
    return dequantized(graphs.tensor_array(weight), scale, np.asarray(zero), axis, block)


def _range(
    quantize: onnx.NodeProto, dequantize: onnx.NodeProto, scope: graphs.Scope
) -> tuple[np.float32, np.float32] | None:
    """The smallest and largest value that the pair lets through; None when it is no plain pair."""
    both: list[tuple[float, int]] = []
    for node in (quantize, dequantize):
        scale = _constant(node, 1, scope)
        zero = _constant(node, 2, scope) if _has_input(node, 2) else np.zeros((), np.uint8)
        if scale is None or zero is None or scale.size != 1 or scale.dtype != np.float32:
            return None
        both.append((scale.item(), int(zero.item())))
    if both[0] != both[1]:
        return None
    integers = _INTEGER_RANGE.get(_quantized_type(quantize, scope))
    if integers is None:
        return None
    step, origin = both[0]
    return np.float32((integers[0] - origin) * step), np.float32((integers[1] - origin) * step)


def _quantized_type(quantize: onnx.NodeProto, scope: graphs.Scope) -> int:
    if _has_input(quantize, 2):
        return scope.initializer(quantize.input[2]).data_type
    return int(graphs.attribute(quantize, "output_dtype", 0) or TensorProto.UINT8)


def _clip(
    graph: onnx.GraphProto,
    source: str,
    dequantize: onnx.NodeProto,
    bounds: tuple[np.float32, np.float32],
    opset: int,
    taken: set[str],
) -> onnx.NodeProto:
    """Make a Clip in place of the DequantizeLinear; its bounds are attributes before opset 11."""
    output = dequantize.output[0]
    if opset < 11:
        low, high = (float(bound) for bound in bounds)
        return helper.make_node("Clip", [source], [output], dequantize.name, min=low, max=high)
    inputs = [source]
    for bound, suffix in zip(bounds, ("min", "max"), strict=True):
        name = graphs.fresh_name(f"{output}_{suffix}", taken)
        graph.initializer.append(numpy_helper.from_array(np.asarray(bound), name))
        inputs.append(name)
    return helper.make_node("Clip", inputs, [output], dequantize.name)
