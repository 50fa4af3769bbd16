"""One step of an LSTM, GRU or RNN in standard nodes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import onnx
from onnx import helper

from .node_rewriter import NodeRewriter
from .recurrent_node import Recurrent

Nodes = list[onnx.NodeProto]

Size = int | str | None
"""Of an axis; of an open one its name, None without one."""


class Place(Protocol):
    """The graph or body that a step is written into."""

    def constant(self, values: Any, wanted: str) -> str:
        """Add an initializer; returns its name."""

    def declare(self, name: str, *shape: Size) -> None:
        """Say what shape a tensor has."""


@dataclass(frozen=True)
class State:
    """The tensors that one step hands to the next, (batch, hidden)."""

    hidden: str
    cell: str = ""
    """Of an LSTM."""

    @property
    def names(self) -> list[str]:
        """Those that there are."""
        return [name for name in (self.hidden, self.cell) if name]


@dataclass(frozen=True)
class Cell:
    """Writes the steps of one direction."""

    write: NodeRewriter
    place: Place
    facts: Recurrent
    direction: int
    batch: int | str
    """Its size, or a name for it: by it a sum with the product is known to be of one shape."""
    title: str
    """Of the product with the state, by which its layer is named."""

    def step(self, nodes: Nodes, x: str, state: State, active: str) -> tuple[State, str]:
        """Append one step; returns the next state and the answer.

        `x` is the product of the input, (batch, gates x hidden). Where `active` (batch, 1) is
        given and false, the state stays and the answer is zero.
        """
        kinds = {"LSTM": self._lstm, "GRU": self._gru, "RNN": self._rnn}
        new = kinds[self.facts.kind](nodes, x, state)
        if not active:
            return new, new.hidden
        zero = self.place.constant(np.float32(0), f"{self.title}_nothing")
        answer = self._apply(nodes, "Where", active, new.hidden, zero)
        kept = [
            self._apply(nodes, "Where", active, after, before)
            for after, before in zip(new.names, state.names, strict=True)
        ]
        return State(*kept), answer

    def _rnn(self, nodes: Nodes, x: str, state: State) -> State:
        total = self._apply(nodes, "Add", self._product(nodes, state.hidden), x)
        return State(self._activated(nodes, 0, total))

    def _gru(self, nodes: Nodes, x: str, state: State) -> State:
        """Gates in the order update, reset; then the candidate."""
        hidden, size = state.hidden, self.facts.hidden
        x_gates, x_candidate = self._split(nodes, x, [2 * size, size])
        if self.facts.linear_before_reset:
            product = self._product(nodes, hidden, bias=self._candidate_bias())
            h_gates, h_candidate = self._split(nodes, product, [2 * size, size])
        else:
            h_gates = self._product(nodes, hidden, slice(2 * size), "_gates")
        gates = self._activated(nodes, 0, self._apply(nodes, "Add", h_gates, x_gates))
        update, reset = self._split(nodes, gates, [size, size])
        if self.facts.linear_before_reset:
            h_candidate = self._apply(nodes, "Mul", reset, h_candidate)
        else:
            kept = self._apply(nodes, "Mul", reset, hidden)
            h_candidate = self._product(nodes, kept, slice(2 * size, None), "_candidate")
        candidate = self._activated(nodes, 1, self._apply(nodes, "Add", h_candidate, x_candidate))
        change = self._apply(nodes, "Sub", hidden, candidate)
        part = self._apply(nodes, "Mul", update, change)
        return State(self._apply(nodes, "Add", candidate, part))

    def _candidate_bias(self) -> np.ndarray:
        own, size = self.facts.bias[self.direction, 1], 2 * self.facts.hidden
        return np.concatenate([np.zeros(size, np.float32), own[size:]])

    def _lstm(self, nodes: Nodes, x: str, state: State) -> State:
        """Gates in the order input, output, forget; then the candidate."""
        size, peepholes = self.facts.hidden, self.facts.peepholes
        total = self._apply(nodes, "Add", self._product(nodes, state.hidden), x)
        if peepholes is None:
            gates, candidate = self._split(nodes, total, [3 * size, size])
            gates = self._activated(nodes, 0, gates)
            gate_in, gate_out, gate_forget = self._split(nodes, gates, [size] * 3)
        else:
            sums = self._split(nodes, total, [size] * 4)
            gate_in, gate_out, gate_forget, candidate = sums
            seen = peepholes[self.direction]
            gate_in = self._peeping(nodes, gate_in, state.cell, seen[0])
            gate_forget = self._peeping(nodes, gate_forget, state.cell, seen[2])
        candidate = self._activated(nodes, 1, candidate)
        if self.facts.input_forget:
            one = self.place.constant(np.float32(1), f"{self.title}_one")
            gate_forget = self._apply(nodes, "Sub", one, gate_in)
        kept = self._apply(nodes, "Mul", gate_forget, state.cell)
        added = self._apply(nodes, "Mul", gate_in, candidate)
        cell = self._apply(nodes, "Add", kept, added)
        if peepholes is not None:
            gate_out = self._peeping(nodes, gate_out, cell, peepholes[self.direction][1])
        shown = self._apply(nodes, self.facts.activations[self.direction][2], cell)
        return State(self._apply(nodes, "Mul", gate_out, shown), cell)

    def _peeping(self, nodes: Nodes, gate: str, cell: str, weight: np.ndarray) -> str:
        """A gate that also looks at the cell."""
        constant = self.place.constant(weight, f"{self.title}_peephole")
        seen = self._apply(nodes, "Mul", cell, constant)
        return self._activated(nodes, 0, self._apply(nodes, "Add", gate, seen))

    def _product(
        self,
        nodes: Nodes,
        hidden: str,
        rows: slice = slice(None),
        ending: str = "",
        bias: np.ndarray | None = None,
    ) -> str:
        """The product of the state with some rows of its matrix."""
        matrix = self.facts.recurrence[self.direction][rows].T
        weight = self.place.constant(matrix, f"{self.title}_weight")
        product = self._declared(f"{self.title}_product", matrix.shape[1])
        ends = [hidden, weight], [product]
        nodes.append(helper.make_node("MatMul", *ends, f"{self.title}{ending}"))
        if bias is None:
            return product
        total = self._declared(f"{self.title}_sum", matrix.shape[1])
        constant = self.place.constant(bias, f"{self.title}_bias")
        nodes.append(helper.make_node("Add", [product, constant], [total]))
        return total

    def _declared(self, wanted: str, size: int) -> str:
        name = self.write.name(wanted)
        self.place.declare(name, self.batch, size)
        return name

    def _activated(self, nodes: Nodes, which: int, source: str) -> str:
        if self.facts.clip is not None:
            for kind, bound in (("Max", -self.facts.clip), ("Min", self.facts.clip)):
                constant = self.place.constant(np.float32(bound), f"{self.title}_bound")
                source = self._apply(nodes, kind, source, constant)
        return self._apply(nodes, self.facts.activations[self.direction][which], source)

    def _apply(self, nodes: Nodes, kind: str, *inputs: str) -> str:
        output = self.write.name(f"{self.title}_{kind.lower()}")
        nodes.append(helper.make_node(kind, inputs, [output]))
        return output

    def _split(self, nodes: Nodes, source: str, sizes: Sequence[int]) -> list[str]:
        parts = [self._declared(f"{self.title}_part", size) for size in sizes]
        if self.write.opset < 13:
            nodes.append(helper.make_node("Split", [source], parts, axis=-1, split=[*sizes]))
        else:
            cuts = self.place.constant(np.array(sizes, np.int64), f"{self.title}_sizes")
            nodes.append(helper.make_node("Split", [source, cuts], parts, axis=-1))
        return parts
