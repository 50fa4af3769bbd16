"""Host side of BAPQ-Edge: compiles models into banks, and fits boundary models to them.

`build_bank` and `fit` are loaded when they are first asked for: they need the packages of the extra
[host], and the command line must start without them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bapq_edge import __version__

if TYPE_CHECKING:
    from .boundary.fit import fit
    from .build import build_bank

__all__ = ["__version__", "build_bank", "fit"]


def __getattr__(name: str) -> Any:
    if name not in ("build_bank", "fit"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .build_support.extras import host_packages

    if name == "fit":
        with host_packages("fitting a boundary model"):
            from .boundary.fit import fit
        return fit
    with host_packages():
        from .build import build_bank
    return build_bank
