"""Small files of /proc and /sys, read whole; absent, unreadable and malformed all give None."""

from __future__ import annotations

import os

__all__ = ["list_directory", "read_integer", "read_text"]

_READ_BYTES = 16384


def read_text(path: str) -> str | None:
    """The file's text without the space around it; None where it cannot be read.

    A file of /sys may exist and fail to read: PSI that is switched off, a gauge off its bus.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        parts = []
        while part := os.read(descriptor, _READ_BYTES):
            parts.append(part)
    except OSError:
        return None
    finally:
        os.close(descriptor)
    return b"".join(parts).decode("utf-8", errors="replace").strip()


def read_integer(path: str) -> int | None:
    """The file's only number; None where there is none."""
    text = read_text(path)
    try:
        return None if text is None else int(text)
    except ValueError:
        return None


def list_directory(path: str) -> list[str]:
    """Full paths of what is in the directory, sorted; empty where there is none."""
    try:
        return [os.path.join(path, name) for name in sorted(os.listdir(path))]
    except OSError:
        return []
