"""What an LSTM, GRU or RNN node computes, and why some of them stay one node."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast

import numpy as np
import onnx
from onnx import TensorProto

from . import graphs

Kind = Literal["LSTM", "GRU", "RNN"]

GATES: dict[Kind, int] = {"LSTM": 4, "GRU": 3, "RNN": 1}

MIN_STEP_WEIGHTS = 4096
"""Of the state, in one direction: with fewer, a node of one step is not worth ten others."""

MIN_LOOP_WEIGHTS = 65536
"""The same of more steps. With fewer, the node's step is over long before that of a loop."""

_ACTIVATIONS: dict[Kind, tuple[str, ...]] = {
    "LSTM": ("Sigmoid", "Tanh", "Tanh"),
    "GRU": ("Sigmoid", "Tanh"),
    "RNN": ("Tanh",),
}
"""What each direction applies where the node does not say: to gates, to candidates, to the cell."""

_PLAIN = {name.lower(): name for name in ("Sigmoid", "Tanh", "Relu", "Softsign")}
"""Activations without parameters, which are standard operators of the same name."""

_DIRECTIONS = {b"forward": (False,), b"reverse": (True,), b"bidirectional": (False, True)}


@dataclass(frozen=True)
class Recurrent:
    """A recurrent node: its constants, by direction first, and its settings."""

    kind: Kind
    hidden: int
    """Size of the state."""
    reverse: tuple[bool, ...]
    """Of each direction, whether it goes from the last step to the first."""
    weight: np.ndarray
    """(directions, gates x hidden, inputs) float32"""
    recurrence: np.ndarray
    """(directions, gates x hidden, hidden) float32"""
    bias: np.ndarray
    """(directions, 2, gates x hidden) float32: of the input's product, and of the state's."""
    peepholes: np.ndarray | None
    """(directions, 3, hidden) float32: what input, output and forget gate take from the cell."""
    activations: tuple[tuple[str, ...], ...]
    """Of each direction."""
    clip: float | None
    """Bound of what goes into activations."""
    input_forget: bool
    """Whether the LSTM forgets what it does not take in."""
    linear_before_reset: bool
    """Whether the GRU's reset gate comes behind the product with the state."""

    @property
    def worth_a_loop(self) -> bool:
        """Whether a loop over steps is about as fast as the node, or faster."""
        return bool(self.recurrence[0].size >= MIN_LOOP_WEIGHTS)


def read_recurrent(node: onnx.NodeProto, scope: graphs.Scope) -> Recurrent | str:
    """Read a recurrent node, or tell why it stays as it is."""
    kind = cast(Kind, node.op_type)
    inputs = [*node.input, *[""] * (8 - len(node.input))]
    given = {name: inputs[index] for name, index in _CONSTANTS.items() if inputs[index]}
    found = {name: scope.constant(tensor) for name, tensor in given.items()}
    if any(t is None or t.data_type != TensorProto.FLOAT for t in found.values()):
        return "recurrent operator with computed weights"
    arrays = {name: graphs.tensor_array(tensor) for name, tensor in found.items() if tensor}
    weight, recurrence = arrays["weight"], arrays["recurrence"]
    reverse = _DIRECTIONS.get(graphs.attribute(node, "direction", b"forward"))
    gates, hidden = GATES[kind], recurrence.shape[-1]
    if reverse is None or recurrence.shape != (len(reverse), gates * hidden, hidden):
        return "recurrent operator with weights of a broken shape"
    if graphs.attribute(node, "layout", 0):
        return "recurrent operator with the batch before the steps"
    activations = _activations(node, kind, len(reverse))
    if activations is None:
        return "recurrent operator with activations that have parameters"
    if recurrence[0].size < MIN_STEP_WEIGHTS:
        return f"recurrent operator of fewer than {MIN_STEP_WEIGHTS} weights for its state"
    bias = arrays.get("bias", np.zeros((len(reverse), 2 * gates * hidden), np.float32))
    peepholes = arrays.get("peepholes")
    return Recurrent(
        kind,
        hidden,
        reverse,
        weight,
        recurrence,
        bias.reshape(len(reverse), 2, gates * hidden),
        None if peepholes is None else peepholes.reshape(len(reverse), 3, hidden),
        activations,
        graphs.attribute(node, "clip") or None,
        bool(graphs.attribute(node, "input_forget", 0)),
        bool(graphs.attribute(node, "linear_before_reset", 0)),
    )


def refusal(node: onnx.NodeProto, scope: graphs.Scope) -> str:
    """Why a recurrent node has stayed as it is."""
    found = read_recurrent(node, scope)
    if isinstance(found, str):
        return found
    if not found.worth_a_loop:
        return f"recurrent operator of fewer than {MIN_LOOP_WEIGHTS} weights for its state"
    return "recurrent operator with sequence lengths before opset 11"


_CONSTANTS = {"weight": 1, "recurrence": 2, "bias": 3, "peepholes": 7}
"""Inputs that must be constants."""


def _activations(
    node: onnx.NodeProto, kind: Kind, directions: int
) -> tuple[tuple[str, ...], ...] | None:
    default = _ACTIVATIONS[kind]
    given = [name.decode().lower() for name in graphs.attribute(node, "activations") or ()]
    if not given:
        return (default,) * directions
    size = len(default)
    given = given[: size * directions]  # the default of an RNN is two, of one direction, too
    if len(given) < size * directions or not _PLAIN.keys() >= set(given):
        return None
    named = [_PLAIN[name] for name in given]
    return tuple(tuple(named[at : at + size]) for at in range(0, len(named), size))
