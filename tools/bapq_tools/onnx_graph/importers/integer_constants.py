"""Integers of quantized models that are constants, and the floats that they stand for."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx

from .. import graphs


@dataclass(frozen=True)
class Quantization:
    """The names of a scale and of a zero point; that of the latter may be empty."""

    scale: str
    zero: str


def input_of(node: onnx.NodeProto, index: int) -> str:
    """The name of an input; empty where it is left out."""
    return str(node.input[index]) if len(node.input) > index else ""


def quantization_of(node: onnx.NodeProto, index: int) -> Quantization:
    """A scale and, right behind it, its zero point."""
    return Quantization(node.input[index], input_of(node, index + 1))


def constant_of(name: str, scope: graphs.Scope) -> np.ndarray | None:
    """The values of a constant; None where it is computed."""
    tensor = scope.constant(name)
    return None if tensor is None else graphs.tensor_array(tensor)


def parts_of(
    name: str, by: Quantization, scope: graphs.Scope
) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Integers, scale and zero point, if all are constants."""
    integers, scale = constant_of(name, scope), constant_of(by.scale, scope)
    zero = constant_of(by.zero, scope) if by.zero else np.zeros((), np.int32)
    if integers is None or scale is None or zero is None or scale.dtype != np.float32:
        return None
    return integers, scale, zero


def values_of(
    name: str, by: Quantization, scope: graphs.Scope, axis: int | None
) -> np.ndarray | None:
    """The floats of a constant; without an axis only where there is a single scale.

    Raises ValueError for scales that do not fit.
    """
    found = parts_of(name, by, scope)
    if found is None or (axis is None and found[1].size != 1):
        return None
    return dequantized(*found, axis or 0)


def dequantized(
    quantized: np.ndarray, scale: np.ndarray, zero: np.ndarray, axis: int, block: int = 0
) -> np.ndarray:
    """Compute (quantized - zero) * scale in float32.

    Scales and zeros are single, one for each index of the axis, or one for each `block` of them.
    """
    # int32 less its zero point must be exact before it is rounded to float32.
    wide = np.int64 if quantized.dtype == np.int32 else np.float32
    values: np.ndarray = quantized.astype(wide)
    values -= _broadcastable(zero.astype(wide), values.shape, axis, block)
    values = values.astype(np.float32, copy=False)
    values *= _broadcastable(scale, values.shape, axis, block)
    return values


def _broadcastable(part: np.ndarray, shape: tuple[int, ...], axis: int, block: int) -> np.ndarray:
    """Shape scales or zero points so that they broadcast against the quantized tensor."""
    if part.size == 1:
        return part.reshape(())
    if block > 0:
        return np.repeat(part, block, axis).take(range(shape[axis]), axis)
    along = [1] * len(shape)
    along[axis] = -1
    return part.reshape(along)
