"""Feeds and output names: what a run is given, and what it is asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from typing import Any

import numpy as np

from ..errors import RunInputError

__all__ = ["check_feed", "checked_names", "element_count", "zeros"]

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


def check_feed(needed: Set[str], feed: Mapping[str, Any]) -> None:
    """Raise RunInputError where the feed has not the names of the model's inputs."""
    if set(feed) != needed:
        raise RunInputError(f"the feed has {sorted(feed)}, the model needs {sorted(needed)}")


def checked_names(there: Sequence[str], names: Sequence[str] | None) -> Sequence[str]:
    """The names of the outputs to return: all of the model's, or those asked for.

    Raises RunInputError for a name that is none of the model's.
    """
    if isinstance(names, str):
        raise RunInputError(f"output_names is {names!r}: give a list of names, [{names!r}]")
    asked = there if names is None or not len(names) else list(names)
    for name in asked:
        if name not in there:
            raise RunInputError(f"the model has no output {name!r}, it has {[*there]}")
    return asked


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
    return sum(np.asarray(value).size for value in feed.values())
