"""The controller: readings in, envelope out. Pure and deterministic; time is that of the readings.

Every restriction sheds at once, as far as the reading demands, and returns one step per hold time,
after the reading has been on the good side of its threshold by a band for that long. An absent
reading changes nothing. docs/explanation/controller.md has the rules in full and a picture of them.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..bank.layout import Level
from ..errors import RequestError, SensorError
from ..sensors.readings import CAPPED_BITS, Readings
from ..units import format_size
from .config import ControllerConfig
from .envelope import Decision, Envelope
from .hysteresis import Ladder, Presence
from .memory_guard import MemoryGuard, free_memory

__all__ = ["Controller", "ControllerConfig", "Decision", "Envelope", "automatic_budget_bytes"]

AUTOMATIC_SHARE = 0.5


def automatic_budget_bytes(
    readings: Readings, share: float = AUTOMATIC_SHARE, held_bytes: int = 0
) -> tuple[int, str]:
    """(budget, reason) of memory_budget="auto": a share of what system and cgroup have free.

    The tighter of the two counts; what the session holds already, `held_bytes`, counts as free.

    Raises SensorError when neither can be read.
    """
    free = free_memory(readings)
    if not free:
        raise SensorError(
            "memory_budget is 'auto', but neither available memory nor a cgroup limit can be read: "
            "give it as a size, such as 64MiB"
        )
    name, free_bytes = min(free, key=lambda pair: pair[1])
    held = f" and {format_size(held_bytes)} of the session's own" if held_bytes else ""
    reason = f"{share:.0%} of {name} {format_size(free_bytes)}{held}"
    return int((free_bytes + held_bytes) * share), reason


class Controller:
    """Turns readings into the envelope of a session. Not thread-safe: one thread updates it."""

    def __init__(
        self,
        config: ControllerConfig,
        levels: Sequence[Level],
        budget_bytes: int | None,
        *,
        threads: int = 1,
        minimum_bytes: int = 0,
    ) -> None:
        """Begin with nothing restricted.

        Args:
            config: the thresholds.
            levels: those that the bank can run at.
            budget_bytes: most weight bytes when memory is plenty; None is no limit.
            threads: threads when the board is cool.
            minimum_bytes: the weight limit never goes below it.
        """
        if not levels:
            raise RequestError("levels is empty, a controller needs at least one")
        self._levels = sorted(levels)
        self._threads = threads
        self._battery = Ladder(config.hold_s)
        self._heat = Ladder(config.hold_s)
        self._memory = MemoryGuard(config, budget_bytes, minimum_bytes)
        self._config = config
        self._presence = Presence(config.hold_s)
        self._reasons: dict[str, str] = {}
        self._envelope = self._make_envelope()

    @property
    def envelope(self) -> Envelope:
        """What the last update allowed."""
        return self._envelope

    def set_budget(self, budget_bytes: int | None, minimum_bytes: int = 0) -> Envelope:
        """Take another budget; a limit that memory holds below it stays where it is."""
        self._memory.set_budget(budget_bytes, minimum_bytes)
        if not self._memory.restricted:
            self._reasons.pop("memory", None)
        self._envelope = self._make_envelope()
        return self._envelope

    def update(self, readings: Readings, *, weight_bytes: int | None = None) -> Decision:
        """Decide on new readings.

        `weight_bytes`, the weights that are in memory now, lets the limit bite at once when they
        are fewer than it allows; without it, shedding counts from the limit.
        """
        causes = {
            "memory": self._memory.update(readings, weight_bytes),
            "heat": self._update_heat(readings),
            "battery": self._update_battery(readings),
        }
        restricted = {
            "memory": self._memory.restricted,
            "heat": self._heat.step > 0,
            "battery": self._battery.step > 0,
        }
        for name, cause in causes.items():
            if not restricted[name]:
                self._reasons.pop(name, None)
            elif cause is not None:
                self._reasons[name] = cause
        previous, self._envelope = self._envelope, self._make_envelope()
        changed = _limits(previous) != _limits(self._envelope)
        told = [cause for cause in causes.values() if cause is not None]
        return Decision(
            self._envelope,
            changed,
            "; ".join(told) if changed else None,
            self._presence.lost(readings),
        )

    def _update_heat(self, readings: Readings) -> str | None:
        config, celsius = self._config, readings.temperature_c
        capped = None if readings.throttled is None else bool(readings.throttled & CAPPED_BITS)
        if capped:
            words = ", ".join(readings.throttled_now or ())
            return self._heat.move(readings.time_s, 1, 1, f"throttled: {words}")
        if celsius is None:
            # Without a thermometer the firmware's word is enough, unless there was one before.
            known = capped is not None and not self._presence.seen("temperature_c")
            if not known:
                self._heat.wait()
                return None
            return self._heat.move(readings.time_s, 0, 0, "throttled: no more")
        limit_c = config.temperature_limit_c
        needed = int(celsius >= limit_c)
        relaxed = int(celsius >= limit_c - config.temperature_band_c)
        if capped is None and self._presence.seen("throttled"):
            relaxed = 1  # what was said to be throttled has not been said to be over
        sign = ">=" if needed else "<"
        threshold_c = limit_c if needed else limit_c - config.temperature_band_c
        return self._heat.move(
            readings.time_s, needed, relaxed, f"temperature_c {celsius:.1f} {sign} {threshold_c:g}"
        )

    def _update_battery(self, readings: Readings) -> str | None:
        config, percent = self._config, readings.battery_percent
        if readings.on_battery is False:
            return self._battery.move(readings.time_s, 0, 0, "on_battery 0")
        if percent is None or (readings.on_battery is None and self._presence.seen("on_battery")):
            self._battery.wait()
            return None
        thresholds = (config.battery_low_percent, config.battery_critical_percent)
        band = config.battery_band_percent
        needed = sum(percent < threshold for threshold in thresholds)
        relaxed = sum(percent < threshold + band for threshold in thresholds)
        if needed > self._battery.step:
            text = f"battery_percent {percent:.3g} < {thresholds[needed - 1]:g}"
        else:
            passed = thresholds[max(0, self._battery.step - 1)] + band
            text = f"battery_percent {percent:.3g} >= {passed:g}"
        return self._battery.move(readings.time_s, needed, relaxed, text)

    def _make_envelope(self) -> Envelope:
        config = self._config
        caps: list[int] = [self._levels[-1]]
        if self._battery.step:
            low, critical = config.battery_low_level, config.battery_critical_level
            caps.append(low if self._battery.step == 1 else critical)
        threads = self._threads
        if self._heat.step:
            caps.append(config.hot_level)
            threads = max(1, threads // 2)
        # A bank without so low a level runs at the lowest it has.
        allowed = [level for level in self._levels if level <= min(caps)] or self._levels[:1]
        return Envelope(
            self._memory.limit_bytes, allowed[-1], threads, tuple(self._reasons.values())
        )


def _limits(envelope: Envelope) -> tuple[int | None, int, int]:
    return envelope.weight_bytes_limit, envelope.highest_level, envelope.threads
