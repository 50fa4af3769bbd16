"""The extra [host]: what to say when its packages are absent."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from bapq_edge.errors import MissingExtraError

__all__ = ["host_packages"]


@contextlib.contextmanager
def host_packages(purpose: str = "building a bank") -> Iterator[None]:
    """Context for imports that need the extra; MissingExtraError when one is absent."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in ("bapq_edge", "bapq_tools"):
            raise
        raise MissingExtraError(
            f"{purpose} needs {error.name}, which is not installed: pip install 'bapq-edge[host]'"
        ) from error
