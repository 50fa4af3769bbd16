"""Opening a bank while an update may take its place: all of the old one, or all of the new one."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import TypeVar

from ..errors import BankError, StorageError

__all__ = ["open_settled"]

T = TypeVar("T", bound=contextlib.AbstractContextManager[object])

_ATTEMPTS = 20
"""An update exchanges the banks in one step, or in two; who meets so many is refused."""


def open_settled(path: str | os.PathLike[str], make: Callable[[], T]) -> T:
    """What `make` opens of the files of the bank at `path`, none of them another bank's.

    `make` is called again where another directory stands at the path afterwards. Raises what it
    raises where the bank is still the same.
    """
    for attempt in range(_ATTEMPTS):
        before = _identity(path)
        try:
            made = make()
        except (BankError, StorageError):
            if attempt == _ATTEMPTS - 1 or _identity(path) == before:
                raise
            continue
        if attempt == _ATTEMPTS - 1 or _identity(path) == before:
            return made
        made.__exit__(None, None, None)
    raise AssertionError("the last attempt returns or raises")


def _identity(path: str | os.PathLike[str]) -> tuple[int, int] | None:
    """What tells one directory at the path from another; None: there is none."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino
