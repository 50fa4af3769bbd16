"""Host side of BAPQ-Edge: compiles models into banks.

`build_bank` is loaded when it is first asked for: it needs the packages of the extra [host], and
the command line must start without them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bapq_edge import __version__

if TYPE_CHECKING:
    from .build import build_bank

__all__ = ["__version__", "build_bank"]


def __getattr__(name: str) -> Any:
    if name != "build_bank":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .extras import host_packages

    with host_packages():
        from .build import build_bank
    return build_bank
