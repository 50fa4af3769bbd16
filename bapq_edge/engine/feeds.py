"""Feeds: what a run is given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

__all__ = ["element_count", "zeros"]

_NUMPY_TYPES = {
    "tensor(float)": np.float32,
    "tensor(double)": np.float64,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(uint8)": np.uint8,
    "tensor(int8)": np.int8,
    "tensor(bool)": np.bool_,
}


def zeros(inputs: Sequence[Any]) -> dict[str, Any] | None:
    """A feed of zeros for `onnxruntime.NodeArg` inputs; an open axis has length 1.

    None where an input is no tensor of numbers.
    """
    feed: dict[str, Any] = {}
    for value in inputs:
        dtype = _NUMPY_TYPES.get(value.type)
        if dtype is None:
            return None
        shape = [size if isinstance(size, int) and size > 0 else 1 for size in value.shape]
        feed[value.name] = np.zeros(shape, dtype)
    return feed


def element_count(feed: Mapping[str, Any]) -> int:
    """Elements of all arrays: how heavy a run is."""
    return sum(int(np.size(value)) for value in feed.values())
