"""Small questions about ONNX graphs, and small edits, that several stages share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, MutableSequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import AttributeProto, numpy_helper

from bapq_edge.errors import ModelFormatError

_WEIGHT_BYTES = 1024
"""Tensors above this carry weights; smaller ones are shapes and axes that tools must see."""


def is_standard(node: onnx.NodeProto, *op_types: str) -> bool:
    """True for a node of the ONNX standard domain, of one of these types if any is given."""
    return node.domain in ("", "ai.onnx") and (not op_types or node.op_type in op_types)


def standard_opset(model: onnx.ModelProto) -> int:
    """The version of the ONNX standard domain that the model imports; 0 when it imports none."""
    versions = [o.version for o in model.opset_import if o.domain in ("", "ai.onnx")]
    return max(versions, default=0)


def attribute(node: onnx.NodeProto, name: str, default: Any = None) -> Any:
    """The value of an attribute, strings as bytes; the default when the node does not set it."""
    for item in node.attribute:
        if item.name == name:
            return onnx.helper.get_attribute_value(item)
    return default


def bodies(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """The bodies of an If, Loop or Scan node; none for other nodes."""
    for item in node.attribute:
        if item.type == AttributeProto.GRAPH:
            yield item.g
        elif item.type == AttributeProto.GRAPHS:
            yield from item.graphs


def walk(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """The graph and all bodies inside it."""
    yield graph
    for node in graph.node:
        for body in bodies(node):
            yield from walk(body)


def tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """Every tensor that the graph and its bodies hold: initializers and attributes."""
    for part in walk(graph):
        yield from part.initializer
        for sparse in part.sparse_initializer:
            yield from (sparse.values, sparse.indices)
        for node in part.node:
            for item in node.attribute:
                if item.type == AttributeProto.TENSOR:
                    yield item.t
                elif item.type == AttributeProto.TENSORS:
                    yield from item.tensors
                elif item.type == AttributeProto.SPARSE_TENSOR:
                    yield from (item.sparse_tensor.values, item.sparse_tensor.indices)


def tensor_size(tensor: onnx.TensorProto) -> int:
    """The number of elements of a tensor."""
    size = 1
    for dim in tensor.dims:
        size *= dim
    return size


def tensor_array(tensor: onnx.TensorProto) -> np.ndarray:
    """The values of a tensor; ModelFormatError when its data does not fill its shape."""
    try:
        return numpy_helper.to_array(tensor)
    except (TypeError, ValueError) as error:
        raise ModelFormatError(
            f"tensor {tensor.name!r} of shape {list(tensor.dims)} is broken: {error}; "
            "export the model again"
        ) from error


@dataclass(frozen=True)
class Scope:
    """The tensors that a graph sees: its own, then those of the graphs around it."""

    constants: dict[str, onnx.TensorProto]
    computed: frozenset[str]
    outer: Scope | None = None

    @classmethod
    def of(cls, graph: onnx.GraphProto, outer: Scope | None = None) -> Scope:
        """The scope of a graph or body."""
        computed = {name for node in graph.node for name in node.output}
        computed.update(item.name for item in graph.input)
        return cls({t.name: t for t in graph.initializer}, frozenset(computed), outer)

    def constant(self, name: str) -> onnx.TensorProto | None:
        """The initializer of that name, of this graph or of one around it; None if computed."""
        if not name:
            return None
        scope: Scope | None = self
        while scope is not None:
            if name in scope.constants:
                return scope.constants[name]
            if name in scope.computed:
                return None
            scope = scope.outer
        return None

    def initializer(self, name: str) -> onnx.TensorProto:
        """The initializer of a name that is known to have one."""
        found = self.constant(name)
        if found is None:
            raise ValueError(f"{name} is no initializer")
        return found


def uses(graph: onnx.GraphProto) -> Counter[str]:
    """Count how often each name is read: by nodes, by the bodies inside them, as an output."""
    count: Counter[str] = Counter()
    for part in walk(graph):
        for node in part.node:
            count.update(name for name in node.input if name)
        count.update(item.name for item in part.output)
    return count


def names(graph: onnx.GraphProto) -> set[str]:
    """Every tensor name in the graph and its bodies."""
    found = set(uses(graph))
    for part in walk(graph):
        found.update(name for node in part.node for name in node.output)
        found.update(item.name for item in part.input)
        found.update(item.name for item in part.initializer)
    return found


def fresh_name(wanted: str, taken: set[str]) -> str:
    """Take the wanted name, or the wanted name with the first free number."""
    name, number = wanted, 1
    while name in taken:
        number += 1
        name = f"{wanted}_{number}"
    taken.add(name)
    return name


def remove_dead(graph: onnx.GraphProto) -> None:
    """Drop the nodes, initializers and value_info that nothing reads, in bodies too."""
    while _remove_dead_nodes(graph, uses(graph)):
        pass
    read = uses(graph)
    for part in walk(graph):
        delete_where(part.initializer, lambda tensor: not read[tensor.name])
        delete_where(part.sparse_initializer, lambda sparse: not read[sparse.values.name])
        delete_where(part.value_info, lambda info: not read[info.name])


def _remove_dead_nodes(graph: onnx.GraphProto, read: Counter[str]) -> int:
    def is_dead(node: onnx.NodeProto) -> bool:
        return not any(read[name] for name in node.output if name)

    return sum(delete_where(part.node, is_dead) for part in walk(graph))


def delete_where(field: MutableSequence[Any], unwanted: Callable[[Any], bool]) -> int:
    """Delete items of a repeated field; the others keep their identity. Returns how many."""
    indices = [index for index, item in enumerate(field) if unwanted(item)]
    for index in reversed(indices):
        del field[index]
    return len(indices)


def replace_nodes(graph: onnx.GraphProto, nodes: list[onnx.NodeProto]) -> None:
    """Make these the nodes of the graph."""
    kept = onnx.GraphProto()
    kept.node.extend(nodes)
    del graph.node[:]
    graph.node.extend(kept.node)


def without_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """Copy the model; its large initializers have a shape and no data.

    For tools that serialize the model: protobuf cannot write more than 2 GiB.
    """
    light = onnx.ModelProto()
    for name in ("ir_version", "producer_name", "producer_version", "domain", "model_version"):
        setattr(light, name, getattr(model, name))
    light.opset_import.extend(model.opset_import)
    light.metadata_props.extend(model.metadata_props)
    light.functions.extend(model.functions)
    copy_graph(model.graph, light.graph)
    return light


def copy_graph(source: onnx.GraphProto, target: onnx.GraphProto) -> None:
    """Copy a graph; its large initializers lose their data."""
    target.name = source.name
    for field in ("node", "input", "output", "value_info", "sparse_initializer", "metadata_props"):
        if hasattr(source, field):  # metadata_props came with ONNX 1.17
            getattr(target, field).extend(getattr(source, field))
    for tensor in source.initializer:
        light = target.initializer.add()
        if len(tensor.raw_data) > _WEIGHT_BYTES:
            light.name, light.data_type = tensor.name, tensor.data_type
            light.dims.extend(tensor.dims)
        else:
            light.CopyFrom(tensor)


Shape = tuple[int | str | None, ...]
"""The sizes of a tensor's axes; of an open one its name, None without one."""


