"""Directories that appear whole or not at all: built beside their final name, renamed into place.

A build that is killed leaves `<name>.bapq-building`, which the next build of that name removes.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from ..errors import BapqError, StorageError

__all__ = [
    "TEMPORARY_SUFFIXES",
    "Staging",
    "aside_of",
    "check_parent",
    "lock_directory",
    "storage_errors",
    "sync_directory",
]

TEMPORARY_SUFFIXES = (".bapq-building", ".bapq-replaced")
"""Endings of the final name: where a build works, and where the old directory waits if need be."""

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


@contextlib.contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn every OSError inside into a StorageError that names the path and what to do."""
    try:
        yield
    except BapqError:  # some of which are OSErrors too
        raise
    except OSError as error:
        step = {
            errno.ENOSPC: "free some space or choose another place",
            errno.EDQUOT: "free some of your quota or choose another place",
            errno.EFBIG: "raise the file size limit or choose another place",
            errno.EACCES: "check the permissions or choose another place",
            errno.EROFS: "choose a place that is writable",
            errno.ENOENT: f"create the directory {path.absolute().parent}",
        }.get(error.errno or 0, "check the disk")
        reason = error.strerror or type(error).__name__
        raise StorageError(f"{path}: {reason}: {step}") from error


def check_parent(path: Path) -> None:
    """Raise StorageError where the directory that should hold `path` is not there."""
    parent = path.absolute().parent
    if not parent.is_dir():
        raise StorageError(f"{parent} is no directory: create it first")


def sync_directory(path: Path) -> None:
    """Make the names in a directory survive a power loss."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def aside_of(final: Path) -> Path:
    """Where the old directory waits while two renames replace it."""
    final = Path(os.path.realpath(final))
    return final.with_name(final.name + TEMPORARY_SUFFIXES[1])


class Staging:
    """Context manager: build in `path`, then `commit()`; without it nothing remains.

    `check_replaceable(directory)` must raise unless what stands at the final name is of the kind
    being built; nothing else is ever replaced.
    """

    path: Path
    """The directory to build in."""

    def __init__(self, final: Path, check_replaceable: Callable[[Path], None]) -> None:
        # The target of a symbolic link is what gets replaced, not the link.
        self.final = Path(os.path.realpath(final))
        self.path = self.final.with_name(self.final.name + TEMPORARY_SUFFIXES[0])
        self._aside = aside_of(self.final)
        self._check_replaceable = check_replaceable
        self._locks: list[int] = []

    def __enter__(self) -> Staging:
        with storage_errors(self.final):
            self._settle_aside()  # of a build that was killed
            if os.path.lexists(self.final):
                self._check_replaceable(self.final)
            if os.path.lexists(self.path):
                self._remove_leftover()
            self.path.mkdir()
            try:
                self._locks.append(lock_directory(self.path))
            except BaseException:
                with contextlib.suppress(OSError):
                    self.path.rmdir()
                raise
        return self

    def __exit__(self, *exception: object) -> None:
        # After a commit this is the directory that was replaced.
        shutil.rmtree(self.path, ignore_errors=True)
        for lock in self._locks:
            os.close(lock)

    def commit(self) -> None:
        """Put the directory at its final name in one step; the caller has synced its files."""
        with storage_errors(self.final):
            sync_directory(self.path)
            if os.path.lexists(self.final):
                self._check_replaceable(self.final)
                # It takes the temporary name: no other build may begin there until it is removed.
                self._locks.append(lock_directory(self.final))
                if not _exchange(self.path, self.final):
                    self._replace_in_two_steps()
            else:
                os.rename(self.path, self.final)
            sync_directory(self.final.parent)

    def _settle_aside(self) -> None:
        """Remove the directory that moved aside, or move it back when nothing took its place."""
        if not os.path.lexists(self._aside):
            return
        if not os.path.lexists(self.final):
            os.rename(self._aside, self.final)
        # Before anything is removed: not every file system keeps the order of the two.
        sync_directory(self.final.parent)
        if os.path.lexists(self._aside):
            shutil.rmtree(self._aside)

    def _remove_leftover(self) -> None:
        if not self.path.is_dir() or self.path.is_symlink():
            raise StorageError(f"{self.path}: is in the way of the build: rename or remove it")
        lock = lock_directory(self.path)
        try:
            shutil.rmtree(self.path)
        finally:
            os.close(lock)

    def _replace_in_two_steps(self) -> None:
        try:
            os.rename(self.final, self._aside)
            os.rename(self.path, self.final)
        finally:
            self._settle_aside()


def lock_directory(path: Path) -> int:
    """Lock a directory, so that no other build takes it for a leftover; returns what to close.

    Raises StorageError when another build has it.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise StorageError(
            f"{path}: another program is building there: wait for it to finish"
        ) from None
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _exchange(first: Path, second: Path) -> bool:
    """Swap two directories atomically; False where the system cannot.

    rename(2) replaces no directory that has entries, so without the swap the old one would have to
    move aside first, and a crash in between would leave nothing at the name. Not every C library
    has renameat2 and not every file system the flag; then the two steps are all there is.
    """
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    arguments = (_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE)
    if renameat2(*arguments) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
        return False
    raise OSError(code, os.strerror(code), str(second))
