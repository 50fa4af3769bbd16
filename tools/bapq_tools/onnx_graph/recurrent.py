"""Spells LSTM, GRU and RNN nodes out, so that both of their matrices become layers.

The product of the input is one for all steps. That of the state stands, with the gates, in a Scan
over the steps; where there is one step, as in streaming models, it stands beside the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from . import graphs
from .node_rewriter import NodeRewriter
from .recurrent_cells import Cell, Place, Size, State
from .recurrent_node import GATES, Recurrent, read_recurrent

Nodes = list[onnx.NodeProto]

_LENGTHS, _STATE, _CELL = 4, 5, 6
"""Places of the inputs that need not be constants."""


class Recurrents(NodeRewriter):
    """Rewrites those whose weights are constants and many."""

    def __init__(self, model: onnx.ModelProto) -> None:
        super().__init__(model)
        self.writers = {("", kind): self._recurrent for kind in GATES}

    def _recurrent(self, node: onnx.NodeProto, scope: graphs.Scope) -> Nodes | None:
        facts = read_recurrent(node, scope)
        if isinstance(facts, str) or (_input(node, _LENGTHS) and self.opset < 11):
            return None
        x = node.input[0]
        single = self._is_single_step(x, scope)
        if not single and not facts.worth_a_loop:
            return None
        shape = self.shapes.get(x)
        batch = shape[1] if shape else None
        layer = _Layer(self, node, facts, batch or self.name("bapq_batch"))
        if single:
            layer.write_step(self.without_axis(layer.nodes, x, 0))
        else:
            layer.write_scan(x)
        return layer.nodes

    def _is_single_step(self, x: str, scope: graphs.Scope) -> bool:
        """Whether a sequence has one step, by its shape or since its first axis was just added."""
        shape = self.shapes.get(x)
        if shape:
            return shape[0] == 1
        producer = next((node for node in self.graph.node if x in node.output), None)
        if producer is None or not graphs.is_standard(producer, "Unsqueeze"):
            return False
        axes = graphs.attribute(producer, "axes")
        if axes is None and (tensor := scope.constant(_input(producer, 1))) is not None:
            axes = graphs.tensor_array(tensor).ravel()
        return axes is not None and 0 in axes

    def without_axis(self, nodes: Nodes, source: str, axis: int) -> str:
        """Drop an axis of size 1."""
        return self._reaxed(nodes, "Squeeze", source, axis)

    def with_axis(self, nodes: Nodes, source: str, axis: int) -> str:
        """Add an axis of size 1."""
        return self._reaxed(nodes, "Unsqueeze", source, axis)

    def _reaxed(self, nodes: Nodes, kind: str, source: str, axis: int) -> str:
        if self.opset < 13:
            return self.apply(nodes, kind, [source], axes=[axis])
        return self.apply(nodes, kind, [source, self.integers([axis], f"{source}_axis")])

    def declare(self, name: str, *shape: Size) -> None:
        """Say in the graph what shape a tensor has, where inference may not find it."""
        self.graph.value_info.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))


def _input(node: onnx.NodeProto, index: int) -> str:
    return node.input[index] if index < len(node.input) else ""


@dataclass
class _Layer:
    """One recurrent node while it is written: its directions side by side."""

    write: Recurrents
    node: onnx.NodeProto
    facts: Recurrent
    batch: int | str
    """Its size, or a name for it."""
    nodes: Nodes = field(default_factory=list)
    has_steps: str = ""
    """Which of the batch have any, (batch, 1); empty where all have all."""

    def write_step(self, x: str) -> None:
        """The nodes of a single step; `x` is (batch, inputs)."""
        states = self._initial_states()
        active = self._active(rank=2)
        projected = self._projected(x, rank=2)
        cells = self._cells(self.write)
        ends, answers = [], []
        for cell, state, part in zip(cells, states, projected, strict=True):
            end, answer = cell.step(self.nodes, part, state, active)
            ends.append(end)
            answers.append(self.write.with_axis(self.nodes, answer, 0))
        self._give(ends, answers)

    def write_scan(self, x: str) -> None:
        """The nodes around a Scan over the steps; `x` is (steps, batch, inputs)."""
        states = self._initial_states()
        active = self._active(rank=3)
        projected = self._projected(x, rank=3)
        wants_answers = bool(self.node.output[0])
        body = _Body(self.write, self.batch)
        cells = self._cells(body)
        body.write(cells, bool(active), wants_answers)
        scanned = [*projected, *[active for _ in self.facts.reverse if active]]
        directions = [int(back) for back in self.facts.reverse]
        ends = [
            State(self._name("state"), self._name("cell") if state.cell else "") for state in states
        ]
        answers = [self._name("answers") for _ in states] if wants_answers else []
        scan = helper.make_node(
            "Scan",
            [name for state in states for name in state.names] + scanned,
            [name for end in ends for name in end.names] + answers,
            f"{self._title}_steps",
            num_scan_inputs=len(scanned),
            scan_input_directions=directions * (2 if active else 1),
            body=body.graph(f"{self._title}_step"),
        )
        if answers:
            scan.attribute.append(helper.make_attribute("scan_output_directions", directions))
        self.nodes.append(scan)
        self._give(ends, answers)

    @property
    def _title(self) -> str:
        return self.node.name or next(name for name in self.node.output if name)

    def _name(self, what: str) -> str:
        return self.write.name(f"{self._title}_{what}")

    def _cells(self, place: Place) -> list[Cell]:
        return [
            Cell(self.write, place, self.facts, number, self.batch, f"{self._title}_state{ending}")
            for number, ending in enumerate(("", "_reverse")[: len(self.facts.reverse)])
        ]

    def _projected(self, x: str, rank: int) -> list[str]:
        """The product of the input with its bias, for each direction (..., gates x hidden)."""
        facts, write = self.facts, self.write
        matrix = facts.weight.reshape(-1, facts.weight.shape[-1]).T
        weight = write.constant(matrix, f"{self._title}_input_weight")
        bias = write.constant(_input_bias(facts).ravel(), f"{self._title}_input_bias")
        product, total = self._name("input_product"), self._name("input_sum")
        for name in (product, total):
            write.declare(name, *[None] * (rank - 2), self.batch, matrix.shape[1])
        self.nodes.append(
            helper.make_node("MatMul", [x, weight], [product], f"{self._title}_input")
        )
        self.nodes.append(helper.make_node("Add", [product, bias], [total]))
        if len(facts.reverse) == 1:
            return [total]
        parts = [self._name("input_part") for _ in facts.reverse]
        self.nodes.append(_split(write, total, parts))
        return parts

    def _initial_states(self) -> list[State]:
        hidden = self._initial(_STATE)
        if self.facts.kind != "LSTM":
            return [State(name) for name in hidden]
        return [State(h, c) for h, c in zip(hidden, self._initial(_CELL), strict=True)]

    def _initial(self, index: int) -> list[str]:
        """The first state of each direction, (batch, hidden)."""
        write, source = self.write, _input(self.node, index)
        count = len(self.facts.reverse)
        if not source:
            return [self._zeros()] * count
        if count == 1:
            return [write.without_axis(self.nodes, source, 0)]
        parts = [self._name("first") for _ in range(count)]
        self.nodes.append(_split(write, source, parts, axis=0))
        return [write.without_axis(self.nodes, part, 0) for part in parts]

    def _zeros(self) -> str:
        write, x = self.write, self.node.input[0]
        hidden = self.facts.hidden
        if isinstance(self.batch, int):
            zeros = np.zeros((self.batch, hidden), np.float32)
            return write.constant(zeros, f"{self._title}_zeros")
        sizes = write.apply(self.nodes, "Shape", [x])
        batch = write.apply(self.nodes, "Gather", [sizes, write.integers([1], f"{x}_batch")])
        size = write.integers([hidden], f"{self._title}_hidden")
        both = write.apply(self.nodes, "Concat", [batch, size], axis=0)
        return write.apply(self.nodes, "ConstantOfShape", [both])

    def _active(self, rank: int) -> str:
        """Which of the batch still have steps, (steps, batch, 1) or of one step (batch, 1)."""
        write, lengths, nodes = self.write, _input(self.node, _LENGTHS), self.nodes
        if not lengths:
            return ""
        wide = write.apply(nodes, "Cast", [lengths], to=TensorProto.INT64)
        column = write.with_axis(nodes, wide, 1)
        zero = write.integers(0, "first_step")
        self.has_steps = write.apply(nodes, "Less", [zero, column])
        if rank == 2:
            return self.has_steps
        sizes = write.apply(nodes, "Shape", [self.node.input[0]])
        steps = write.apply(nodes, "Gather", [sizes, zero])
        numbers = write.apply(nodes, "Range", [zero, steps, write.integers(1, "next_step")])
        for _ in range(2):
            numbers = write.with_axis(nodes, numbers, 1)
        return write.apply(nodes, "Less", [numbers, column])

    def _last(self, name: str) -> str:
        """A last state: of a sequence without a step it is zero, as ONNX Runtime has it."""
        if not self.has_steps:
            return name
        zero = self.write.constant(np.float32(0), f"{self._title}_nothing")
        return self.write.apply(self.nodes, "Where", [self.has_steps, name, zero])

    def _give(self, ends: Sequence[State], answers: Sequence[str]) -> None:
        """Write the node's outputs: all answers (steps, directions, batch, hidden), last states."""
        found = [answers, [end.hidden for end in ends], [end.cell for end in ends]]
        for output, names, axis in zip(self.node.output, found, (1, 0, 0), strict=False):
            if not output:
                continue
            if names is not answers:
                names = [self._last(name) for name in names]
            parts = [self.write.with_axis(self.nodes, name, axis) for name in names]
            if len(parts) == 1:
                self.nodes[-1].output[0] = output
            else:
                self.nodes.append(helper.make_node("Concat", parts, [output], axis=axis))


