"""The .npy files of a bank and of its exchange form, written and read without NumPy's parser.

A reader compares a header with the one it expects instead of evaluating it, so no header can make
it allocate, loop or unpickle. `numpy.load` opens the files all the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "BIAS_DTYPE",
    "CHUNK_DTYPE",
    "DIGEST_BYTES",
    "ROW_DTYPE",
    "SENSITIVITY_DTYPE",
    "array_bytes",
    "check_sensitivity",
    "chunk_table_bytes",
    "digest_table_bytes",
    "from_npy",
    "row_table_bytes",
    "sensitivity_table_bytes",
    "to_npy",
]

CHUNK_DTYPE = np.dtype([("offset", "<u8"), ("bytes", "<u4"), ("crc32", "<u4")])
"""One row of tables/<plane>_chunks.npy."""

DIGEST_BYTES = 16
"""BLAKE2b-128: short enough to keep one per chunk, long enough that no two ever agree by chance."""

SENSITIVITY_DTYPE = np.dtype("<f4")
ROW_DTYPE = np.dtype("<u4")
BIAS_DTYPE = np.dtype("<f4")

_MAGIC = b"\x93NUMPY\x01\x00"
_ALIGNMENT = 64
_TABLE_HEADER_BYTES = 128
"""Bytes of the header that `to_npy` gives every table which the limits of the manifest allow."""


def chunk_table_bytes(chunk_count: int) -> int:
    """Size of a chunk table's file."""
    return _TABLE_HEADER_BYTES + chunk_count * CHUNK_DTYPE.itemsize


def digest_table_bytes(chunk_count: int) -> int:
    """Size of a digest table's file."""
    return _TABLE_HEADER_BYTES + chunk_count * DIGEST_BYTES


def sensitivity_table_bytes(chunk_count: int, level_count: int) -> int:
    """Size of the sensitivity table's file."""
    return _TABLE_HEADER_BYTES + chunk_count * level_count * SENSITIVITY_DTYPE.itemsize


def array_bytes(dtype: np.dtype[Any], shape: tuple[int, ...]) -> int:
    """Size of the file of a small array."""
    return _TABLE_HEADER_BYTES + int(np.prod(shape)) * dtype.itemsize


def row_table_bytes(rows: int) -> int:
    """Size of the file of a table of rows, or of their bias."""
    return _TABLE_HEADER_BYTES + rows * ROW_DTYPE.itemsize


def check_sensitivity(
    table: NDArray[np.float32], levels: Sequence[int], held: NDArray[np.bool_]
) -> None:
    """Raise ValueError unless all of (chunks, levels) is finite and 0 or more.

    It must be 0 at level 32, and where the chunk's layer lacks the level: `held` is (chunks,
    levels), or (levels,) for the chunks of one layer.
    """
    # Without the sign bit, positive floats are ordered as their bits are, infinity the next one.
    wrong = table.view("<u4") >= np.float32(np.inf).view(np.uint32)
    silent = ~held | (np.asarray(levels) == 32)
    wrong = wrong | ((table != 0) & silent)
    if wrong.any():
        chunk, column = (int(i) for i in np.argwhere(wrong)[0])
        rule = "0" if np.broadcast_to(silent, table.shape)[chunk, column] else "finite, 0 or more"
        raise ValueError(
            f"chunk {chunk} has the sensitivity {float(table[chunk, column])!r} at level "
            f"{levels[column]}, must be {rule}"
        )


def to_npy(array: NDArray[Any]) -> bytes:
    """File bytes of a C-ordered array, .npy version 1.0.

    The header is padded to a multiple of 64; how far `numpy.save` pads depends on its version.
    """
    text = _header_text(array.dtype, array.shape)
    used = len(_MAGIC) + 2 + len(text) + 1
    text += " " * (-used % _ALIGNMENT) + "\n"
    return _MAGIC + len(text).to_bytes(2, "little") + text.encode("ascii") + array.tobytes()


def from_npy(data: bytes, dtype: np.dtype[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    """Array in a .npy file of exactly this type, shape and size; ValueError for any other."""
    start = len(_MAGIC) + 2
    size = start + int.from_bytes(data[len(_MAGIC) : start], "little")
    found = data[start:size].decode("latin-1").rstrip(" \n")
    expected = _header_text(dtype, shape)
    if not data.startswith(_MAGIC):
        raise ValueError(f"begins with {data[:8]!r}, expected .npy version 1.0")
    if found != expected:
        raise ValueError(f"has the .npy header {ascii(found)[:160]}, expected {expected}")
    values = int(np.prod(shape)) * dtype.itemsize
    if len(data) != size + values:
        raise ValueError(f"has {len(data) - size} bytes of values, expected {values}")
    return np.frombuffer(data, dtype, offset=size).reshape(shape)


def _header_text(dtype: np.dtype[Any], shape: tuple[int, ...]) -> str:
    descr = np.lib.format.dtype_to_descr(dtype)
    return f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape!r}, }}"
