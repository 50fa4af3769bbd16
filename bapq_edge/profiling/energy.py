"""Energy out of what a meter tells: a track of samples, and what a piece of it amounts to."""

from __future__ import annotations

import itertools
import math
import statistics
from bisect import bisect_left
from dataclasses import dataclass

from ..control.device_profile import DeviceProfile
from ..errors import ProfileError
from ..sensors import Readings

__all__ = ["EnergyPerRun", "EnergyTrack", "Idle", "Piece", "estimate_energy"]

_GAP_STEPS = 5
"""A step of so many usual ones is a gap."""
_SAME_SAMPLE_S = 0.02
"""Two ages of one answer differ by what passed between reading and looking at the clock."""


@dataclass(frozen=True)
class Idle:
    """What the board draws while nothing of ours runs."""

    power_w: float
    wall_s: float
    """Time that it was measured for."""
    error_w: float
    """Of sampling; the meter's own error is that of the energy."""


@dataclass(frozen=True)
class Piece:
    """A piece of a track."""

    energy_j: float
    error_j: float
    """Of sampling: half of the samples would have given that much more or less."""


@dataclass(frozen=True)
class EnergyPerRun:
    """Energy of one run, the idle board's subtracted: what commands give in their JSON."""

    energy_j: float
    error_j: float
    """Of the meter, where its error is known, and of sampling; of an estimate, its profile's."""
    idle_w: float
    """Power of the idle board, which was subtracted."""
    idle_s: float
    """Time that it was measured for before, in seconds; 0 for an estimate."""
    power_source: str
    power_scope: str | None
    power_hz: float | None
    """Samples per second; None for an estimate."""
    estimated: bool

    def __str__(self) -> str:
        """In one line, with all that the figure rests on."""
        digits = max(0, 2 - math.floor(math.log10(abs(self.energy_j) * 1e3 or 1.0)))
        figure = f"{self.energy_j * 1e3:.{digits}f} ± {self.error_j * 1e3:.{digits}f} mJ a run"
        if self.estimated:
            return f"estimate: {figure} more than idle ({self.idle_w:.2f} W), {self.power_source}"
        scope = "" if self.power_scope is None else f" ({self.power_scope})"
        return (
            f"{figure} more than idle ({self.idle_w:.2f} W, measured for {self.idle_s:.1f} s "
            f"before); {self.power_source}{scope}, {self.power_hz:.1f} Hz"
        )


def estimate_energy(profile: DeviceProfile, threads: int, run_s: float) -> EnergyPerRun:
    """What a run would take by the profile's power model: busy cores beside idle ones, linear.

    Raises ProfileError where the profile has none.
    """
    if profile.idle_w is None or profile.busy_w is None or profile.power_error_percent is None:
        raise ProfileError(
            f"profile {profile.name} has no power model: give it idle_w, busy_w and "
            "power_error_percent"
        )
    share = min(threads, profile.cores) / profile.cores
    energy_j = (profile.busy_w - profile.idle_w) * share * run_s
    return EnergyPerRun(
        energy_j=energy_j,
        error_j=energy_j * profile.power_error_percent / 100,
        idle_w=profile.idle_w,
        idle_s=0.0,
        power_source=f"power model of the profile {profile.name}",
        power_scope="board",
        power_hz=None,
        estimated=True,
    )


