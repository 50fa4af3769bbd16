"""Models in float16 or bfloat16 become float32 models with the same inputs and outputs."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import AttributeProto, TensorProto, helper, numpy_helper

from bapq_edge.errors import UnsupportedModelError

from .. import graphs

_HALF_TYPES = (TensorProto.FLOAT16, TensorProto.BFLOAT16)

_TYPE_ATTRIBUTES = frozenset(
    {
        "dtype",
        "output_datatype",
        "output_dtype",
        "precision",
        "softmax_precision",
        "stash_type",
        "to",
    }
)
"""Integer attributes that hold an element type."""


def widen_half_floats(model: onnx.ModelProto) -> None:
    """Turn all half floats inside the model into float32.

    Graph inputs and outputs keep their type, with a Cast beside them.
    """
    if not _holds_half_floats(model.graph):
        return
    for part in graphs.walk(model.graph):
        for node in part.node:
            if graphs.is_standard(node, "BitCast"):
                raise UnsupportedModelError(
                    f"node {node.name or node.output[0]!r} reinterprets bits in a half-float model;"
                    " export the model in float32"
                )
    for tensor in graphs.tensors(model.graph):
        if tensor.data_type in _HALF_TYPES:
            _widen_tensor(tensor)
    for part in graphs.walk(model.graph):
        border = () if part is model.graph else (*part.input, *part.output)
        for info in (*border, *part.value_info):
            _widen_type(info.type)
        for node in part.node:
            _widen_attributes(node)
    _insert_casts(model.graph)


def _holds_half_floats(graph: onnx.GraphProto) -> bool:
    if any(tensor.data_type in _HALF_TYPES for tensor in graphs.tensors(graph)):
        return True
    for part in graphs.walk(graph):
        if any(_widen_type(_copy(i.type)) for i in (*part.input, *part.output, *part.value_info)):
            return True
        if any(_half_attributes(node) for node in part.node):
            return True
    return False


def _insert_casts(graph: onnx.GraphProto) -> None:
    """Give every half-float input and output of the model a Cast, and its inner side a new name."""
    taken = graphs.names(graph)
    renamed: dict[str, str] = {}
    before, after = [], []
    for info in graph.input:
        if _is_half_tensor(info):
            inner = renamed[info.name] = graphs.fresh_name(f"{info.name}_float32", taken)
            before.append(helper.make_node("Cast", [info.name], [inner], to=TensorProto.FLOAT))
    for info in graph.output:
        if _is_half_tensor(info) and info.name not in renamed:
            inner = renamed[info.name] = graphs.fresh_name(f"{info.name}_float32", taken)
            half_type = info.type.tensor_type.elem_type
            after.append(helper.make_node("Cast", [inner], [info.name], to=half_type))
    for part in graphs.walk(graph):
        for node in part.node:
            for field in (node.input, node.output):
                for index, name in enumerate(field):
                    field[index] = renamed.get(name, name)
        for item in (*part.initializer, *part.value_info):
            item.name = renamed.get(item.name, item.name)
    graphs.replace_nodes(graph, [*before, *graph.node, *after])


def _is_half_tensor(info: onnx.ValueInfoProto) -> bool:
    if info.type.HasField("tensor_type"):
        return info.type.tensor_type.elem_type in _HALF_TYPES
    if _widen_type(_copy(info.type)):
        raise UnsupportedModelError(
            f"{info.name!r} is a sequence, map or optional of half floats at the border of the "
            "model; export the model in float32"
        )
    return False


def _widen_tensor(tensor: onnx.TensorProto) -> None:
    values = graphs.tensor_array(tensor).astype(np.float32)
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))


def _widen_type(of: onnx.TypeProto) -> bool:
    """Widen an element type in place; True when it was a half float."""
    kind = of.WhichOneof("value")
    if kind in ("tensor_type", "sparse_tensor_type"):
        tensor_type = getattr(of, kind)
        half = tensor_type.elem_type in _HALF_TYPES
        if half:
            tensor_type.elem_type = TensorProto.FLOAT
        return half
    if kind in ("sequence_type", "optional_type"):
        return _widen_type(getattr(of, kind).elem_type)
    return kind == "map_type" and _widen_type(of.map_type.value_type)


def _copy(of: onnx.TypeProto) -> onnx.TypeProto:
    copy = onnx.TypeProto()
    copy.CopyFrom(of)
    return copy


def _half_attributes(node: onnx.NodeProto) -> list[AttributeProto]:
    return [
        item
        for item in node.attribute
        if item.type == AttributeProto.INT
        and item.name in _TYPE_ATTRIBUTES
        and item.i in _HALF_TYPES
    ]


def _widen_attributes(node: onnx.NodeProto) -> None:
    for item in _half_attributes(node):
        item.i = TensorProto.FLOAT
    for item in node.attribute:
        if item.type == AttributeProto.TYPE_PROTO:
            _widen_type(item.tp)
