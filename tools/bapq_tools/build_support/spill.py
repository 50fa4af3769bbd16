"""Large arrays that lie in files, and take memory only while they are worked on."""

from __future__ import annotations

import contextlib
import itertools
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from bapq_edge.bank.staging import storage_errors

_SMALLEST_BYTES = 1 << 20
"""Smaller arrays stay in memory."""


class Spill:
    """A folder of files that arrays are mapped to.

    To their users they are ordinary arrays. Processes that are given one map the same file.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._numbers = itertools.count()
        self._mapped: list[np.memmap] = []

    def put(self, array: np.ndarray) -> np.ndarray:
        """Return an array of the same values on disk."""
        result = self.zeros(array.shape, array.dtype)
        result[...] = array
        self.release()
        return result

    def zeros(self, shape: tuple[int, ...], dtype: np.dtype | type = np.float32) -> np.ndarray:
        """Return an array to be filled."""
        size_bytes = np.dtype(dtype).itemsize * int(np.prod(shape))
        if size_bytes < _SMALLEST_BYTES:
            return np.zeros(shape, dtype)
        path = self._folder / f"array_{next(self._numbers)}"
        with storage_errors(path), path.open("xb") as file:
            # A write to a mapping that the disk has no room for would end the process.
            os.posix_fallocate(file.fileno(), 0, size_bytes)
        self._mapped.append(np.memmap(path, dtype, "r+", shape=shape))
        return np.asarray(self._mapped[-1])

    def release(self) -> None:
        """Give back the memory that the arrays take; their values stay."""
        for array in self._mapped:
            if isinstance(array.base, mmap.mmap):
                array.base.madvise(mmap.MADV_DONTNEED)

    @contextlib.contextmanager
    def temporary(self) -> Iterator[None]:
        """Context whose arrays are removed at its end."""
        before = len(self._mapped)
        try:
            yield
        finally:
            for array in self._mapped[before:]:
                Path(str(array.filename)).unlink(missing_ok=True)
            del self._mapped[before:]
