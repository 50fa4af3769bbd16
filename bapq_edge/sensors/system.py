"""The sensors of a Linux machine, read below a root so that recorded trees test them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

from . import memory, power, thermal
from .firmware import Firmware, Vcgencmd
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
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Find the hardware below `root`; `vcgencmd` gives the output of one of its commands."""
        self._root = os.fspath(root)
        self._firmware = None if vcgencmd is None else Firmware(vcgencmd)
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
        power_w, power_source = self._power() or (None, None)
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
            power_w=power_w,
            power_source=power_source,
            temperature_c=temperature_c,
            temperature_source=zone,
            throttled=None if firmware is None else firmware.throttled,
            vcgencmd_age_s=None if firmware is None else firmware.age_s(time_s),
        )

    def _power(self) -> tuple[float, str] | None:
        """(watts, source) of the meter that is surest to measure the board."""
        metered = None
        if self._meter is not None and (watts := power.meter_w(self._meter)) is not None:
            metered = watts, self._meter.source
            if self._meter.total:
                return metered
        pmic = None if self._firmware is None else self._firmware.power
        return pmic or metered or power.battery_draw_w(self._supplies)

    def close(self) -> None:
        """Nothing is held between reads."""
