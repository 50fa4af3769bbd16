"""Sensors: memory, power and temperature of the device, or a mock that plays a trace.

    open_sensors() ──► Sensors.read() ──► Readings ──► controller.py

Everything may be absent, and what is absent reads None. docs/explanation/controller.md says what is
read where.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from ..errors import SensorError
from .firmware import system_vcgencmd
from .mock import MockSensors
from .power_feed import open_feed
from .readings import CAPPED_BITS, Readings, Sensors
from .system import SystemSensors

__all__ = ["CAPPED_BITS", "MockSensors", "Readings", "Sensors", "SystemSensors", "open_sensors"]


def open_sensors(
    root: str | os.PathLike[str] = "/",
    environment: Mapping[str, str] = os.environ,
    vcgencmd_period_s: float = 5.0,
) -> Sensors:
    """The sensors of this machine, or the mock that BAPQ_SENSORS asks for.

    BAPQ_SENSORS=mock:trace.csv plays a trace in real time, mock-step:trace.csv one row per read.
    BAPQ_POWER=file:PATH and socket:PLACE name a power meter of the user's. Below another root than
    "/" there is no vcgencmd, which is asked once per period at most. Raises SensorError.
    """
    setting = environment.get("BAPQ_SENSORS", "")
    kind, _, path = setting.partition(":")
    if kind in ("mock", "mock-step") and path:
        return MockSensors(path, step=kind == "mock-step")
    if setting:
        raise SensorError(
            f"BAPQ_SENSORS is {setting!r}; "
            "it can be mock:trace.csv or mock-step:trace.csv, or not be set"
        )
    meter = environment.get("BAPQ_POWER", "")
    return SystemSensors(
        root,
        vcgencmd=system_vcgencmd() if os.fspath(root) == "/" else None,
        vcgencmd_period_s=vcgencmd_period_s,
        power_feed=open_feed(meter) if meter else None,
    )
