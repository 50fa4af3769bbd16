"""Makes the inputs of layers inside If, Loop and Scan bodies visible from outside.

A tap records the values and the shapes of a tensor, one row of numbers each: a branch that is not
taken records nothing, a Loop appends, a Scan stacks. So a body may run any number of times, on
tensors of any size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from ..onnx_graph import graphs
from ..onnx_graph.ir import LayerUse


@dataclass(frozen=True)
class Tap:
    """The names of the two records of a tapped tensor."""

    values: str
    """All values, flat."""
    shapes: str
    """Of each time that the tensor was computed its rank and then its shape, int64."""


def tapped(
    node: onnx.NodeProto, uses: Sequence[LayerUse], taken: set[str]
) -> tuple[list[onnx.NodeProto], list[tuple[LayerUse, Tap]]]:
    """Nodes that run a node with bodies and record the inputs of uses of layers inside of it.

    `node` stays as it is; the outputs of its copy have new names. A use is left out where no tap
    can be: below a Scan whose body holds an If or Loop around the use, below other operators, and
    outside of the node.
    """
    graph = onnx.GraphProto()
    graph.node.append(node)
    found = [(use, tap) for use in uses if (tap := _Tapper(use, taken).tap(graph)) is not None]
    (copy,) = [each for each in graph.node if list(graphs.bodies(each))]
    for index, name in enumerate(copy.output):
        if name in node.output and name:
            copy.output[index] = graphs.fresh_name(f"{name}_tapped", taken)
    return list(graph.node), found


def recorded(values: np.ndarray, shapes: np.ndarray) -> list[np.ndarray]:
    """The tensors that a tap recorded, in order."""
    found = []
    begin = place = 0
    while place < len(shapes):
        rank = int(shapes[place])
        shape = tuple(int(size) for size in shapes[place + 1 : place + 1 + rank])
        size = int(np.prod(shape))
        found.append(values[begin : begin + size].reshape(shape))
        begin, place = begin + size, place + 1 + rank
    return found


class _Tapper:
    """Adds the tap of one use to a graph and to all bodies on the way to it."""

    def __init__(self, use: LayerUse, taken: set[str]) -> None:
        self._use = use
        self._taken = taken
        self._type = TensorProto.INT64 if use.operator == "Gather" else TensorProto.FLOAT
        self._widen: dict[str, Callable[[onnx.GraphProto, int, onnx.GraphProto, Tap], Tap]] = {
            "If": self._if,
            "Loop": self._loop,
            "Scan": self._scan,
        }

    def tap(self, graph: onnx.GraphProto, fixed: bool = False) -> Tap | None:
        """Tap the graph in place; with `fixed`, only where each run records as much."""
        for index, node in enumerate(graph.node):
            if self._use.output in node.output:
                return self._record(graph, index)
            for body in graphs.bodies(node):
                if not any(self._use.output in n.output for p in graphs.walk(body) for n in p.node):
                    continue
                if not graphs.is_standard(node, *self._widen) or (fixed and node.op_type != "Scan"):
                    return None
                inner = self.tap(body, fixed or node.op_type == "Scan")
                return (
                    None if inner is None else self._widen[node.op_type](graph, index, body, inner)
                )
        return None

    def _name(self, what: str) -> str:
        return graphs.fresh_name(f"{self._use.output}_tap_{what}", self._taken)

    def _new_tap(self) -> Tap:
        return Tap(self._name("values"), self._name("shapes"))

    def _types(self, tap: Tap) -> list[onnx.ValueInfoProto]:
        return [
            helper.make_tensor_value_info(tap.values, self._type, None),
            helper.make_tensor_value_info(tap.shapes, TensorProto.INT64, None),
        ]

    def _record(self, graph: onnx.GraphProto, index: int) -> Tap:
        tap, source = self._new_tap(), self._use.activation_input
        nodes = []
        if self._use.operator == "Gather":
            wide = self._name("indices")
            nodes.append(helper.make_node("Cast", [source], [wide], to=self._type))
            source = wide
        flat, shape, rank = self._name("flat"), self._name("shape"), self._name("rank")
        nodes += [
            _constant(flat, [-1], np.int64),
            helper.make_node("Reshape", [source, flat], [tap.values]),
            helper.make_node("Shape", [source], [shape]),
            helper.make_node("Shape", [shape], [rank]),
            helper.make_node("Concat", [rank, shape], [tap.shapes], axis=0),
        ]
        _insert(graph, index, nodes)
        return tap

    def _empty(self, tap: Tap) -> list[onnx.NodeProto]:
        dtype = helper.tensor_dtype_to_np_dtype(self._type)
        return [_constant(tap.values, [], dtype), _constant(tap.shapes, [], np.int64)]

    def _if(self, graph: onnx.GraphProto, index: int, body: onnx.GraphProto, inner: Tap) -> Tap:
        node, tap = graph.node[index], self._new_tap()
        for branch in graphs.bodies(node):
            own = inner
            if branch is not body:
                own = self._new_tap()
                branch.node.extend(self._empty(own))
            branch.output.extend(self._types(own))
        node.output.extend([tap.values, tap.shapes])
        return tap

    def _loop(self, graph: onnx.GraphProto, index: int, body: onnx.GraphProto, inner: Tap) -> Tap:
        """Carry the records along and append to them in each iteration."""
        node, tap = graph.node[index], self._new_tap()
        node.input.extend([""] * (2 - len(node.input)))
        carried = len(node.input) - 2
        start, before, after = self._new_tap(), self._new_tap(), self._new_tap()
        body.input.extend(self._types(before))
        for old, new, both in zip(_pair(before), _pair(inner), _pair(after), strict=True):
            body.node.append(helper.make_node("Concat", [old, new], [both], axis=0))
        outputs = list(body.output)
        outputs[1 + carried : 1 + carried] = self._types(after)
        del body.output[:]
        body.output.extend(outputs)
        node.input.extend(_pair(start))
        self._name_outputs(node, carried)
        names = list(node.output)
        names[carried:carried] = _pair(tap)
        del node.output[:]
        node.output.extend(names)
        _insert(graph, index, self._empty(start))
        return tap

    def _scan(self, graph: onnx.GraphProto, index: int, body: onnx.GraphProto, inner: Tap) -> Tap:
        node, tap, stacked = graph.node[index], self._new_tap(), self._new_tap()
        self._name_outputs(node, len(body.output))
        body.output.extend(self._types(inner))
        node.output.extend(_pair(stacked))
        for item in node.attribute:
            if item.name in ("scan_output_axes", "scan_output_directions"):
                item.ints.extend([0, 0])
        flat = self._name("flat")
        nodes = [_constant(flat, [-1], np.int64)]
        for source, target in zip(_pair(stacked), _pair(tap), strict=True):
            nodes.append(helper.make_node("Reshape", [source, flat], [target]))
        _insert(graph, index + 1, nodes)
        return tap

    def _name_outputs(self, node: onnx.NodeProto, count: int) -> None:
        """Name the first outputs, where trailing ones were left out or have no name."""
        node.output.extend([""] * (count - len(node.output)))
        for index in range(count):
            node.output[index] = node.output[index] or self._name("unread")


def _pair(tap: Tap) -> tuple[str, str]:
    return tap.values, tap.shapes


def _constant(name: str, values: Sequence[int], dtype: type | np.dtype) -> onnx.NodeProto:
    tensor = numpy_helper.from_array(np.array(values, dtype))
    return helper.make_node("Constant", [], [name], value=tensor)


def _insert(graph: onnx.GraphProto, index: int, nodes: Sequence[onnx.NodeProto]) -> None:
    for offset, node in enumerate(nodes):
        graph.node.insert(index + offset, node)
