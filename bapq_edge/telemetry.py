"""What a session tells about itself: statistics, events, and the process's memory."""

from __future__ import annotations

import ctypes
import time
from collections import Counter, deque
from dataclasses import dataclass
from typing import Any

from .units import format_size

__all__ = ["Event", "EventLog", "SessionStats", "peak_rss_bytes", "rss_bytes", "trim_heap"]


@dataclass(frozen=True)
class SessionStats:
    """One moment of a session."""

    level: int | None
    """level of all chunks in the next run, None when they differ"""
    planned_bits_per_weight: float
    """of the next run"""
    resident_bytes: int
    """weight bytes in memory: pinned chunks, ring and row cache"""
    peak_bytes: int
    """growth of the process's peak resident memory (VmHWM) since just before the session opened"""
    streamed_bytes: int
    """weight bytes read from storage since the session opened"""
    read_wait_s: float
    """time that operators waited for reads, all runs together"""
    bits_per_weight: float
    """of the last run; 0 before the first"""
    mean_bits_per_weight: float
    """over all runs; 0 before the first"""
    runs: int
    switches: int
    escalated: int
    """runs that were answered again, at a higher precision"""
    late: int
    """runs whose answer stands though in doubt, for want of time"""
    region: int | None
    """region of the last input, where the bank has a boundary model"""


@dataclass(frozen=True)
class Event:
    """Something that changed how the session answers."""

    time_s: float
    """seconds since the session opened"""
    kind: str
    """open, switch (other levels), budget, memory, request, controller (other pinned chunks),
    degraded, sensor, drift (other inputs than calibration saw), latency or close"""
    bits_per_weight: float
    """planned, after the event"""
    previous_bits_per_weight: float | None
    """planned before a switch; None for other kinds"""
    weight_bytes: int
    """planned for pinned chunks and ring, after the event"""
    reason: str

    def __str__(self) -> str:
        """One line for a log."""
        change = f"{self.bits_per_weight:.2f} bits"
        if self.previous_bits_per_weight is not None:
            change = f"{self.previous_bits_per_weight:.2f} -> {change}"
        size = format_size(self.weight_bytes)
        return f"[{self.time_s:9.3f} s] {self.kind}: {change}, {size} ({self.reason})"


_EVENTS_KEPT = 10_000
"""A session that lives for months on a restless board must not grow by its own history."""


class EventLog:
    """The events of one session, oldest first. Safe to use from several threads."""

    def __init__(self) -> None:
        """Empty; time counts from now."""
        self.opened_s = time.monotonic()
        self._events: deque[Event] = deque(maxlen=_EVENTS_KEPT)
        self._counts: Counter[str] = Counter()

    def record(self, kind: str, reason: str, **values: Any) -> Event:
        """Append an event of this moment; `values` are the fields of Event that differ."""
        time_s = time.monotonic() - self.opened_s
        event = Event(time_s=time_s, kind=kind, reason=reason, **values)
        self._events.append(event)
        self._counts[kind] += 1
        return event

    def events(self) -> list[Event]:
        """A copy of the last ones kept."""
        return list(self._events)

    def count(self, kind: str) -> int:
        """Number of events of a kind, those no longer kept included."""
        return self._counts[kind]


def _status_bytes(field: str) -> int:
    with open("/proc/self/status", encoding="utf-8") as status:
        for line in status:
            if line.startswith(field):
                return int(line.split()[1]) * 1024
    return 0


def rss_bytes() -> int:
    """Resident memory of this process, in bytes."""
    return _status_bytes("VmRSS:")


def peak_rss_bytes() -> int:
    """Largest resident memory that this process ever had (VmHWM), in bytes."""
    return _status_bytes("VmHWM:")


def trim_heap() -> None:
    """Give the C library's free heap pages back to the system, where it is glibc."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
