"""What a session tells about itself: statistics, events, log lines, and the process's memory.

The logger "bapq_edge" has every event and every new plan at INFO, and what controller and policy
decide at DEBUG. As libraries do, it has no handler that prints.
"""

from __future__ import annotations

import ctypes
import logging
import sys
import time
import warnings
from collections import Counter, deque
from dataclasses import dataclass
from typing import NamedTuple

from .errors import BapqWarning, IgnoredSettingWarning, ResourceError
from .units import format_size

__all__ = [
    "AnswerCounts",
    "Event",
    "EventLog",
    "RunTotals",
    "SessionStats",
    "logger",
    "peak_rss_bytes",
    "rss_bytes",
    "trim_heap",
    "warn_caller",
    "warn_ignored",
]

logger = logging.getLogger("bapq_edge")
logger.addHandler(logging.NullHandler())


@dataclass(frozen=True)
class SessionStats:
    """A session at one moment: what `Session.stats()` gives."""

    level: int | None
    """Level of all chunks in the next run; None when they differ."""
    planned_bits_per_weight: float
    """Bits per weight of the next run, as planned: a mean over all weights of the bank."""
    predicted_error: float
    """Relative error of the outputs in the next run, as the bank's sensitivity table has it: norm
    of the error over norm of the outputs. Without calibration data it is a guess."""
    predicted_ms: float | None
    """Time of the next run in a row of runs, waiting for reads included; None: not measured, as
    where no budget is set."""
    plan: str
    """The plan in words: what is pinned and streamed, and what held level "auto" back."""
    resident_bytes: int
    """Weights in memory: pinned chunks, those that it shares with other sessions of the bank in
    this process included, ring and row cache."""
    peak_bytes: int
    """Growth of the process's peak resident memory (VmHWM) since just before the session opened.
    While an earlier, higher peak of the process hides it: the most that was seen, now and, under a
    budget, at the ends of runs."""
    streamed_bytes: int
    """Weights read from storage since the session opened."""
    read_wait_s: float
    """Time that operators waited for reads, all runs together."""
    bits_per_weight: float
    """Bits per weight of the last run, all its passes together; 0 before the first."""
    mean_bits_per_weight: float
    """Mean of the bits per weight over all runs; 0 before the first."""
    runs: int
    """Number of finished runs."""
    degraded: int
    """Number of runs in which chunks ran below their level, because they could not be read."""
    switches: int
    """Number of times that the plan changed levels."""
    escalated: int
    """Number of runs that were answered again, at another precision."""
    late: int
    """Number of runs whose answer stands though in doubt, for want of time."""
    samples: int
    """Number of samples that a policy told regions of; a run without counts as one."""
    escalated_samples: int
    """Number of those that were answered again."""
    whole_batches: int
    """Number of runs that answered a batch again with the samples that were in no doubt, as the
    bank does not know its samples to be apart."""
    region: int | None
    """Region of the last input, where a boundary model found one."""


class AnswerCounts(NamedTuple):
    """What a policy made of one run, as statistics count it."""

    region: int | None
    """Region of the input, of a batch the one most in doubt; None: the policy told none."""
    escalated: bool
    """Whether the input, or samples of it, were answered again."""
    late: bool
    """Whether it was not answered again for want of time."""
    samples: int
    """Samples of the input, as far as the policy told their regions; else 1."""
    escalated_samples: int
    """Samples that were answered again."""
    whole_batch: bool
    """Whether samples that were in no doubt were answered again with those that were."""


@dataclass
class RunTotals:
    """What the finished runs of a session add up to."""

    runs: int = 0
    bits: float = 0.0
    """Bits per weight, of all runs together."""
    last_bits: float = 0.0
    """Bits per weight of the last run."""
    degraded: int = 0
    escalated: int = 0
    late: int = 0
    samples: int = 0
    escalated_samples: int = 0
    whole_batches: int = 0
    region: int | None = None

    def count(self, bits: float, degraded: bool) -> None:
        """Add a run that read so many bits per weight, with chunks below their level or not."""
        self.runs += 1
        self.degraded += degraded
        self.last_bits = bits
        self.bits += bits

    def count_answer(self, answer: AnswerCounts) -> None:
        """Add what a policy made of a run."""
        self.region = answer.region
        self.escalated += answer.escalated
        self.late += answer.late
        self.samples += answer.samples
        self.escalated_samples += answer.escalated_samples
        self.whole_batches += answer.whole_batch


@dataclass(frozen=True)
class Event:
    """Something that changed how the session answers; `str()` gives it as one line."""

    time_s: float
    """Time since the session opened."""
    kind: str
    """One of: open, switch (other levels), budget, memory, request, controller (other pinned
    chunks), storage (reading holds level "auto" back, or its speed changed), degraded, sensor,
    drift (other inputs than calibration saw), latency, close."""
    bits_per_weight: float
    """Bits per weight that are planned after the event."""
    previous_bits_per_weight: float | None
    """Bits per weight that were planned before a switch; None for other kinds."""
    weight_bytes: int
    """Bytes that are planned for pinned chunks and ring after the event."""
    reason: str
    """What caused it, in one line."""

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

    def __init__(self, source: str) -> None:
        """Begin without events; `source`, the bank's name, begins every log line."""
        self.source = source
        self.opened_s = time.monotonic()
        """When time began to count, as time.monotonic()."""
        self._events: deque[Event] = deque(maxlen=_EVENTS_KEPT)
        self._counts: Counter[str] = Counter()

    def record(
        self,
        kind: str,
        reason: str,
        *,
        bits_per_weight: float = 0.0,
        previous_bits_per_weight: float | None = None,
        weight_bytes: int = 0,
    ) -> Event:
        """Append an event of this moment, and log it."""
        time_s = time.monotonic() - self.opened_s
        event = Event(time_s, kind, bits_per_weight, previous_bits_per_weight, weight_bytes, reason)
        self._events.append(event)
        self._counts[kind] += 1
        logger.info("%s: %s", self.source, event)
        return event

    def events(self) -> list[Event]:
        """A copy of the last ones kept."""
        return list(self._events)

    def count(self, kind: str) -> int:
        """Number of events of a kind, those no longer kept included."""
        return self._counts[kind]


def warn_caller(text: str, category: type[BapqWarning]) -> None:
    """Warn at the line outside the package that led here."""
    depth, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("bapq_edge."):
        depth, frame = depth + 1, frame.f_back
    warnings.warn(text, category, stacklevel=depth)


_told: set[str] = set()
"""Settings that this process was warned of."""


def warn_ignored(setting: str, reason: str) -> None:
    """Give an IgnoredSettingWarning, the first time that this setting is ignored."""
    if setting not in _told:
        _told.add(setting)
        warn_caller(f"{setting} is not honoured: {reason}", IgnoredSettingWarning)


def _status_bytes(field: str) -> int:
    try:
        with open("/proc/self/status", encoding="utf-8") as status:
            for line in status:
                if line.startswith(field):
                    return int(line.split()[1]) * 1024
    except OSError as error:
        raise ResourceError(
            f"the memory of this process cannot be read: {error.strerror}: "
            f"{ResourceError.more_handles}"
        ) from error
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
