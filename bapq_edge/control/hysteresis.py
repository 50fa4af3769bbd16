"""Shed at once, return slowly: the timing that every restriction of the controller shares."""

from __future__ import annotations

from ..sensors.readings import Readings

__all__ = ["Hold", "Ladder", "Presence"]


class Hold:
    """How long something has been good without a break."""

    def __init__(self, hold_s: float) -> None:
        """`hold_s`: how long is long enough."""
        self._hold_s = hold_s
        self._since_s: float | None = None

    def passed(self, time_s: float, good: bool) -> bool:
        """Whether it has been good for the hold time; if so, the next step needs another."""
        if not good:
            self._since_s = None
            return False
        if self._since_s is None:
            self._since_s = time_s
        if time_s - self._since_s < self._hold_s:
            return False
        self._since_s = time_s
        return True


class Ladder:
    """A restriction of several steps: up at once, down one step per hold time."""

    def __init__(self, hold_s: float) -> None:
        """Begin at step 0, which restricts nothing."""
        self.step = 0
        self._hold_s = hold_s
        self._hold = Hold(hold_s)

    def move(self, time_s: float, needed: int, relaxed: int, text: str) -> str | None:
        """Go to `needed` at once, or one step towards `relaxed`; the text when the step moved.

        `relaxed` is what the reading would need if every threshold were harder by its band.
        """
        if needed > self.step:
            self.step = needed
            self._hold.passed(time_s, False)
            return text
        if self._hold.passed(time_s, relaxed < self.step):
            self.step -= 1
            return f"{text} for {self._hold_s:g} s"
        return None

    def wait(self) -> None:
        """Stay while the reading is absent; time that was not seen is not good time."""
        self._hold.passed(0.0, False)


class Presence:
    """Which readings were there, to tell once when one goes."""

    _NAMES = (
        "available_bytes",
        "cgroup_used_bytes",
        "memory_pressure_percent",
        "battery_percent",
        "on_battery",
        "temperature_c",
        "throttled",
    )

    def __init__(self, hold_s: float) -> None:
        """`hold_s`: how long one must be back before its next going is told."""
        self._back = {name: Hold(hold_s) for name in self._NAMES}
        self._seen: set[str] = set()
        self._told: set[str] = set()

    def seen(self, name: str) -> bool:
        """Whether an earlier update had it."""
        return name in self._seen

    def lost(self, readings: Readings) -> tuple[str, ...]:
        """Names that have gone since they were last told; one that flickers is told once."""
        lost = []
        for name in self._NAMES:
            present = getattr(readings, name) is not None
            if self._back[name].passed(readings.time_s, present):
                self._told.discard(name)
            if present:
                self._seen.add(name)
            elif name in self._seen and name not in self._told:
                self._told.add(name)
                lost.append(name)
        return tuple(lost)
