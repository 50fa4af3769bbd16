"""Time, memory and energy of a piece of code, in this process.

    with Meter() as meter:
        with meter.window("load"):
            session = Session("model.bank")
        with meter.window("run"):
            session.run(None, feed)
    print(*meter.windows, sep="\n")

What cannot be measured is None; nothing is estimated.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import TypeVar

from ..sensors import Sensors, open_sensors
from ..units import format_size

__all__ = ["Meter", "Window", "measure"]

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Window:
    """What one named piece of code took."""

    name: str
    """The name that the caller gave."""
    wall_s: float
    """Time that it took."""
    peak_growth_bytes: int | None
    """Peak of the process's resident memory (VmHWM) in the window, less what was resident when it
    began; None when the peak was before the window, for then nothing tells what it was in it."""
    rss_growth_bytes: int
    """Growth of the resident memory from the window's begin to its end."""
    rss_anon_bytes: int
    """Resident memory of the process's own, at the end."""
    rss_file_bytes: int
    """Resident pages of mapped files, such as libraries, at the end."""
    energy_j: float | None
    """Energy of the whole board, by its meter; None without two samples in the window."""
    power_source: str | None
    """Meter and rail; None where there is no meter."""
    power_hz: float | None
    """Samples per second that the meter really gave in the window."""

    def __str__(self) -> str:
        """One line."""
        peak = "before" if self.peak_growth_bytes is None else format_size(self.peak_growth_bytes)
        if self.energy_j is None or self.power_hz is None:
            energy = "no meter" if self.power_source is None else f"{self.power_source}: too short"
        else:
            energy = f"{self.energy_j:.3f} J of {self.power_source} at {self.power_hz:.1f} Hz"
        return f"{self.name}: {self.wall_s * 1e3:.1f} ms, peak growth {peak}, energy {energy}"


class Meter:
    """Measures named windows; a thread samples the power where there is a meter for it.

    Windows may nest and may be on several threads; they all see the process as a whole.
    """

    def __init__(self, *, sensors: Sensors | None = None, sample_hz: float = 20.0) -> None:
        """`sensors` are the board's unless given; they are closed with the meter."""
        self.windows: list[Window] = []
        self._sensors = open_sensors() if sensors is None else sensors
        self._period_s = 1 / sample_hz
        self._lock = threading.Lock()
        self._times_s: list[float] = []
        self._powers_w: list[float] = []
        self._source: str | None = None
        self._failures = 0
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Meter:
        """Begin to sample, if there is a power meter."""
        self._source = self._sensors.read().power_source
        if self._source is not None:
            self._thread = threading.Thread(target=self._watch, name="bapq-meter", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Stop sampling."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join()
        self._sensors.close()

    @contextlib.contextmanager
    def window(self, name: str) -> Iterator[None]:
        """Measure what is inside; it joins `windows` when it ends without an exception."""
        before = _ProcessMemory.now()
        first, failures = self._sample()
        start_s = time.monotonic()
        yield
        end_s = time.monotonic()
        after = _ProcessMemory.now()
        self._sample()
        peaked = after.peak_bytes > before.peak_bytes or before.peak_bytes == before.rss_bytes
        energy_j, power_hz = self._energy(first, failures, start_s, end_s)
        self.windows.append(
            Window(
                name=name,
                wall_s=end_s - start_s,
                peak_growth_bytes=after.peak_bytes - before.rss_bytes if peaked else None,
                rss_growth_bytes=after.rss_bytes - before.rss_bytes,
                rss_anon_bytes=after.anon_bytes,
                rss_file_bytes=after.file_bytes,
                energy_j=energy_j,
                power_source=self._source,
                power_hz=power_hz,
            )
        )

    def _watch(self) -> None:
        while not self._stopping.wait(self._period_s):
            self._sample()

    def _sample(self) -> tuple[int, int]:
        """Number of the first sample from now on, this one included; failures until now."""
        with self._lock:
            first = len(self._times_s)
            if self._source is None:
                return first, 0
            readings = self._sensors.read()
            time_s = time.monotonic()
            if readings.power_w is None or readings.power_source != self._source:
                self._failures += 1
                return first, self._failures
            # The firmware's answer is kept for seconds: it counts once, for when it was asked.
            if self._source.startswith("pmic"):
                time_s -= readings.vcgencmd_age_s or 0.0
                if self._times_s and time_s - self._times_s[-1] < _SAME_SAMPLE_S:
                    return first, self._failures
            self._times_s.append(time_s)
            self._powers_w.append(readings.power_w)
            return first, self._failures

    def _energy(
        self, first: int, failures: int, start_s: float, end_s: float
    ) -> tuple[float | None, float | None]:
        """(joules, samples per second): trapezoids between the samples, the ends held."""
        if self._source is None:
            return None, None
        with self._lock:
            times_s, powers_w = self._times_s[first:], self._powers_w[first:]
            failed = self._failures > failures
        power_hz = len(times_s) / (end_s - start_s)
        if len(times_s) < 2 or failed:
            return None, power_hz
        energy_j, last_s, last_w = 0.0, start_s, powers_w[0]
        for sampled_s, power_w in zip(times_s, powers_w, strict=True):
            time_s = min(max(sampled_s, start_s), end_s)
            energy_j += (time_s - last_s) * (last_w + power_w) / 2
            last_s, last_w = time_s, power_w
        return energy_j + (end_s - last_s) * last_w, power_hz


def measure(work: Callable[[], _Result], name: str = "") -> tuple[_Result, Window]:
    """What `work` returns, and what it took."""
    with Meter() as meter, meter.window(name or getattr(work, "__name__", "work")):
        result = work()
    return result, meter.windows[0]


_SAME_SAMPLE_S = 0.02
"""Two ages of one answer differ by what passed between reading and looking at the clock."""


@dataclass(frozen=True)
class _ProcessMemory:
    """The process's memory, all of one moment."""

    rss_bytes: int
    anon_bytes: int
    file_bytes: int
    peak_bytes: int

    @classmethod
    def now(cls) -> _ProcessMemory:
        fields = {}
        with open("/proc/self/status", encoding="ascii") as status:
            for line in status:
                name, _, value = line.partition(":")
                fields[name] = value
        names = ("VmRSS", "RssAnon", "RssFile", "VmHWM")
        return cls(*(int(fields[name].split()[0]) * 1024 for name in names))
