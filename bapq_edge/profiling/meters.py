"""Time, memory and energy of a piece of code, in this process.

    with Meter() as meter:
        with meter.window("load"):
            session = Session("model.bank")
        with meter.window("run"):
            session.run(None, feed)
    print(*meter.windows, sep="\n")

`meter.measure_idle()` before gives every window its energy beyond that of the idle board. What
cannot be measured is None; nothing is estimated.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import TypeVar

from ..errors import RequestError
from ..sensors import Sensors, open_sensors
from ..units import format_size
from .energy import EnergyPerRun, EnergyTrack, Idle, Piece

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
    """Energy by the meter, all of its scope; None without two samples in the window, or where
    `void` says why."""
    energy_error_j: float | None
    """How far it may be off: the meter's own error, where that is known, and that of sampling."""
    net_energy_j: float | None
    """Energy beyond that of the idle board; None where that was not measured before."""
    net_energy_error_j: float | None
    """How far that may be off."""
    idle: Idle | None
    """What the idle board draws, where it was measured before."""
    power_source: str | None
    """Meter and rail; None where there is no meter."""
    power_scope: str | None
    """What the meter measures."""
    power_hz: float | None
    """Samples per second that the meter really gave in the window."""
    void: str | None
    """Why the window's energy does not count; None where nothing speaks against it."""

    def energy_per_run(self, runs: int) -> EnergyPerRun | None:
        """Energy of each of so many runs in the window; None where it was not measured."""
        if self.net_energy_j is None or self.net_energy_error_j is None or self.idle is None:
            return None
        return EnergyPerRun(
            energy_j=self.net_energy_j / runs,
            error_j=self.net_energy_error_j / runs,
            idle_w=self.idle.power_w,
            idle_s=self.idle.wall_s,
            power_source=self.power_source or "",
            power_scope=self.power_scope,
            power_hz=self.power_hz,
            estimated=False,
        )

    def __str__(self) -> str:
        """One line."""
        peak = "before" if self.peak_growth_bytes is None else format_size(self.peak_growth_bytes)
        if self.energy_j is None or self.power_hz is None:
            reason = self.void or "too short"
            energy = "no meter" if self.power_source is None else f"{self.power_source}: {reason}"
        else:
            energy = f"{self.energy_j:.3f} J of {self.power_source} at {self.power_hz:.1f} Hz"
            if self.net_energy_j is not None and self.idle is not None:
                energy += f", {self.net_energy_j:.3f} J beyond {self.idle.power_w:.2f} W idle"
        return f"{self.name}: {self.wall_s * 1e3:.1f} ms, peak growth {peak}, energy {energy}"