class EnergyTrack:
    """Samples as energy counted until then: of power by trapezoids, of a counter as it stands."""

    def __init__(self) -> None:
        self._times_s: list[float] = []
        self._joules: list[float] = []
        self._powers_w: list[float | None] = []
        self._counter_j: float | None = None

    def __len__(self) -> int:
        return len(self._times_s)

    @property
    def last_s(self) -> float:
        """Time of the last sample."""
        return self._times_s[-1] if self._times_s else -math.inf

    def add(self, readings: Readings, now_s: float) -> bool:
        """Take in what was read just now; False where it tells no power and no energy.

        An answer that is told again counts once, for when it was measured.
        """
        counts = readings.energy_j is not None
        if not counts and readings.power_w is None:
            return False
        time_s = now_s - (readings.power_age_s or 0.0)
        last_s = self.last_s
        same_s = 0.0 if readings.power_age_s is None else _SAME_SAMPLE_S
        if time_s - last_s <= (0.0 if counts else same_s):
            return True
        joules = 0.0
        if self._times_s:
            joules = self._joules[-1]
            if readings.energy_j is not None:
                joules += max(readings.energy_j - (self._counter_j or 0.0), 0.0)
            elif readings.power_w is not None:
                before_w = self._powers_w[-1]
                before_w = readings.power_w if before_w is None else before_w
                joules += (time_s - last_s) * (before_w + readings.power_w) / 2
        self._counter_j = readings.energy_j
        self._times_s.append(time_s)
        self._joules.append(joules)
        self._powers_w.append(None if counts else readings.power_w)
        return True

    def piece(self, first: int, start_s: float, end_s: float) -> Piece | None:
        """From start to end, of the samples from number `first` on; None where they do not tell.

        Two are needed, of which one may be the last before the start. Between samples energy grows
        evenly; before the first and after the last, as beside them. In a gap, where samples are
        missing, the board is taken to draw its mean of the others.
        """
        if first >= len(self):
            return None
        if first and self._times_s[first] > start_s:
            first -= 1
        times_s, joules = self._times_s[first:], self._joules[first:]
        if len(times_s) < 2:
            return None
        energy_j = _between(times_s, joules, start_s, end_s)
        powers_w = [power for power in self._powers_w[first:] if power is not None]
        if len(times_s) == 2 or len(powers_w) < len(times_s):  # a counter has no gaps
            return Piece(energy_j, 0.0)
        halved_s, half_w = [*times_s[:-1:2], times_s[-1]], [*powers_w[:-1:2], powers_w[-1]]
        half_j = _between(halved_s, _integral(halved_s, half_w), start_s, end_s)
        gaps_s, gaps_j = _gaps(times_s, powers_w)
        outside_s = times_s[-1] - times_s[0] - gaps_s
        mean_w = (joules[-1] - joules[0] - gaps_j) / outside_s if gaps_s else 0.0
        spread_w = statistics.pstdev(powers_w) if gaps_s else 0.0
        bridged_j = energy_j - gaps_j + gaps_s * mean_w
        return Piece(bridged_j, math.hypot(energy_j - half_j, gaps_s * spread_w))


def _gaps(times_s: list[float], powers_w: list[float]) -> tuple[float, float]:
    """(seconds, joules by trapezoids) of all steps that are far longer than most."""
    steps_s = [after - before for before, after in itertools.pairwise(times_s)]
    longest_s = _GAP_STEPS * statistics.median(steps_s)
    gaps = [
        (step_s, step_s * (before_w + after_w) / 2)
        for step_s, (before_w, after_w) in zip(steps_s, itertools.pairwise(powers_w), strict=True)
        if step_s > longest_s
    ]
    return sum(step_s for step_s, _ in gaps), sum(joules for _, joules in gaps)


def _integral(times_s: list[float], powers_w: list[float]) -> list[float]:
    """Joules until each of the times."""
    joules = [0.0]
    for (before_s, before_w), (time_s, power_w) in itertools.pairwise(
        zip(times_s, powers_w, strict=True)
    ):
        joules.append(joules[-1] + (time_s - before_s) * (before_w + power_w) / 2)
    return joules


def _between(times_s: list[float], joules: list[float], start_s: float, end_s: float) -> float:
    return _at(times_s, joules, end_s) - _at(times_s, joules, start_s)


def _at(times_s: list[float], joules: list[float], time_s: float) -> float:
    right = min(max(bisect_left(times_s, time_s), 1), len(times_s) - 1)
    left = right - 1
    watts = (joules[right] - joules[left]) / (times_s[right] - times_s[left])
    return joules[left] + watts * (time_s - times_s[left])
