"""Files that a caller names: one that is missing or unreadable is refused alike, of any kind."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator

from .errors import InputFileError

__all__ = ["check_input_file", "input_file_errors"]


@contextlib.contextmanager
def input_file_errors(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn every OSError inside into an InputFileError that names the file and what to do."""
    try:
        yield
    except OSError as error:
        denied = error.errno in (errno.EACCES, errno.EPERM)
        step = "check its permissions" if denied else "check the path"
        reason = error.strerror or type(error).__name__
        raise InputFileError(f"{os.fspath(path)} cannot be read: {reason}: {step}") from error


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
