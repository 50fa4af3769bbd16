"""Reads .npz and .npy files of plain arrays: what a model is fed with."""

from __future__ import annotations

import os
import zipfile
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .input_files import input_file_errors

__all__ = ["read_arrays"]


def read_arrays(path: str | os.PathLike[str]) -> dict[str, NDArray[Any]] | NDArray[Any]:
    """The arrays of an .npz by name, or the one array of an .npy, whatever the file is called.

    Raises InputFileError when it cannot be read, ValueError when it holds anything but plain
    arrays.
    """
    try:
        # np.load leaves a damaged file open.
        with input_file_errors(path), open(path, "rb") as file:
            loaded = np.load(file, allow_pickle=False)
            if isinstance(loaded, np.ndarray):
                return loaded
            return {name: loaded[name] for name in loaded.files}
    except (ValueError, EOFError, AttributeError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(
            f"{os.fspath(path)} is not an .npz file of plain arrays, nor an .npy; "
            "write it with numpy.savez"
        ) from error
