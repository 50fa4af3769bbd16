"""Warnings as the command line shows them: one line, without the place in the code."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Iterator
from typing import Any

from ..errors import BapqWarning

__all__ = ["warning_lines"]


@contextlib.contextmanager
def warning_lines() -> Iterator[None]:
    """Context in which a warning is a line on stderr; one of BAPQ-Edge's is never left out."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", BapqWarning)
        warnings.showwarning = _show
        yield


def _show(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: Any = None,
    line: str | None = None,
) -> None:
    print(f"bapq: warning: {' '.join(str(message).split())}", file=sys.stderr)
