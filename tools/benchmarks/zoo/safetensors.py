"""Reader of safetensors files: every offset checked before a byte is used, data mapped, not copied.

Format: 8 bytes little-endian header length, a JSON header {name: {dtype, shape, data_offsets}},
then the data, which the tensors cover without hole or overlap.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np

from bapq_edge.errors import ModelFormatError

__all__ = ["read_safetensors"]

_DTYPES = {"F32": "<f4", "F16": "<f2", "F64": "<f8", "I64": "<i8", "I32": "<i4", "U8": "|u1"}
_HEADER_LIMIT = 100_000_000
"""Most bytes of a header, as the format's own reference reader has it."""


def read_safetensors(path: str | Path) -> dict[str, np.ndarray]:
    """Read-only arrays over a memory map of the file, by name.

    Raises ModelFormatError for a file that breaks the format.
    """
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        if size < 8 or header_bytes > min(size - 8, _HEADER_LIMIT):
            raise _error(path, f"a header of {header_bytes} bytes does not fit a file of {size}")
        raw_header = file.read(header_bytes)
    try:
        header = json.loads(raw_header, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise _error(path, f"the header is not valid JSON ({error})") from None
    if not isinstance(header, dict):
        raise _error(path, f"the header is a {type(header).__name__}, not an object")
    header.pop("__metadata__", None)

    start = 8 + header_bytes
    data = np.memmap(path, np.uint8, mode="r", offset=start) if size > start else np.empty(0, "u1")
    spans = {name: _span(path, name, entry, len(data)) for name, entry in header.items()}
    position = 0
    for name, (begin, end) in sorted(spans.items(), key=lambda item: item[1]):
        if begin != position:
            raise _error(path, f"tensor {name!r} starts at {begin}, the one before ends {position}")
        position = end
    if position != len(data):
        raise _error(path, f"the tensors cover {position} of {len(data)} data bytes")
    return {
        name: data[slice(*spans[name])].view(_DTYPES[entry["dtype"]]).reshape(entry["shape"])
        for name, entry in header.items()
    }


def _span(path: str | Path, name: str, entry: Any, data_bytes: int) -> tuple[int, int]:
    """The begin and end of one tensor in the data, checked against its type and shape."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _error(path, f"tensor {name!r} lacks dtype, shape or data_offsets, or has more")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise _error(path, f"tensor {name!r} has type {dtype!r}, not one of {', '.join(_DTYPES)}")
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise _error(path, f"tensor {name!r} has shape {shape!r} and offsets {offsets!r}")
    begin, end = offsets
    if not begin <= end <= data_bytes:
        raise _error(path, f"tensor {name!r} spans {begin}..{end} of {data_bytes} data bytes")
    need = math.prod(shape) * np.dtype(_DTYPES[dtype]).itemsize
    if end - begin != need:
        raise _error(path, f"tensor {name!r} spans {end - begin} bytes, its shape needs {need}")
    return begin, end


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(v) is int and v >= 0 for v in values)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key appears twice")
    return result


def _error(path: str | Path, what: str) -> ModelFormatError:
    return ModelFormatError(f"{path} is not a valid safetensors file: {what}; fetch it again")
