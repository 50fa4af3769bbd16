"""RAPL, the energy counters of x86 CPUs: /sys/class/powercap/intel-rapl:N, AMD's as well.

https://docs.kernel.org/power/powercap/powercap.html. Since 2020 only root may read them.
"""

from __future__ import annotations

import os
import re

from .files import list_directory, read_integer, read_text
from .power import Power

__all__ = ["Rapl"]

_PACKAGE = re.compile(r"package-\d+")


class Rapl:
    """Counts the energy of all CPU packages from its first read on, through their wraps."""

    def __init__(self, root: str) -> None:
        """Find the packages below `root`; their parts (core, uncore, dram) are in them already."""
        self._zones = [
            directory
            for directory in list_directory(os.path.join(root, "sys/class/powercap"))
            if _PACKAGE.fullmatch(read_text(os.path.join(directory, "name")) or "")
        ]
        self._counts_uj: list[int] = []
        self._energy_uj = 0
        self._read_s = 0.0

    def read(self, time_s: float) -> Power | None:
        """Energy since the first read, and the mean power since the last one."""
        counts = [read_integer(os.path.join(zone, "energy_uj")) for zone in self._zones]
        known = [count for count in counts if count is not None]
        if not self._zones or len(known) < len(counts):
            self._counts_uj = []
            return None
        before_uj, watts = self._energy_uj, None
        if self._counts_uj:
            for zone, count, last in zip(self._zones, known, self._counts_uj, strict=True):
                grown = count - last
                if grown < 0:
                    grown += read_integer(os.path.join(zone, "max_energy_range_uj")) or 0
                self._energy_uj += max(grown, 0)
            if time_s > self._read_s:
                watts = (self._energy_uj - before_uj) * 1e-6 / (time_s - self._read_s)
        self._counts_uj, self._read_s = known, time_s
        source = f"RAPL, {len(known)} package" + ("s" if len(known) > 1 else "")
        return Power(watts, source, "CPU package", 5, energy_j=self._energy_uj * 1e-6)