class Meter:
    """Measures named windows; a thread samples the power where there is a meter for it.

    Windows may nest and may be on several threads; they all see the process as a whole. Where the
    meter answers late, such as the Pi 5's PMIC, a window waits at its end for the answer, up to
    three seconds; that is no part of its time.
    """

    def __init__(self, *, sensors: Sensors | None = None, sample_hz: float = 20.0) -> None:
        """`sensors` are the board's unless given; they are closed with the meter."""
        self.windows: list[Window] = []
        self.idle: Idle | None = None
        """What `measure_idle` found."""
        self._period_s = 1 / sample_hz
        opened = open_sensors(vcgencmd_period_s=_PMIC_PERIOD_S) if sensors is None else sensors
        self._sensors = opened
        self._lock = threading.Lock()
        self._track = EnergyTrack()
        self._gaps_s: list[float] = []
        self._source: str | None = None
        self._scope: str | None = None
        self._error_percent: float | None = None
        self._failures = 0
        self._throttled: list[int] = []
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def power_source(self) -> str | None:
        """The power meter, while the `with` lasts; None where there is none."""
        return self._source

    def __enter__(self) -> Meter:
        """Begin to sample, if there is a power meter."""
        readings = self._sensors.read()
        self._source, self._scope = readings.power_source, readings.power_scope
        self._error_percent = readings.power_error_percent
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

    def measure_idle(self, seconds: float = 2.0) -> Idle | None:
        """Do nothing for so long, and keep what the board draws meanwhile; None without a meter."""
        if not seconds > 0:
            raise RequestError(f"seconds is {seconds!r}, it must be more than 0")
        if self._source is None:
            return None  # and nothing is waited for
        first, start_s = self._sample(), time.monotonic()
        time.sleep(seconds)
        end_s = time.monotonic()
        piece = self._piece(first, start_s, end_s)[0]
        wall_s = end_s - start_s
        self.idle = (
            None if piece is None else Idle(piece.energy_j / wall_s, wall_s, piece.error_j / wall_s)
        )
        return self.idle

    @contextlib.contextmanager
    def window(self, name: str) -> Iterator[None]:
        """Measure what is inside; it joins `windows` when it ends without an exception."""
        before = _ProcessMemory.now()
        first = self._sample()
        start_s = time.monotonic()
        yield
        end_s = time.monotonic()
        after = _ProcessMemory.now()
        piece, power_hz, void = self._piece(first, start_s, end_s)
        peaked = after.peak_bytes > before.peak_bytes or before.peak_bytes == before.rss_bytes
        self.windows.append(
            Window(
                name=name,
                wall_s=end_s - start_s,
                peak_growth_bytes=after.peak_bytes - before.rss_bytes if peaked else None,
                rss_growth_bytes=after.rss_bytes - before.rss_bytes,
                rss_anon_bytes=after.anon_bytes,
                rss_file_bytes=after.file_bytes,
                power_source=self._source,
                power_scope=self._scope,
                power_hz=power_hz,
                void=void,
                idle=self.idle,
                **self._energy(piece, end_s - start_s),
            )
        )

    def _watch(self) -> None:
        while not self._stopping.wait(self._period_s):
            self._sample()

    def _sample(self) -> _Mark:
        """Sample; what there was before."""
        with self._lock:
            mark = _Mark(len(self._track), self._failures, len(self._throttled))
            if self._source is None:
                return mark
            readings = self._sensors.read()
            now_s, last_s = time.monotonic(), self._track.last_s
            if readings.throttled is not None:
                self._throttled.append(readings.throttled)
            if readings.power_source != self._source or not self._track.add(readings, now_s):
                self._failures += 1
            elif self._track.last_s > last_s >= 0:
                self._gaps_s.append(self._track.last_s - last_s)
            return mark

    def _wait_for_answer(self, end_s: float) -> None:
        """Until the meter tells of the window's end, where it answers late but often enough."""
        if self._source is None or not self._gaps_s:
            return
        patience_s = min(2 * statistics.median(self._gaps_s[-20:]) + 0.1, _MOST_WAIT_S)
        while self._track.last_s < end_s and time.monotonic() < end_s + patience_s:
            time.sleep(0.01)
            self._sample()

    def _piece(
        self, first: _Mark, start_s: float, end_s: float
    ) -> tuple[Piece | None, float | None, str | None]:
        """(energy, samples per second, why it does not count) from a mark to just now."""
        if self._source is None:
            return None, None, None
        self._sample()
        self._wait_for_answer(end_s)
        with self._lock:
            throttled = {*self._throttled[first.throttled :]}
            void = None
            if self._failures > first.failures:
                void = "the meter failed"
            elif len(throttled) > 1:
                void = f"throttling changed: {', '.join(map(hex, sorted(throttled)))}"
            piece = None if void else self._track.piece(first.samples, start_s, end_s)
            return piece, (len(self._track) - first.samples) / (end_s - start_s), void

    def _energy(self, piece: Piece | None, wall_s: float) -> dict[str, float | None]:
        """The fields of a window that are joules."""
        own = (self._error_percent or 0.0) / 100
        energy_j = error_j = net_j = net_error_j = None
        if piece is not None:
            energy_j = piece.energy_j
            error_j = math.hypot(own * energy_j, piece.error_j)
            if self.idle is not None:
                net_j = energy_j - self.idle.power_w * wall_s
                idle_error_j = self.idle.error_w * wall_s
                net_error_j = math.hypot(own * net_j, piece.error_j, idle_error_j)
        return {
            "energy_j": energy_j,
            "energy_error_j": error_j,
            "net_energy_j": net_j,
            "net_energy_error_j": net_error_j,
        }


def measure(work: Callable[[], _Result], name: str = "") -> tuple[_Result, Window]:
    """What `work` returns, and what it took."""
    with Meter() as meter, meter.window(name or getattr(work, "__name__", "work")):
        result = work()
    return result, meter.windows[0]


_PMIC_PERIOD_S = 0.2
"""Wanted between two answers of the Pi 5's firmware; it is asked less often where it is slow."""
_MOST_WAIT_S = 3.0


@dataclass(frozen=True)
class _Mark:
    """Numbers of what there was at one moment."""

    samples: int
    failures: int
    throttled: int


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
