"""Weights wherever a model keeps them become initializers."""

from __future__ import annotations

from functools import partial

import numpy as np
import onnx
from onnx import numpy_helper

from .. import graphs

_VALUE_TYPES = {
    "value_float": np.float32,
    "value_floats": np.float32,
    "value_int": np.int64,
    "value_ints": np.int64,
}


_OVERRIDABLE_IR = 4


def drop_initializers_from_inputs(model: onnx.ModelProto) -> list[str]:
    """Initializers that are also listed as inputs become constants.

    Returns the names of those that could be overridden: before IR 4 every initializer had to be
    listed, and none could.
    """
    constant = {tensor.name for tensor in model.graph.initializer}
    constant.update(sparse.values.name for sparse in model.graph.sparse_initializer)
    listed = [item.name for item in model.graph.input if item.name in constant]
    graphs.delete_where(model.graph.input, lambda item: item.name in constant)
    return listed if model.ir_version >= _OVERRIDABLE_IR else []


def constants_to_initializers(model: onnx.ModelProto) -> None:
    """Constant nodes become initializers of the graph or body that holds them.

    Strings and sparse tensors stay nodes, and so do constants that are outputs of their graph:
    an If branch must compute what it returns.
    """
    for graph in graphs.walk(model.graph):
        outputs = {item.name for item in graph.output}
        moved = set()
        for node in graph.node:
            tensor = _tensor(node) if graphs.is_standard(node, "Constant") else None
            if tensor is not None and node.output[0] not in outputs:
                tensor.name = node.output[0]
                graph.initializer.append(tensor)
                moved.add(tensor.name)
        graphs.delete_where(graph.node, partial(_makes, moved))


def _makes(names: set[str], node: onnx.NodeProto) -> bool:
    return node.output[0] in names


def _tensor(node: onnx.NodeProto) -> onnx.TensorProto | None:
    value = graphs.attribute(node, "value")
    if isinstance(value, onnx.TensorProto):
        return value
    for name, dtype in _VALUE_TYPES.items():
        value = graphs.attribute(node, name)
        if value is not None:
            return numpy_helper.from_array(np.array(value, dtype))
    return None
