"""Models in float16, bfloat16 or float64 become float32 models with the same inputs and outputs."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import AttributeProto, TensorProto, helper, numpy_helper

from bapq_edge.errors import UnsupportedModelError

from .. import graphs

_HALF_TYPES = frozenset({TensorProto.FLOAT16, TensorProto.BFLOAT16})

_DOUBLE_WEIGHTS = 1024
"""A model with a float64 matrix of so many weights is one in float64. Others may need the precision
of their few float64 values, such as times."""

Types = frozenset[int]

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


def to_float32(model: onnx.ModelProto) -> None:
    """Turn all half floats inside the model into float32, and doubles if its weights are such.

    Graph inputs and outputs keep their type, with a Cast beside them.
    """
    types = _HALF_TYPES | ({TensorProto.DOUBLE} if _is_double(model.graph) else set())
    if not _holds(model.graph, types):
        return
    for part in graphs.walk(model.graph):
        for node in part.node:
            if graphs.is_standard(node, "BitCast"):
                raise UnsupportedModelError(
                    f"node {node.name or node.output[0]!r} reinterprets bits in a model that is not"
                    " in float32; export the model in float32"
                )
    for tensor in graphs.tensors(model.graph):
        if tensor.data_type in types:
            _convert_tensor(tensor)
    for part in graphs.walk(model.graph):
        border = () if part is model.graph else (*part.input, *part.output)
        for info in (*border, *part.value_info):
            _convert_type(info.type, types)
        for node in part.node:
            _convert_attributes(node, types)
    _insert_casts(model.graph, types)


def _is_double(graph: onnx.GraphProto) -> bool:
    return any(
        tensor.data_type == TensorProto.DOUBLE
        and len(tensor.dims) > 1
        and graphs.tensor_size(tensor) >= _DOUBLE_WEIGHTS
        for tensor in graphs.tensors(graph)
    )


def _holds(graph: onnx.GraphProto, types: Types) -> bool:
    if any(tensor.data_type in types for tensor in graphs.tensors(graph)):
        return True
    for part in graphs.walk(graph):
        infos = (*part.input, *part.output, *part.value_info)
        if any(_convert_type(_copy(info.type), types) for info in infos):
            return True
        if any(_type_attributes(node, types) for node in part.node):
            return True
    return False


def _insert_casts(graph: onnx.GraphProto, types: Types) -> None:
    """Give every such input and output of the model a Cast, and its inner side a new name."""
    taken = graphs.names(graph)
    renamed: dict[str, str] = {}
    before, after = [], []
    for info in graph.input:
        if _is_tensor_of(info, types):
            inner = renamed[info.name] = graphs.fresh_name(f"{info.name}_float32", taken)
            before.append(helper.make_node("Cast", [info.name], [inner], to=TensorProto.FLOAT))
    for info in graph.output:
        if _is_tensor_of(info, types) and info.name not in renamed:
            inner = renamed[info.name] = graphs.fresh_name(f"{info.name}_float32", taken)
            outer_type = info.type.tensor_type.elem_type
            after.append(helper.make_node("Cast", [inner], [info.name], to=outer_type))
    for part in graphs.walk(graph):
        for node in part.node:
            for field in (node.input, node.output):
                for index, name in enumerate(field):
                    field[index] = renamed.get(name, name)
        for item in (*part.initializer, *part.value_info):
            item.name = renamed.get(item.name, item.name)
    graphs.replace_nodes(graph, [*before, *graph.node, *after])


def _is_tensor_of(info: onnx.ValueInfoProto, types: Types) -> bool:
    if info.type.HasField("tensor_type"):
        return info.type.tensor_type.elem_type in types
    if _convert_type(_copy(info.type), types):
        raise UnsupportedModelError(
            f"{info.name!r} is a sequence, map or optional of floats that are not float32 at the "
            "border of the model; export the model in float32"
        )
    return False


def _convert_tensor(tensor: onnx.TensorProto) -> None:
    with np.errstate(over="ignore"):  # an infinite weight is refused by name later
        values = graphs.tensor_array(tensor).astype(np.float32)
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))


def _convert_type(of: onnx.TypeProto, types: Types) -> bool:
    """Make an element type float32 in place; True when it was one of these."""
    kind = of.WhichOneof("value")
    if kind in ("tensor_type", "sparse_tensor_type"):
        tensor_type = getattr(of, kind)
        found = tensor_type.elem_type in types
        if found:
            tensor_type.elem_type = TensorProto.FLOAT
        return found
    if kind in ("sequence_type", "optional_type"):
        return _convert_type(getattr(of, kind).elem_type, types)
    return kind == "map_type" and _convert_type(of.map_type.value_type, types)


def _copy(of: onnx.TypeProto) -> onnx.TypeProto:
    copy = onnx.TypeProto()
    copy.CopyFrom(of)
    return copy


def _type_attributes(node: onnx.NodeProto, types: Types) -> list[AttributeProto]:
    return [
        item
        for item in node.attribute
        if item.type == AttributeProto.INT and item.name in _TYPE_ATTRIBUTES and item.i in types
    ]


def _convert_attributes(node: onnx.NodeProto, types: Types) -> None:
    for item in _type_attributes(node, types):
        item.i = TensorProto.FLOAT
    for item in node.attribute:
        if item.type == AttributeProto.TYPE_PROTO:
            _convert_type(item.tp, types)
