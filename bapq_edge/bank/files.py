"""Reading files that may be anything: inside the bank, regular, and exactly as long as promised."""

from __future__ import annotations

import errno
import os
import stat

from ..errors import (
    BankFormatError,
    BankPathError,
    BankTruncatedError,
    OutOfMemoryError,
    ResourceError,
    StorageError,
)
from .npy import DIGEST_BYTES

try:
    from _blake2 import blake2b  # what hashlib offers, without the 3.5 MB of its OpenSSL
except ImportError:  # a Python other than CPython
    from hashlib import blake2b

__all__ = [
    "REPAIR",
    "blake2b",
    "digest_of",
    "digest_of_file",
    "exists",
    "file_size",
    "inside",
    "raw_digest_of",
    "read_at",
]

REPAIR = "copy or build the bank again"
"""Next step of every message about damaged files."""


def raw_digest_of(data: bytes) -> bytes:
    """BLAKE2b-128 as the digest tables hold it."""
    return blake2b(data, digest_size=DIGEST_BYTES).digest()


def digest_of(data: bytes) -> str:
    """BLAKE2b-128 as the manifest writes it."""
    return raw_digest_of(data).hex()


def digest_of_file(path: str | os.PathLike[str]) -> str:
    """BLAKE2b-128 of a file of any size, as the manifest writes it."""
    digest = blake2b(digest_size=DIGEST_BYTES)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def inside(root: str, file: str) -> str:
    """Real path of a file below `root`, a real path itself; BankPathError when a link leads out."""
    target = os.path.realpath(os.path.join(root, file))
    if not target.startswith(os.path.join(root, "")):
        raise BankPathError(
            f"{os.path.join(root, file)} leads to {target}, which is outside the bank: "
            "do not use this bank"
        )
    return target


def exists(path: str | os.PathLike[str], *, follow_symlinks: bool = True) -> bool:
    """Whether there is something at the path; StorageError where the system does not tell.

    Without `follow_symlinks` a link that leads nowhere is something, too.
    """
    try:
        os.stat(path, follow_symlinks=follow_symlinks)
    except (FileNotFoundError, NotADirectoryError, ValueError):  # no name has a NUL
        return False
    except OSError as error:
        raise _unreadable(os.fspath(path), error) from error
    return True


def file_size(path: str) -> int:
    """Size of a regular file that may be read: opening a pipe or a device could block for ever."""
    try:
        status = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        raise BankFormatError(f"{path} is absent: {REPAIR}") from None
    except OSError as error:
        raise _unreadable(path, error) from error
    if not stat.S_ISREG(status.st_mode):
        raise BankFormatError(f"{path} is not a regular file: {REPAIR}")
    if not os.access(path, os.R_OK):
        raise _unreadable(path, PermissionError(errno.EACCES, os.strerror(errno.EACCES)))
    return status.st_size


def read_at(path: str, offset: int, size: int) -> bytes:
    """Read exactly `size` bytes from `offset`; BankTruncatedError when the file ends before."""
    parts = []
    missing = size
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            while missing and (part := os.pread(descriptor, missing, offset + size - missing)):
                parts.append(part)
                missing -= len(part)
        finally:
            os.close(descriptor)
    except MemoryError:
        raise OutOfMemoryError(
            f"{path}: no memory for {size} bytes of it: stop other programs, or set a memory_budget"
        ) from None
    except OSError as error:
        raise _unreadable(path, error) from error
    if missing:
        raise BankTruncatedError(
            f"{path} ends at byte {offset + size - missing}, expected {offset + size}: {REPAIR}"
        )
    return b"".join(parts)


def _unreadable(path: str, error: OSError) -> StorageError | ResourceError:
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return ResourceError(
            f"{path} cannot be read: no file handle is free: {ResourceError.more_handles}"
        )
    reason = error.strerror or type(error).__name__
    return StorageError(f"{path} cannot be read: {reason}: check the permissions and the disk")
