"""Temperature: the hottest thermal zone of CPU and SoC."""

from __future__ import annotations

import os
import re

from .files import list_directory, read_integer, read_text

__all__ = ["find_zones", "hottest_c"]

# cpu-thermal (Pi, Jetson), soc-thermal, tj-thermal (Jetson: the whole die), x86_pkg_temp; not the
# zones of batteries, radios and cases, which have limits of their own.
_ZONE_TYPE = re.compile(r"cpu|soc|pkg|^tj", re.IGNORECASE)
# A zone that is powered off tells -256 degrees on Jetson, and others fail to read.
_LEAST_C = -60.0


def find_zones(root: str) -> tuple[tuple[str, str], ...]:
    """(type, path of its temperature) of every zone of CPU and SoC."""
    zones = []
    for directory in list_directory(os.path.join(root, "sys/class/thermal")):
        if os.path.basename(directory).startswith("thermal_zone"):
            kind = read_text(os.path.join(directory, "type")) or ""
            if _ZONE_TYPE.search(kind):
                zones.append((kind, os.path.join(directory, "temp")))
    return tuple(zones)


def hottest_c(zones: tuple[tuple[str, str], ...]) -> tuple[float, str] | None:
    """(temperature, type) of the hottest zone that reads."""
    read = [
        (millidegrees / 1000, kind)
        for kind, path in zones
        if (millidegrees := read_integer(path)) is not None
    ]
    return max((zone for zone in read if zone[0] > _LEAST_C), default=None)
