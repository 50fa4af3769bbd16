"""Storage: what class of disk a path is on, and how fast a file can be read from it."""

from __future__ import annotations

import contextlib
import mmap
import os
import time
from pathlib import Path

__all__ = ["read_bytes_s", "storage_class"]


def storage_class(path: str | os.PathLike[str], root: str = "/") -> str | None:
    """sd, emmc, usb, sata or nvme: the class of the disk below this path; None where unknown."""
    try:
        device = os.stat(path).st_dev
        block = Path(root, "sys/dev/block", f"{os.major(device)}:{os.minor(device)}").resolve(True)
    except OSError:
        return None
    words = block.parts
    for word in words:
        if word.startswith("nvme"):
            return "nvme"
        if word.startswith("mmcblk"):
            kind = Path(*words[: words.index(word) + 1]) / "device" / "type"
            try:
                return "sd" if kind.read_text().strip() == "SD" else "emmc"
            except OSError:
                return None
        if word.startswith("sd") and word[2:3].isalpha():
            return "usb" if any(part.startswith("usb") for part in words) else "sata"
    return None


def read_bytes_s(file: Path, *, direct: bool, block_bytes: int, most_bytes: int) -> float:
    """Bytes per second of the file's first bytes, around the page cache.

    Raises OSError, also where direct reads are asked for and the file system has none.
    """
    flags = os.O_RDONLY | os.O_CLOEXEC | (os.O_DIRECT if direct else 0)
    descriptor = os.open(file, flags)
    with contextlib.ExitStack() as undo:
        undo.callback(os.close, descriptor)
        buffer = mmap.mmap(-1, block_bytes)  # direct reads want it aligned, and this is
        undo.callback(buffer.close)
        buffer[:] = bytes(block_bytes)  # the pages are there before the clock starts
        if not direct:
            os.posix_fadvise(descriptor, 0, most_bytes, os.POSIX_FADV_DONTNEED)
        done, started_s = 0, time.perf_counter()
        while done < most_bytes:
            count = os.preadv(descriptor, [buffer], done)
            done += count
            if count < block_bytes:
                break
        return done / (time.perf_counter() - started_s)
