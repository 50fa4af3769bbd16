"""Checks of paths that a command is given, before it does any work."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from ..errors import RequestError, StorageError

__all__ = ["check_output", "check_outside", "put_text"]


def check_outside(source: Path, target: Path) -> None:
    """Raise RequestError where what is to be written is what is read, or lies in it."""
    read, written = Path(os.path.realpath(source)), Path(os.path.realpath(target))
    if read == written or _are_one_file(read, written):
        raise RequestError(f"{target} would be read and written at once: name another place")
    if read in written.parents:
        raise RequestError(f"{target} is inside {source}: name a place outside of it to write to")


def _are_one_file(first: Path, second: Path) -> bool:
    """Whether two names, such as hard links, stand for one file."""
    with contextlib.suppress(OSError):
        return os.path.samefile(first, second)
    return False


def check_output(file: Path, *sources: Path | None) -> None:
    """Raise RequestError or StorageError for a file that must not, or cannot, be written.

    It must not be one of `sources`, which are read, nor lie in one. Nothing is written yet.
    """
    for source in sources:
        if source is not None:
            check_outside(source, file)
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


def put_text(text: str, file: Path | None) -> None:
    """Write a text to the file, or print it where there is none. Raises StorageError."""
    if file is None:
        print(text, end="")
        return
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise StorageError(f"{file} cannot be written: {error.strerror or error}") from error
