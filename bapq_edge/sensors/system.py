"""The sensors of a Linux machine, read below a root so that recorded trees test them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

from . import memory, power, thermal
from .firmware import Firmware, Vcgencmd
from .power_feed import PowerFeed
from .rapl import Rapl
from .readings import Readings

__all__ = ["SystemSensors"]

# What hardware there is changes only when someone plugs; finding it costs more than reading it.
_FIND_S = 30.0


class SystemSensors:
    """Reads /proc and /sys below `root`, and asks vcgencmd where there is one."""

    def __init__(
        self,
        root: str | os.PathLike[str] = "/",
        *,
        vcgencmd: Vcgencmd | None = None,
        vcgencmd_period_s: float = 5.0,
        power_feed: PowerFeed | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Find the hardware below `root`.

        `vcgencmd` gives the output of one of its commands, and is asked once per period at most;
        `power_feed` is a meter of the user's, which goes before all others.
        """
        self._root = os.fspath(root)
        self._firmware = None if vcgencmd is None else Firmware(vcgencmd, vcgencmd_period_s)
        self._feed = power_feed
        self._rapl = Rapl(self._root)
        self._clock = clock
        self._find(clock())

    def _find(self, time_s: float) -> None:
        self._found_s = time_s
        self._supplies = power.find_supplies(self._root)
        self._meter = power.find_meter(self._root)
        self._zones = thermal.find_zones(self._root)

    def read(self) -> Readings:
        """The readings of this moment."""
        time_s = self._clock()
        if time_s - self._found_s >= _FIND_S:
            self._find(time_s)
        firmware = self._firmware
        if firmware is not None:
            firmware.refresh(time_s)
        limit_bytes, used_bytes = memory.cgroup_bytes(self._root)
        metered = self._metered(time_s)
        temperature_c, zone = thermal.hottest_c(self._zones) or (None, None)
        return Readings(
            time_s=time_s,
            available_bytes=memory.available_bytes(self._root),
            rss_bytes=memory.process_rss_bytes(self._root),
            cgroup_limit_bytes=limit_bytes,
            cgroup_used_bytes=used_bytes,
            memory_pressure_percent=memory.pressure_percent(self._root),
            battery_percent=power.battery_percent(self._supplies),
            on_battery=power.on_battery(self._supplies),
            **({} if metered is None else metered.as_readings()),
            temperature_c=temperature_c,
            temperature_source=zone,
            throttled=None if firmware is None else firmware.throttled,
            vcgencmd_age_s=None if firmware is None else firmware.age_s(time_s),
        )

    def _metered(self, time_s: float) -> power.Power | None:
        """What the meter tells that is surest to measure the board."""
        if self._feed is not None:
            return self._feed.read()
        metered = None if self._meter is None else power.meter_power(self._meter)
        if metered is not None and self._meter is not None and self._meter.total:
            return metered
        pmic = None if self._firmware is None else self._firmware.power(time_s)
        found = pmic or metered or power.battery_draw(self._supplies)
        return found or self._rapl.read(time_s)

    def close(self) -> None:
        """Let go of the user's meter; nothing else is held between reads."""
        if self._feed is not None:
            self._feed.close()
