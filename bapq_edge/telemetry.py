"""What a session tells about itself: statistics, events, and the process's memory."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

__all__ = ["Event", "SessionStats", "peak_rss_bytes", "rss_bytes", "trim_heap"]


@dataclass(frozen=True)
class SessionStats:
    """One moment of a session."""

    level: int
    """level that the next run will use"""
    resident_bytes: int
    """weight bytes in memory"""
    peak_bytes: int
    """growth of the process's peak resident memory (VmHWM) since just before the session opened"""
    streamed_bytes: int
    """weight bytes read from storage since the session opened"""
    bits_per_weight: float
    """of the last run; 0 before the first"""
    mean_bits_per_weight: float
    """over all runs; 0 before the first"""
    runs: int
    switches: int
    escalated: int
    """runs that were answered twice, the second time at a higher level"""
    region: int | None
    """region of the last input, where the bank has a boundary model"""


@dataclass(frozen=True)
class Event:
    """Something that changed how the session answers."""

    time_s: float
    """seconds since the session opened"""
    kind: str
    """open, switch or close"""
    level: int
    """level after the event"""
    previous_level: int | None
    reason: str

    def __str__(self) -> str:
        """One line for a log."""
        change = f"level {self.level}"
        if self.previous_level not in (None, self.level):
            change = f"level {self.previous_level} -> {self.level}"
        return f"[{self.time_s:9.3f} s] {self.kind}: {change} ({self.reason})"


def _status_bytes(field: str) -> int:
    with open("/proc/self/status", encoding="ascii") as status:
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