def shapes(model: onnx.ModelProto) -> dict[str, Shape | None]:
    """The shapes of tensors, as far as they can be inferred; None where the rank is not known."""
    found: dict[str, Shape | None] = {}
    try:
        inferred = onnx.shape_inference.infer_shapes(without_weights(model))
    except Exception:  # whatever its C++ side threw; that only costs some layers and biases
        return found
    for part in walk(inferred.graph):
        for info in (*part.input, *part.value_info, *part.output):
            kind = info.type.tensor_type
            shape = tuple(map(_size, kind.shape.dim)) if kind.HasField("shape") else None
            before = found.setdefault(info.name, shape)
            if before != shape:  # one name in two branches
                found[info.name] = _common(before, shape)
    return found


def float_ranks(model: onnx.ModelProto) -> dict[str, int]:
    """The numbers of axes of the float32 tensors outside of bodies, as far as they are known."""
    try:
        inferred = onnx.shape_inference.infer_shapes(without_weights(model)).graph
    except Exception:  # as in `shapes`
        return {}
    kinds = {
        info.name: info.type.tensor_type
        for info in (*inferred.input, *inferred.value_info, *inferred.output)
    }
    return {
        name: len(kind.shape.dim)
        for name, kind in kinds.items()
        if kind.HasField("shape") and kind.elem_type == onnx.TensorProto.FLOAT
    }


def _size(dim: onnx.TensorShapeProto.Dimension) -> int | str | None:
    return dim.dim_value if dim.dim_value > 0 else dim.dim_param or None


def _common(first: Shape | None, second: Shape | None) -> Shape | None:
    if first is None or second is None or len(first) != len(second):
        return None
    return tuple(a if a == b else None for a, b in zip(first, second, strict=True))


def attach_weights(light: onnx.ModelProto, source: onnx.ModelProto) -> None:
    """Give the initializers their data back that `without_weights(source)` left out."""
    data = {t.name: t for t in source.graph.initializer if len(t.raw_data) > _WEIGHT_BYTES}
    for tensor in light.graph.initializer:
        if tensor.name in data:
            tensor.raw_data = data[tensor.name].raw_data
