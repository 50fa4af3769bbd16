"""Walks the graphs of a model and puts other nodes in place of some."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from . import graphs

MICROSOFT = "com.microsoft"
"""The domain of ONNX Runtime's own operators."""

Writer = Callable[[onnx.NodeProto, graphs.Scope], list[onnx.NodeProto] | None]
"""Gives the nodes that stand for one, or None where it stays."""


class NodeRewriter:
    """Asks, for each node of a kind in `writers`, what is to stand in its place."""

    writers: dict[tuple[str, str], Writer]
    """By domain, the standard one as "", and operator."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.opset = graphs.standard_opset(model)
        self.graph = model.graph
        """The graph or body whose nodes are being written."""
        self._model = model
        self._taken = graphs.names(model.graph)
        self._new: list[onnx.TensorProto] = []

    def rewrite(self) -> bool:
        """Rewrite the model in place; returns whether anything changed."""
        return self._visit(self._model.graph, None)

    def _visit(self, graph: onnx.GraphProto, outer: graphs.Scope | None) -> bool:
        scope = graphs.Scope.of(graph, outer)
        nodes: list[onnx.NodeProto] = []
        changed = inside = False
        for node in graph.node:
            for body in graphs.bodies(node):
                inside |= self._visit(body, scope)
            self.graph = graph
            found = self.write(node, scope)
            if found is not None:
                changed = True
                graph.initializer.extend(self._new)
            nodes += [node] if found is None else found
            self._new.clear()
        if changed:
            graphs.replace_nodes(graph, nodes)
        return changed or inside

    def write(self, node: onnx.NodeProto, scope: graphs.Scope) -> list[onnx.NodeProto] | None:
        """What stands in place of a node; None where it stays."""
        domain = "" if graphs.is_standard(node) else node.domain
        write = self.writers.get((domain, node.op_type))
        return write(node, scope) if write else None

    @cached_property
    def shapes(self) -> dict[str, graphs.Shape | None]:
        """The shapes of the model's tensors, as far as they are known."""
        return graphs.shapes(self._model)

    def rank(self, name: str) -> int | None:
        """The number of axes of a tensor; None where it is not known."""
        shape = self.shapes.get(name)
        return None if shape is None else len(shape)

    def name(self, wanted: str) -> str:
        """A name that no tensor has yet."""
        return graphs.fresh_name(wanted, self._taken)

    def constant(self, values: Any, wanted: str) -> str:
        """Add an initializer to the graph; returns its name."""
        name = self.name(wanted)
        self._new.append(numpy_helper.from_array(np.asarray(values, order="C"), name))
        return name

    def integers(self, values: Any, wanted: str) -> str:
        """Add a constant of integers, such as a shape; returns its name."""
        return self.constant(np.asarray(values, np.int64), wanted)

    def apply(self, nodes: list[onnx.NodeProto], kind: str, inputs: list[str], **at: Any) -> str:
        """Append a standard node of one output; returns the name of that."""
        output = self.name(f"{inputs[0]}_{kind.lower()}")
        nodes.append(helper.make_node(kind, inputs, [output], **at))
        return output


def renamed(node: onnx.NodeProto, kind: str, without: tuple[str, ...] = ()) -> onnx.NodeProto:
    """Copy a node as a standard one of another operator, less some attributes."""
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    copy.op_type, copy.domain = kind, ""
    graphs.delete_where(copy.attribute, lambda item: item.name in without)
    return copy
