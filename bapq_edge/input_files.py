"""Files that a caller names: one that is missing or unreadable is refused alike, of any kind."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator

from .errors import InputFileError

__all__ = ["check_input_file", "check_seekable_file", "input_file_errors", "is_path"]


def is_path(value: object) -> bool:
    """Whether it can be the path of a file: text, or what stands for it, without a NUL."""
    if not isinstance(value, str | os.PathLike):
        return False
    text = os.fspath(value)
    return isinstance(text, str) and "\0" not in text


@contextlib.contextmanager
def input_file_errors(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn every OSError inside into an InputFileError that names the file and what to do."""
    try:
        yield
    except OSError as error:
        denied = error.errno in (errno.EACCES, errno.EPERM)
        step = "check its permissions" if denied else "check the path"
        reason = error.strerror or type(error).__name__
        name = os.fspath(path) or "''"
        raise InputFileError(f"{name} cannot be read: {reason}: {step}") from error


def check_input_file(path: str | os.PathLike[str]) -> None:
    """Raise InputFileError for a file that cannot be read, before any work is done. Opens nothing.

    A pipe is no harm: opening it here would take what is in it.
    """
    with input_file_errors(path):
        code = 0
        if stat.S_ISDIR(os.stat(path).st_mode):
            code = errno.EISDIR
        elif not os.access(path, os.R_OK):
            code = errno.EACCES
        if code:
            raise OSError(code, os.strerror(code))


def check_seekable_file(path: str | os.PathLike[str]) -> None:
    """Raise InputFileError for a pipe or a device: it cannot be read in any order, and may wait."""
    with input_file_errors(path):
        mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise InputFileError(
            f"{os.fspath(path)} is a pipe or a device, and must be read in any order: write it to "
            "a file first"
        )