def _input_bias(facts: Recurrent) -> np.ndarray:
    """What is added to the input's product: both biases, as far as the state's may be."""
    of_input, of_state = facts.bias[:, 0], facts.bias[:, 1].copy()
    if facts.kind == "GRU" and facts.linear_before_reset:
        of_state[:, 2 * facts.hidden :] = 0
    return np.asarray(of_input + of_state)


def _split(
    write: NodeRewriter, source: str, parts: Sequence[str], axis: int = -1
) -> onnx.NodeProto:
    """Cut a tensor into equal parts."""
    outputs: dict[str, Any] = {"num_outputs": len(parts)} if write.opset >= 18 else {}
    return helper.make_node("Split", [source], parts, axis=axis, **outputs)


class _Body:
    """The body of a Scan: one step of each direction."""

    def __init__(self, write: NodeRewriter, batch: int | str) -> None:
        self._write = write
        self._batch = batch
        self._nodes: Nodes = []
        self._constants: list[onnx.TensorProto] = []
        self._known: list[onnx.ValueInfoProto] = []
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []

    def constant(self, values: Any, wanted: str) -> str:
        """Add an initializer to the body; returns its name."""
        name = self._write.name(wanted)
        self._constants.append(numpy_helper.from_array(np.asarray(values, order="C"), name))
        return name

    def declare(self, name: str, *shape: Size) -> None:
        """Say in the body what shape a tensor has."""
        self._known.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))

    def write(self, cells: Sequence[Cell], masked: bool, answers: bool) -> None:
        """Write a step of each cell; inputs and outputs are in the order that the Scan has."""
        states, projected, active = [], [], []
        for cell in cells:
            size, kind = cell.facts.hidden, cell.facts.kind
            hidden = self._input(cell.title, size)
            states.append(State(hidden, self._input(cell.title, size) if kind == "LSTM" else ""))
        for cell in cells:
            projected.append(self._input(cell.title, cell.facts.weight.shape[1]))
        for cell in cells:
            active.append(self._input(cell.title, 1, TensorProto.BOOL) if masked else "")
        shown = []
        for cell, state, x, mask in zip(cells, states, projected, active, strict=True):
            end, answer = cell.step(self._nodes, x, state, mask)
            for name in end.names:
                self._output(name, cell.facts.hidden)
            shown.append(self._write.name(f"{cell.title}_answer"))
            self._nodes.append(helper.make_node("Identity", [answer], [shown[-1]]))
        for cell, name in zip(cells, shown, strict=True):
            if answers:
                self._output(name, cell.facts.hidden)

    def graph(self, name: str) -> onnx.GraphProto:
        """What was written."""
        return helper.make_graph(
            self._nodes, name, self._inputs, self._outputs, self._constants, value_info=self._known
        )

    def _input(self, title: str, size: int, kind: int = TensorProto.FLOAT) -> str:
        name = self._write.name(f"{title}_given")
        self._inputs.append(helper.make_tensor_value_info(name, kind, [self._batch, size]))
        return name

    def _output(self, name: str, size: int) -> None:
        info = helper.make_tensor_value_info(name, TensorProto.FLOAT, [self._batch, size])
        self._outputs.append(info)
