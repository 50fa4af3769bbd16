"""Spells lookups in other tables than matrices out as lookups of rows, which are layers."""

from __future__ import annotations

import math

import numpy as np
import onnx
from onnx import TensorProto, helper

from . import graphs
from .heavy_nodes import MIN_WEIGHTS
from .node_rewriter import NodeRewriter

Nodes = list[onnx.NodeProto]


class Lookups(NodeRewriter):
    """Rewrites Gather along any axis of a table, GatherND, and Slice of rows."""

    def __init__(self, model: onnx.ModelProto) -> None:
        super().__init__(model)
        self.writers = {
            ("", "Gather"): self._gather,
            ("", "GatherND"): self._gather_nd,
            ("", "Slice"): self._slice,
        }

    def _gather(self, node: onnx.NodeProto, scope: graphs.Scope) -> Nodes | None:
        """The axis comes first, the others become one."""
        table, rank = _table(node, scope), self.rank(node.input[1])
        if table is None or rank is None:
            return None
        axis = graphs.attribute(node, "axis", 0) % table.ndim
        if table.ndim == 2 and axis == 0:
            return None
        turned = np.moveaxis(table, axis, 0)
        others = turned.shape[1:]
        # (axis, others) to (indices, others), and those before the axis to the front
        order = [*range(rank, rank + axis), *range(rank), *range(rank + axis, rank + len(others))]
        nodes: Nodes = []
        found = self._rows(nodes, node, turned.reshape(len(turned), -1), node.input[1])
        if len(others) > 1:
            shape = self.integers([0] * rank + [*others], f"{node.output[0]}_shape")
            found = self.apply(nodes, "Reshape", [found, shape])
        if order != sorted(order):
            self.apply(nodes, "Transpose", [found], perm=order)
        nodes[-1].output[0] = node.output[0]
        return nodes

    def _gather_nd(self, node: onnx.NodeProto, scope: graphs.Scope) -> Nodes | None:
        """The axes that are looked up become one, counted through."""
        table, shape = _table(node, scope), self.shapes.get(node.input[1])
        if table is None or not shape or graphs.attribute(node, "batch_dims", 0):
            return None
        depth = shape[-1]
        if not isinstance(depth, int) or depth >= table.ndim:
            return None
        sizes, others = table.shape[:depth], table.shape[depth:]
        nodes: Nodes = []
        rows = self._numbers(nodes, node.input[1], sizes)
        found = self._rows(nodes, node, table.reshape(math.prod(sizes), -1), rows)
        if len(others) > 1:
            target = [0] * (len(shape) - 1) + [*others]
            shape_name = self.integers(target, f"{node.output[0]}_shape")
            self.apply(nodes, "Reshape", [found, shape_name])
        nodes[-1].output[0] = node.output[0]
        return nodes

    def _slice(self, node: onnx.NodeProto, scope: graphs.Scope) -> Nodes | None:
        """Not the rows are cut, but their numbers."""
        table = _table(node, scope)
        axes = scope.constant(node.input[3]) if len(node.input) > 3 else None
        if table is None or table.ndim != 2 or axes is None:
            return None
        if graphs.tensor_array(axes).tolist() not in ([0], [-2]):
            return None
        nodes: Nodes = []
        count = self.integers(range(len(table)), f"{node.output[0]}_numbers")
        bounds = [*node.input[1:3], self.integers([0], f"{node.output[0]}_axis"), *node.input[4:]]
        self._rows(nodes, node, table, self.apply(nodes, "Slice", [count, *bounds]))
        nodes[-1].output[0] = node.output[0]
        return nodes

    def _numbers(self, nodes: Nodes, indices: str, sizes: tuple[int, ...]) -> str:
        """The numbers of rows for indices in several axes.

        What lies outside of an axis gets a number outside of the table, so that it is refused.
        """
        strides = [math.prod(sizes[at + 1 :]) for at in range(len(sizes))]
        zero, extent, step, outside = (
            self.integers(values, f"{indices}_{name}")
            for name, values in (
                ("zero", 0),
                ("sizes", sizes),
                ("strides", strides),
                ("outside", math.prod(sizes)),
            )
        )
        below = self.apply(nodes, "Less", [indices, zero])
        raised = self.apply(nodes, "Add", [indices, extent])
        index = self.apply(nodes, "Where", [below, raised, indices])
        inside = self.apply(nodes, "Less", [index, extent])
        negative = self.apply(nodes, "Less", [index, zero])
        wrong = self.apply(nodes, "Or", [negative, self.apply(nodes, "Not", [inside])])
        part = self.apply(nodes, "Mul", [index, step])
        part = self.apply(nodes, "Where", [wrong, outside, part])
        if self.opset >= 13:
            axes = self.integers([-1], f"{indices}_axes")
            return self.apply(nodes, "ReduceSum", [part, axes], keepdims=0)
        return self.apply(nodes, "ReduceSum", [part], axes=[-1], keepdims=0)

    def _rows(self, nodes: Nodes, node: onnx.NodeProto, table: np.ndarray, indices: str) -> str:
        output = self.name(f"{node.output[0]}_rows")
        name = self.constant(table, f"{node.input[0]}_rows")
        nodes.append(helper.make_node("Gather", [name, indices], [output], node.name))
        return output


def _table(node: onnx.NodeProto, scope: graphs.Scope) -> np.ndarray | None:
    """A constant table that is worth a layer."""
    tensor = scope.constant(node.input[0])
    if tensor is None or tensor.data_type != TensorProto.FLOAT or len(tensor.dims) < 2:
        return None
    return graphs.tensor_array(tensor) if graphs.tensor_size(tensor) >= MIN_WEIGHTS else None
