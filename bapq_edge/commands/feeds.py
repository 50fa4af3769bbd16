"""Inputs for a model: from a file, or zeros of the shapes that it names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..engine.feeds import zeros
from ..errors import RunInputError

__all__ = ["add_feed", "load_feed", "parse_shapes", "zero_feed"]


def add_feed(command: Any) -> None:
    """The options --input and --shape."""
    command.add_argument("--input", type=Path, help=".npz, one array per input (default: zeros)")
    command.add_argument(
        "--shape",
        action="append",
        default=[],
        metavar="NAME=1,64",
        help="of an input of zeros, where the model leaves it open (there: 1)",
    )


def load_feed(path: Path) -> dict[str, Any]:
    """The arrays of an .npz, one per model input. Raises RunInputError."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except OSError as error:
        raise RunInputError(f"{path} cannot be read: {error}") from error
    except (ValueError, AttributeError) as error:
        raise RunInputError(
            f"{path} is not an .npz of plain arrays: write it with numpy.savez"
        ) from error


def zero_feed(inputs: Sequence[Any], shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """Zeros for every `onnxruntime.NodeArg`, in the shape of that name or else as the model says.

    Raises RunInputError for a name that the model lacks, and for a model that wants more than
    tensors of numbers.
    """
    feed = zeros(inputs)
    if feed is None:
        types = ", ".join(f"{value.name} ({value.type})" for value in inputs)
        raise RunInputError(f"zeros mean nothing to every input of {types}: give --input")
    for name, shape in shapes.items():
        if name not in feed:
            raise RunInputError(f"the model has no input {name!r}; it has {', '.join(feed)}")
        feed[name] = np.zeros(shape, feed[name].dtype)
    return feed


def parse_shapes(texts: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Shapes written as `name=1,64`. Raises RunInputError."""
    shapes = {}
    for text in texts:
        name, _, sizes = text.rpartition("=")
        parts = sizes.split(",")
        if not name or not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
            raise RunInputError(f"{text!r} is not a shape: write it as input=1,64")
        shapes[name] = tuple(int(part) for part in parts)
    return shapes
