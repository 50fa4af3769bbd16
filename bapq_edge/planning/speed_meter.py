"""How fast this session reads and computes; until it has read, what the board's profile states."""

from __future__ import annotations

import os
from collections import deque

import numpy as np
from numpy.typing import NDArray

from ..engine.store import Store
from .timing import Speeds

__all__ = ["SpeedMeter"]

_RUNS_KEPT = 5
"""The median of so many runs: one that the system disturbed changes nothing."""

_READ_DECAY = 0.8
"""What earlier reads count beside the latest: five runs or so are remembered."""

_NOTICEABLE = 1.3
"""Speeds that differ by less are the same: answers are not to change with every breath."""


class SpeedMeter:
    """The speeds of one session. Not thread-safe; its owner sees to that."""

    def __init__(self, store: Store, layers: int, storage_bytes_s: float | None) -> None:
        """Nothing is measured yet; `storage_bytes_s` is what the board's profile states."""
        self._store = store
        self._cores = len(os.sched_getaffinity(0))
        self._profile_bytes_s = storage_bytes_s
        self._read_bytes = self._read_s = self._read_core_s = 0.0
        self._runs: deque[NDArray[np.float64]] = deque(maxlen=_RUNS_KEPT)
        self._layers = layers

    def skip(self) -> None:
        """Let what was measured since the last call not count."""
        self._store.take_times()

    def learn(self) -> None:
        """Take in what was measured since the last call."""
        times = self._store.take_times()
        if times.read_bytes:
            self._read_bytes = _READ_DECAY * self._read_bytes + times.read_bytes
            self._read_s = _READ_DECAY * self._read_s + times.read_ns / 1e9
            self._read_core_s = _READ_DECAY * self._read_core_s + times.read_cpu_ns / 1e9
        if times.runs:
            self._runs.append(times.layer_ns / (1e9 * times.runs))

    def forget_computing(self) -> None:
        """Before a run on larger inputs than any before."""
        self._runs.clear()

    def speeds(self, threads: int) -> Speeds | None:
        """The speeds, where an operator runs on so many threads; None: not known."""
        bytes_s, core_s_per_byte = self._profile_bytes_s, 0.0
        if self._read_s > 0:
            bytes_s = self._read_bytes / self._read_s
            if threads >= self._cores:  # else the reader has a core of its own
                core_s_per_byte = self._read_core_s / self._read_bytes / self._cores
        if bytes_s is None:
            return None
        # Not np.median: it loads numpy.ma, which a budget would have to pay for.
        runs = np.sort(self._runs, axis=0) if self._runs else np.zeros((1, self._layers))
        return Speeds(bytes_s, runs[len(runs) // 2], core_s_per_byte)

    @staticmethod
    def moved(before: Speeds | None, now: Speeds | None, latency_s: float | None) -> int:
        """Whether a run can read noticeably more than before while it computes, 1, less, -1, or
        neither, 0."""
        if now is None:
            return 0
        if before is None:
            return 1
        was, is_now = (each.readable_bytes(latency_s or 0.0) for each in (before, now))
        return int(is_now > _NOTICEABLE * was) - int(was > _NOTICEABLE * is_now)
