"""Feeds and output names: what a run is given, and what it is asked for."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any

import numpy as np

from ..errors import RequestError, RunInputError

__all__ = [
    "NUMPY_TYPES",
    "check_feed",
    "check_max_shapes",
    "check_shapes",
    "checked_names",
    "element_count",
    "has_open_axes",
    "in_native_order",
    "zeros",
    "zeros_bytes",
]

NUMPY_TYPES: dict[str, type[np.generic]] = {
    "tensor(float)": np.float32,
    "tensor(double)": np.float64,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(int16)": np.int16,
    "tensor(int8)": np.int8,
    "tensor(uint64)": np.uint64,
    "tensor(uint32)": np.uint32,
    "tensor(uint16)": np.uint16,
    "tensor(uint8)": np.uint8,
    "tensor(bool)": np.bool_,
}
"""By the `type` of an `onnxruntime.NodeArg`."""


def check_feed(needed: Set[str], feed: Mapping[str, Any]) -> None:
    """Raise RunInputError where the feed is none, or has not the names of the model's inputs."""
    if not isinstance(feed, Mapping):
        raise RunInputError(
            f"input_feed is of type {type(feed).__name__}: give a dict, an array for each of "
            f"{sorted(needed)}"
        )
    if set(feed) != needed:
        raise RunInputError(
            f"the feed has {sorted(feed, key=str)}, the model needs {sorted(needed)}"
        )


def checked_names(there: Sequence[str], names: Iterable[str] | None) -> Sequence[str]:
    """The names of the outputs to return: all of the model's, or those asked for.

    Raises RunInputError for a name that is none of the model's.
    """
    if names is None:
        return there
    if isinstance(names, str):
        raise RunInputError(f"output_names is {names!r}: give a list of names, [{names!r}]")
    if not isinstance(names, Iterable):
        raise RunInputError(
            f"output_names is of type {type(names).__name__}: give a list of names, or None for all"
        )
    asked = list(names)
    for name in asked:
        if not isinstance(name, str) or name not in there:
            raise RunInputError(f"the model has no output {name!r}, it has {[*there]}")
    return asked or there


def in_native_order(value: Any) -> Any:
    """The array in this machine's byte order: ONNX Runtime would misread another one."""
    if not isinstance(value, np.ndarray) or value.dtype.isnative:
        return value
    return value.astype(value.dtype.newbyteorder("="))


def has_open_axes(inputs: Sequence[Any]) -> bool:
    """Whether `onnxruntime.NodeArg` inputs have axes whose length only a feed tells."""
    return any(_is_open(size) for value in inputs for size in value.shape)


def _is_open(size: int | str | None) -> bool:
    return not isinstance(size, int) or size <= 0


def check_max_shapes(inputs: Sequence[Any], max_shapes: Mapping[str, Sequence[int]] | None) -> None:
    """Raise RequestError where `onnxruntime.NodeArg` inputs cannot have these shapes."""
    shapes = {value.name: value.shape for value in inputs}
    for name, most in (max_shapes or {}).items():
        if name not in shapes:
            raise RequestError(f"max_shapes names {name!r}, the model's inputs are {[*shapes]}")
        fits = len(shapes[name]) == len(most) and all(
            _is_open(size) or size == length
            for size, length in zip(shapes[name], most, strict=True)
        )
        if not fits:
            raise RequestError(
                f"max_shapes has {tuple(most)} for {name}, the model's is {tuple(shapes[name])}"
            )


def check_shapes(max_shapes: Mapping[str, Sequence[int]] | None, feed: Mapping[str, Any]) -> None:
    """Raise RunInputError for an array that is larger than allowed along any axis."""
    for name, most in (max_shapes or {}).items():
        shape = np.shape(feed[name])
        if any(length > limit for length, limit in zip(shape, most, strict=False)):
            raise RunInputError(
                f"{name} has shape {shape}, max_shapes allows {tuple(most)}: open the session with "
                "a larger one, or with allow_overrun=True"
            )


def _shape(value: Any, max_shapes: Mapping[str, Sequence[int]]) -> Sequence[int]:
    """The largest that an input is told to have; an open axis has length 1."""
    return max_shapes.get(value.name) or [1 if _is_open(size) else size for size in value.shape]


def zeros_bytes(inputs: Sequence[Any], max_shapes: Mapping[str, Sequence[int]]) -> int:
    """Bytes of what `zeros` makes."""
    return sum(
        math.prod(_shape(value, max_shapes)) * np.dtype(dtype).itemsize
        for value in inputs
        if (dtype := NUMPY_TYPES.get(value.type)) is not None
    )


def zeros(
    inputs: Sequence[Any], max_shapes: Mapping[str, Sequence[int]] | None = None
) -> dict[str, Any] | None:
    """A feed of zeros for `onnxruntime.NodeArg` inputs, in the largest shapes that are told.

    An open axis of others has length 1. None where an input is no tensor of numbers.
    """
    feed: dict[str, Any] = {}
    for value in inputs:
        dtype = NUMPY_TYPES.get(value.type)
        if dtype is None:
            return None
        feed[value.name] = np.zeros(_shape(value, max_shapes or {}), dtype)
    return feed


def element_count(feed: Mapping[str, Any]) -> int:
    """Elements of all arrays: how heavy a run is."""
    return sum(
        value.size if isinstance(value, np.ndarray) else np.asarray(value, object).size
        for value in feed.values()
    )
