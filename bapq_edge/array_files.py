"""Reads .npz and .npy files of plain arrays: what a model is fed with."""

from __future__ import annotations

import contextlib
import os
import struct
import zipfile
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .input_files import check_seekable_file, input_file_errors

__all__ = ["map_arrays", "read_arrays"]

_LOCAL_HEADER = struct.Struct("<26xHH")
"""Of a member of a zip file; the lengths of the name and of the extra field end it."""
_ZIP_MAGIC = b"PK"
_BLOCK_BYTES = 1 << 20


def read_arrays(path: str | os.PathLike[str]) -> dict[str, NDArray[Any]] | NDArray[Any]:
    """The arrays of an .npz by name, or the one array of an .npy, whatever the file is called.

    Raises InputFileError when it cannot be read, ValueError when it holds anything but plain
    arrays.
    """
    with _as_array_file(path), open(path, "rb") as file:  # np.load leaves a damaged file open
        loaded = np.load(file, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return loaded
        return {name: loaded[name] for name in loaded.files}


def map_arrays(path: str | os.PathLike[str]) -> dict[str, NDArray[Any]] | NDArray[Any]:
    """As `read_arrays`, but an array that is not compressed stays in its file, mapped.

    So it takes no memory that the system could not have back. The file must not change meanwhile.
    """
    with _as_array_file(path):
        with open(path, "rb") as file:
            is_npz = file.read(len(_ZIP_MAGIC)) == _ZIP_MAGIC
        if not is_npz:
            array: NDArray[Any] = np.lib.format.open_memmap(path, mode="r")
            return array
        with zipfile.ZipFile(path) as archive:
            return {
                info.filename.removesuffix(".npy"): _mapped(path, archive, info)
                for info in archive.infolist()
            }


def _mapped(
    path: str | os.PathLike[str], archive: zipfile.ZipFile, info: zipfile.ZipInfo
) -> NDArray[Any]:
    if info.compress_type == zipfile.ZIP_STORED:
        with archive.open(info) as member:
            version = np.lib.format.read_magic(member)
            if version == (1, 0):
                shape, by_column, dtype = np.lib.format.read_array_header_1_0(member)
                begin = member.tell()
                while member.read(_BLOCK_BYTES):  # compares the checksum at the end
                    pass
                if not dtype.hasobject and 0 not in shape:
                    begin += _data_offset(path, info)
                    order: Any = "F" if by_column else "C"
                    return np.memmap(path, dtype, "r", begin, shape, order)
    with archive.open(info) as member:
        return np.asarray(np.lib.format.read_array(member, allow_pickle=False))


def _data_offset(path: str | os.PathLike[str], info: zipfile.ZipInfo) -> int:
    with open(path, "rb") as file:
        file.seek(info.header_offset)
        name_bytes, extra_bytes = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
    return info.header_offset + _LOCAL_HEADER.size + int(name_bytes) + int(extra_bytes)


@contextlib.contextmanager
def _as_array_file(path: str | os.PathLike[str]) -> Iterator[None]:
    check_seekable_file(path)
    try:
        with input_file_errors(path):
            yield
    except (ValueError, EOFError, AttributeError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(
            f"{os.fspath(path)} is not an .npz file of plain arrays, nor an .npy; "
            "write it with numpy.savez"
        ) from error
