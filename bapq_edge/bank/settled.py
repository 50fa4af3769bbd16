"""Opening a bank while an update may take its place: all of the old one, or all of the new one."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from typing import TypeVar

from ..errors import BankError, StorageError

__all__ = ["open_settled"]

T = TypeVar("T", bound=contextlib.AbstractContextManager[object])

_PATIENCE_S = 30.0
"""An update exchanges the banks in one step, or in two; who meets them for so long is refused."""


def open_settled(path: str | os.PathLike[str], make: Callable[[], T]) -> T:
    """What `make` opens of the files of the bank at `path`, none of them another bank's.

    `make` is called again where another directory stands at the path afterwards. Raises what it
    raises where the bank is still the same.
    """
    end_s = time.monotonic() + _PATIENCE_S
    while True:
        before = _identity(path)
        last = time.monotonic() > end_s
        try:
            made = make()
        except (BankError, StorageError):
            if last or _identity(path) == before:
                raise
            continue
        if last or _identity(path) == before:
            return made
        made.__exit__(None, None, None)


def _identity(path: str | os.PathLike[str]) -> tuple[int, int, int] | None:
    """What tells one directory at the path from another; None: there is none.

    A directory may get the number of one that was removed, but not its time.
    """
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_ctime_ns
