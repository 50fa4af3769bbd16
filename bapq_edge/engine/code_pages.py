"""Code pages: what ONNX Runtime's library has in memory, given back when it is needed no more.

Making a session of a graph touches much more of that library than running it. Its pages are those
of a file, unchanged: the kernel brings back the ones that are touched again, from its page cache.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os

__all__ = ["release_code"]


def release_code(library: str) -> None:
    """Take the unchanged pages of a library out of this process's memory.

    `library` is its file, one that stays loaded as long as the process. Calls in progress go on.
    Where the kernel does not tell which pages are unchanged, nothing happens.
    """
    for address, size_bytes in _unchanged_ranges(os.path.realpath(library)):
        # What is locked in memory stays there: the call fails.
        _madvise()(address, size_bytes, mmap.MADV_DONTNEED)


@functools.cache
def _madvise() -> ctypes._NamedFuncPointer:
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return madvise


@functools.cache
def _unchanged_ranges(library: str) -> tuple[tuple[int, int], ...]:
    """(address, bytes) of the read-only mappings in which no page has a copy of its own.

    Such a copy, of a page that the loader wrote addresses to, is not in the file: dropping it would
    lose it.
    """
    ranges = []
    try:
        with open("/proc/self/smaps", encoding="utf-8", errors="surrogateescape") as smaps:
            candidate = None
            for line in smaps:
                name, _, rest = line.partition(" ")
                if not name.endswith(":"):  # the head of the next mapping: range, rights, ..., file
                    fields = line.rstrip("\n").split(maxsplit=5)
                    own = len(fields) == 6 and fields[5] == library
                    candidate = name if own and fields[1] in ("r--p", "r-xp") else None
                elif name == "Anonymous:" and candidate and int(rest.split()[0]) == 0:
                    first, end = (int(address, 16) for address in candidate.split("-"))
                    ranges.append((first, end - first))
    except OSError:  # a kernel without page monitoring
        return ()
    return tuple(ranges)
