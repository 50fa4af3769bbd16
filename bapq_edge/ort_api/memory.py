"""Memory that ONNX Runtime or a caller owns, as NumPy arrays without a copy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import RunInputError

__all__ = ["array_at", "array_of", "numpy_type"]

_ELEMENT_TYPES: dict[int, Any] = {
    1: np.float32,
    2: np.uint8,
    3: np.int8,
    4: np.uint16,
    5: np.int16,
    6: np.int32,
    7: np.int64,
    9: np.bool_,
    10: np.float16,
    11: np.float64,
    12: np.uint32,
    13: np.uint64,
}
"""By their numbers in onnx.TensorProto.DataType."""


class _Memory:
    """What NumPy asks for an array over memory; the array keeps the owner alive."""

    def __init__(self, address: int, shape: Sequence[int], dtype: np.dtype[Any], owner: Any):
        self.__array_interface__ = {
            "version": 3,
            "data": (address, False),
            "shape": tuple(shape),
            "typestr": dtype.str,
        }
        self._owner = owner


def numpy_type(element_type: Any) -> np.dtype[Any]:
    """The type of elements: a NumPy type, or a number of onnx.TensorProto.DataType.

    Raises RunInputError for one that NumPy has not.
    """
    if isinstance(element_type, int) and element_type not in _ELEMENT_TYPES:
        raise RunInputError(f"element type {element_type} has no NumPy type: give one that has")
    known = _ELEMENT_TYPES[element_type] if isinstance(element_type, int) else element_type
    dtype: np.dtype[Any] = np.dtype(known)
    return dtype


def array_at(
    address: int, shape: Sequence[int], dtype: np.dtype[Any], owner: Any = None
) -> NDArray[Any]:
    """The array in the memory that begins there; `owner` lives as long as the array."""
    if 0 in shape:
        return np.empty(shape, dtype)
    return np.asarray(_Memory(address, shape, dtype, owner))


def array_of(value: Any) -> Any:
    """What an `onnxruntime.OrtValue` holds: its memory for a tensor of numbers, a copy for one of
    strings. A sequence or an optional is the value itself, which ONNX Runtime takes as it is.
    """
    if not callable(getattr(value, "data_ptr", None)):
        kind = type(value).__name__
        raise RunInputError(f"a value is of type {kind}: give an onnxruntime.OrtValue")
    if not value.is_tensor():
        return value
    if value.data_type() == "tensor(string)":
        return value.numpy()
    return array_at(value.data_ptr(), value.shape(), numpy_type(value.element_type()), value)
