"""Checks of paths that a command is given, before it does any work."""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import RequestError, StorageError

__all__ = ["check_outside", "check_writable"]


def check_outside(source: Path, target: Path) -> None:
    """Raise RequestError where what is to be written is what is read, or lies in it."""
    read, written = Path(os.path.realpath(source)), Path(os.path.realpath(target))
    if read == written:
        raise RequestError(f"{target} would be read and written at once: name another place")
    if read in written.parents:
        raise RequestError(f"{target} is inside {source}: name a place outside of it to write to")


def check_writable(file: Path) -> None:
    """Raise StorageError for a file that cannot be written. Nothing is written yet."""
    folder = file.absolute().parent
    if file.is_dir():
        reason = "it is a directory"
    elif not folder.is_dir():
        reason = f"{folder} is no directory"
    elif not os.access(file if file.exists() else folder, os.W_OK):
        reason = "permission denied"
    else:
        return
    raise StorageError(f"{file} cannot be written: {reason}")
