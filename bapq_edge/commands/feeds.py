"""Inputs for a model: from a file, or zeros of the shapes that it names."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..array_files import read_arrays
from ..engine.feeds import zeros
from ..errors import ExecutionError, RunInputError

__all__ = ["FeedSource", "add_feed", "add_input", "parse_shapes"]


def add_input(command: Any, *, default: str = "") -> None:
    """Add --input; without a default it must be given."""
    command.add_argument(
        "--input",
        type=Path,
        required=not default,
        metavar="FILE",
        help=".npz with an array per model input, or .npy where there is one input"
        + (f" (default: {default})" if default else ""),
    )


def add_feed(command: Any) -> None:
    """Add --input, by default zeros, and --shape."""
    add_input(command, default="zeros")
    command.add_argument(
        "--shape",
        action="append",
        default=[],
        metavar="NAME=1,64",
        help="shape of an input of zeros (default: as the model says, 1 on an axis that it leaves "
        "open; of an image with an open size it must be given)",
    )


class FeedSource:
    """What --input and --shape say, read before the model is there that it will be fed to."""

    def __init__(
        self, path: Path | None, shapes: Mapping[str, Sequence[int]] | None = None
    ) -> None:
        """Read the file, None for zeros. Raises InputFileError or RunInputError."""
        self._path = path
        self._shapes = shapes or {}
        self._read = {} if path is None else _read(path)

    @contextlib.contextmanager
    def explained(self, inputs: Sequence[Any]) -> Iterator[None]:
        """Context of a run on the feed: where one fails that is of zeros, say what may help.

        Zeros of length 1 stand in for axes that the model leaves open, which not all models take.
        """
        try:
            yield
        except (ExecutionError, RunInputError) as error:
            guessed = [
                value.name
                for value in inputs
                if value.name not in self._shapes and not all(map(_is_length, value.shape))
            ]
            if self._path is not None or not guessed:
                raise
            raise type(error)(
                f"{error}; the feed was zeros, of length 1 where {', '.join(guessed)} has an open "
                "axis: give --input, or the shape with --shape"
            ) from error

    def feed(self, inputs: Sequence[Any]) -> dict[str, Any]:
        """The feed for these `onnxruntime.NodeArg` inputs. Raises RunInputError."""
        if self._path is None:
            return _zero_feed(inputs, self._shapes)
        if isinstance(self._read, dict):
            return self._read
        if len(inputs) != 1:
            names = ", ".join(value.name for value in inputs)
            raise RunInputError(
                f"{self._path} holds one array, the model has {len(inputs)} inputs, {names}: "
                "write an .npz with an array for each"
            )
        return {inputs[0].name: self._read}


def _read(path: Path) -> dict[str, NDArray[Any]] | NDArray[Any]:
    try:
        return read_arrays(path)
    except ValueError as error:
        raise RunInputError(str(error)) from error


def _zero_feed(inputs: Sequence[Any], shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """Zeros for every input, in the shape of that name or else as the model says."""
    feed = zeros(inputs)
    if feed is None:
        types = ", ".join(f"{value.name} ({value.type})" for value in inputs)
        raise RunInputError(f"zeros mean nothing to every input of {types}: give --input")
    for value in inputs:
        if value.name not in shapes and _is_open_image(value.shape):
            axes = ", ".join(str(size) if _is_length(size) else "?" for size in value.shape)
            raise RunInputError(
                f"input {value.name} is ({axes}), and zeros of one pixel would tell nothing: give "
                f"--shape {value.name}={','.join(_example(value.shape))}, or --input"
            )
    for name, shape in shapes.items():
        if name not in feed:
            raise RunInputError(f"the model has no input {name!r}; it has {', '.join(feed)}")
        try:
            feed[name] = np.zeros(shape, feed[name].dtype)
        except (MemoryError, ValueError) as error:  # more than there is, or than can be counted
            raise RunInputError(f"input {name} cannot have shape {[*shape]}: {error}") from error
    return feed


def _is_length(size: Any) -> bool:
    return isinstance(size, int) and size > 0


def _is_open_image(shape: Sequence[Any]) -> bool:
    """Whether two axes of four or more are open, besides the first, which counts samples."""
    return len(shape) >= 4 and sum(not _is_length(size) for size in shape[1:]) >= 2


def _example(shape: Sequence[Any]) -> list[str]:
    """Such a shape with its open axes filled in."""
    return [
        str(size) if _is_length(size) else "224" if axis else "1" for axis, size in enumerate(shape)
    ]


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
