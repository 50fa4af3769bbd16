"""The seam into a session for what must see its parts: the profiler, tests and benchmarks.

    store = session.internals.store

No part of the public interface: what is in here changes from version to version.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .bank.reader import Bank
from .engine.graph import Graphs
from .engine.store import Store
from .planning.passes import Passes
from .planning.replanner import Replanner
from .telemetry import EventLog

if TYPE_CHECKING:  # only a session with a controller loads it
    from .control.monitor import Monitor

__all__ = ["Internals"]


@dataclass(frozen=True)
class Internals:
    """The parts of a session."""

    bank: Bank
    store: Store
    graphs: Graphs
    replanner: Replanner
    passes: Passes
    log: EventLog
    monitor: Monitor | None
    """The controller's thread; None without a controller."""
