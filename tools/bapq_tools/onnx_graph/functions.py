"""Recognises activation functions, however a graph spells them, by what they compute."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import onnx
from numpy.typing import NDArray

from . import graphs
from .ir import Function
from .neighbours import Neighbours

__all__ = ["find_function"]

_Values = NDArray[np.float64]

_LONGEST = 12
"""Nodes that a function may consist of."""
_TOLERANCE = 1e-5
"""Of the function's values: exporters round their constants, and small values cancel."""

_erf = np.vectorize(math.erf, otypes=[np.float64])


def _sigmoid(x: _Values) -> _Values:
    return np.asarray(1 / (1 + np.exp(-x)))


def _gelu(x: _Values) -> _Values:
    return np.asarray(x * (1 + _erf(x / math.sqrt(2))) / 2)


def _gelu_tanh(x: _Values) -> _Values:
    inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
    return np.asarray(x * (1 + np.tanh(inner)) / 2)


def _hard_swish(x: _Values) -> _Values:
    return x * np.clip(x / 6 + 0.5, 0, 1)


_FUNCTIONS: dict[Function, Callable[[_Values], _Values]] = {
    "hard_swish": _hard_swish,
    "silu": lambda x: x * _sigmoid(x),
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
}


def _hard_sigmoid(node: onnx.NodeProto, x: _Values) -> _Values:
    alpha, beta = (graphs.attribute(node, *item) for item in (("alpha", 0.2), ("beta", 0.5)))
    return np.asarray(np.clip(alpha * x + beta, 0, 1))


def _clip(node: onnx.NodeProto, x: _Values, *bounds: _Values) -> _Values:
    low, high = bounds or (
        graphs.attribute(node, *item) for item in (("min", -np.inf), ("max", np.inf))
    )
    return np.asarray(np.minimum(np.maximum(x, low), high))


def _any_gelu(node: onnx.NodeProto, x: _Values) -> _Values:
    return _gelu_tanh(x) if graphs.attribute(node, "approximate", b"none") == b"tanh" else _gelu(x)


_STANDARD: dict[str, tuple[int, Callable[..., _Values]]] = {
    "Add": (2, lambda _, a, b: a + b),
    "Sub": (2, lambda _, a, b: a - b),
    "Mul": (2, lambda _, a, b: a * b),
    "Div": (2, lambda _, a, b: a / b),
    "Pow": (2, lambda _, a, b: np.power(a, b)),
    "Max": (2, lambda _, a, b: np.maximum(a, b)),
    "Min": (2, lambda _, a, b: np.minimum(a, b)),
    "Clip": (3, _clip),
    "Relu": (1, lambda _, x: np.maximum(x, 0)),
    "Neg": (1, lambda _, x: -x),
    "Erf": (1, lambda _, x: _erf(x)),
    "Tanh": (1, lambda _, x: np.tanh(x)),
    "Sigmoid": (1, lambda _, x: _sigmoid(x)),
    "HardSigmoid": (1, _hard_sigmoid),
    "HardSwish": (1, lambda _, x: _hard_swish(x)),
    "Swish": (1, lambda node, x: x * _sigmoid(graphs.attribute(node, "alpha", 1.0) * x)),
    "Gelu": (1, _any_gelu),
}
_MICROSOFT: dict[str, tuple[int, Callable[..., _Values]]] = {
    "Gelu": (1, lambda _, x: _gelu(x)),
    "FastGelu": (1, lambda _, x: _gelu_tanh(x)),
    "QuickGelu": (1, lambda node, x: x * _sigmoid(graphs.attribute(node, "alpha", 1.702) * x)),
}
"""operator -> the number of its inputs, and what it computes of its node and them"""

_FAR = np.logspace(2, 38, 37)  # where a wide Clip shows
_POINTS = np.concatenate([np.linspace(-12, 12, 193), np.linspace(-0.01, 0.01, 8), -_FAR, _FAR])


def find_function(x: str, around: Neighbours) -> tuple[Function, tuple[onnx.NodeProto, ...]] | None:
    """Find the nodes behind a tensor that together are one of our functions of it.

    They read nothing but the tensor and single constants, and nobody else reads the tensor or what
    passes between them. The last of the nodes writes the function's values.
    """
    values: dict[str, _Values] = {x: _POINTS}
    found: list[onnx.NodeProto] = []
    while len(found) < _LONGEST:
        added = _next(values, found, around)
        if added is None:
            return None
        node, result = added
        found.append(node)
        values[node.output[0]] = result
        inside = [name for other in found for name in other.input]
        if all(
            inside.count(name) == around.reads(name) for name in values if name != node.output[0]
        ):
            function = _named(result)
            if function is not None:
                return function, tuple(found)
    return None


def _named(result: _Values) -> Function | None:
    for name, function in _FUNCTIONS.items():
        with np.errstate(all="ignore"):
            wanted = function(_POINTS)
        if np.all(np.abs(result - wanted) <= _TOLERANCE * np.maximum(np.abs(wanted), 0.1)):
            return name
    return None


def _next(
    values: dict[str, _Values], found: list[onnx.NodeProto], around: Neighbours
) -> tuple[onnx.NodeProto, _Values] | None:
    """A node that can be computed from what is known, and its values."""
    for node in (reader for name in values for reader in around.readers(name)):
        if any(node is other for other in found) or len(node.output) != 1:
            continue
        compute = _computation(node)
        inputs = [values.get(name, _single(name, around.scope)) for name in node.input]
        if compute is None or any(value is None for value in inputs):
            continue
        with np.errstate(all="ignore"):
            return node, compute(node, *inputs)
    return None


def _computation(node: onnx.NodeProto) -> Callable[..., _Values] | None:
    table = _MICROSOFT if node.domain == "com.microsoft" else _STANDARD
    if table is _STANDARD and not graphs.is_standard(node):
        return None
    arguments, compute = table.get(node.op_type, (0, None))
    if node.op_type == "Clip" and node.attribute:  # its bounds, before opset 11
        arguments = 1
    return compute if len(node.input) == arguments else None


def _single(name: str, scope: graphs.Scope) -> NDArray[np.float64] | None:
    """The value of a constant that has one; it must not add an axis."""
    tensor = scope.constant(name)
    if tensor is None or graphs.tensor_size(tensor) != 1 or len(tensor.dims) > 1:
        return None
    return graphs.tensor_array(tensor).astype(np.float64).reshape(())
