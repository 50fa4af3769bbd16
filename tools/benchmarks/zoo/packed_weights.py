"""A file of trained weights in nine bits each: as float32 they are too large to bundle.

A value is rounded to a sign, an exponent and the five bits behind its leading one. Exponents are
alike and compress well, the rest is noise; so each is a plane of its own, a byte per value, in one
xz stream: the exponents of all values, then sign and mantissa of all. Names and shapes are the
reader's.
"""

from __future__ import annotations

import lzma
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from bapq_edge.errors import ModelFormatError

__all__ = ["read_packed", "round_weights", "write_packed"]

_MANTISSA_BITS = 5
_DROPPED_BITS = 23 - _MANTISSA_BITS


def round_weights(values: np.ndarray) -> np.ndarray:
    """The nearest float32 values that a file can hold, ties to even; for finite ones."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    odd = bits >> np.uint32(_DROPPED_BITS) & np.uint32(1)
    below_half = np.uint32((1 << (_DROPPED_BITS - 1)) - 1)
    mask = np.uint32(~((1 << _DROPPED_BITS) - 1) & 0xFFFFFFFF)
    return ((bits + below_half + odd) & mask).view(np.float32)


def write_packed(path: str | Path, weights: Mapping[str, np.ndarray]) -> None:
    """Write the values of the arrays in their order, rounded by `round_weights`."""
    flat = np.concatenate([round_weights(array).ravel() for array in weights.values()])
    bits = flat.view(np.uint32)
    exponents = (bits >> 23).astype(np.uint8)  # the cast drops the sign above them
    signs = bits >> 31 << _MANTISSA_BITS
    mantissas = bits >> _DROPPED_BITS & ((1 << _MANTISSA_BITS) - 1)
    planes = exponents.tobytes() + (signs | mantissas).astype(np.uint8).tobytes()
    Path(path).write_bytes(lzma.compress(planes, preset=9))


def read_packed(path: str | Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Float32 arrays of these names and shapes, which follow each other in the file.

    Raises ModelFormatError for a file that is damaged or has another number of values.
    """
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    count = sum(sizes.values())
    decompressor = lzma.LZMADecompressor(lzma.FORMAT_XZ)
    try:
        planes = decompressor.decompress(Path(path).read_bytes(), max_length=2 * count + 1)
    except lzma.LZMAError as error:
        raise _error(path, str(error)) from None
    if len(planes) != 2 * count or not decompressor.eof or decompressor.unused_data:
        found = "more" if len(planes) > 2 * count else f"{len(planes)} or something behind"
        raise _error(path, f"{count} values are one xz stream of {2 * count} bytes, found {found}")
    exponents, rest = np.frombuffer(planes, np.uint8).astype(np.uint32).reshape(2, count)
    signs, mantissas = rest >> _MANTISSA_BITS, rest & ((1 << _MANTISSA_BITS) - 1)
    flat = (signs << 31 | exponents << 23 | mantissas << _DROPPED_BITS).view(np.float32)
    parts = np.split(flat, np.cumsum(list(sizes.values()))[:-1])
    return {
        name: part.reshape(shape) for part, (name, shape) in zip(parts, shapes.items(), strict=True)
    }


def _error(path: str | Path, what: str) -> ModelFormatError:
    return ModelFormatError(f"{path} does not hold the weights: {what}; fetch it again")
