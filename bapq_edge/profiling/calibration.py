"""Measures this board: storage, memory, kernels, and whether it keeps its speed under load."""

from __future__ import annotations

import dataclasses
import mmap
import os
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from ..bank.layout import LEVELS
from ..bank.storage import read_bytes_s
from ..control.device_profile import DeviceProfile, find_profile, load_profile
from ..engine.library import kernels_name
from ..sensors import Readings, Sensors, open_sensors
from .kernel_speed import SHAPES, TileWork
from .meters import Meter

__all__ = ["calibrate"]

_BLOCKS_KIB = (4, 16, 64, 256, 1024, 4096)
_PLAN_BLOCK_KIB = 256
"""About a chunk: the speed at which the planner is to expect reads."""
_READ_BYTES = 32 << 20
_COPY_BYTES = 64 << 20
_SOURCE = "measured by bapq doctor --calibrate"


def calibrate(
    file: Path,
    *,
    load_s: float = 60.0,
    base: DeviceProfile | None = None,
    sensors: Callable[[], Sensors] = open_sensors,
    say: Callable[[str], object] = lambda text: None,
) -> DeviceProfile:
    """A profile of this board: what can be measured measured, the rest that of `base`.

    Args:
        file: a large file on the storage in question, such as a plane of a bank.
        load_s: seconds of load on all cores.
        base: the board's own profile unless given, or a generic one.
        sensors: opens what is read meanwhile.
        say: called with a line for each step.

    Raises:
        OSError: the file cannot be read.
    """
    generic = "generic_arm64" if os.uname().machine == "aarch64" else "generic_x86"
    base = base or find_profile() or load_profile(generic)
    measured: dict[str, float] = {}
    say(f"reading {file}")
    measured.update(_read_speeds(file))
    say("copying memory")
    measured["memory_copy_mb_s"] = _copy_mb_s()
    for name, (rows, columns) in SHAPES.items():
        say(f"multiplying, {name.replace('_', ' ')}")
        for level in LEVELS:
            work = TileWork(level, rows, columns)
            measured[f"gmac_s_level_{level}_{name}"] = work.products_s() / 1e9
    say(f"all cores for {load_s:g} s")
    load = _Load(sensors)
    measured.update(load.run(load_s))
    found: dict[str, Any] = {
        "cores": len(os.sched_getaffinity(0)),
        "memory_mib": psutil.virtual_memory().total >> 20,
        "page_bytes": mmap.PAGESIZE,
        "kernels": kernels_name(),
        "gmac_s": {
            f"level_{level}": float(f"{measured[f'gmac_s_level_{level}_196_rows']:.3g}")
            for level in LEVELS
        },
        "storage_read_mb_s": max(1, round(measured[f"read_mb_s_{_PLAN_BLOCK_KIB}_kib"])),
        **load.power,
    }
    return dataclasses.replace(
        base,
        **found,
        name="calibrated",
        description=f"{base.description}; calibrated on this board",
        storage_classes_mb_s={},
        measured={key: float(f"{value:.4g}") for key, value in measured.items()},
        sources={**base.sources, **dict.fromkeys(found, _SOURCE)},
    )


def _read_speeds(file: Path) -> dict[str, float]:
    speeds = {}
    for kib in _BLOCKS_KIB:
        most_bytes = min(_READ_BYTES, 512 * kib << 10)  # small blocks take long on a card
        try:
            speed = read_bytes_s(file, direct=True, block_bytes=kib << 10, most_bytes=most_bytes)
        except OSError:  # no direct reads on this file system
            speed = read_bytes_s(file, direct=False, block_bytes=kib << 10, most_bytes=most_bytes)
        speeds[f"read_mb_s_{kib}_kib"] = speed / 1e6
    return speeds


def _copy_mb_s() -> float:
    """Bytes read and written per second, the best of three copies."""
    source, target = np.ones(_COPY_BYTES, np.uint8), np.ones(_COPY_BYTES, np.uint8)
    times_s = []
    for _ in range(3):
        started_s = time.perf_counter()
        np.copyto(target, source)
        times_s.append(time.perf_counter() - started_s)
    return 2 * _COPY_BYTES / min(times_s) / 1e6


class _Load:
    """All cores multiply, and the sensors are read meanwhile."""

    def __init__(self, sensors: Callable[[], Sensors]) -> None:
        self._open = sensors
        self.power: dict[str, Any] = {}
        """idle_w, busy_w and power_error_percent, where there is a meter."""

    def run(self, load_s: float) -> dict[str, float]:
        """What the load shows: the speed at its begin and at its end, heat, throttling."""
        cores = sorted(os.sched_getaffinity(0))
        counts = [0] * len(cores)
        stopping = threading.Event()
        products = TileWork(8, *SHAPES["196_rows"]).products

        def work(number: int) -> None:
            tile = TileWork(8, *SHAPES["196_rows"])
            while not stopping.is_set():
                tile.run()
                counts[number] += 1

        threads = [threading.Thread(target=work, args=(i,)) for i in range(len(cores))]
        readings: list[Readings] = []
        speeds: list[float] = []
        sensors = self._open()
        with Meter(sensors=self._open()) as meter:
            idle = meter.measure_idle()
            for thread in threads:
                thread.start()
            try:
                with meter.window("load"):
                    end_s = time.monotonic() + load_s
                    while (now_s := time.monotonic()) < end_s:
                        before = sum(counts)
                        time.sleep(min(1.0, end_s - now_s))
                        took_s = time.monotonic() - now_s
                        speeds.append((sum(counts) - before) * products / took_s / 1e9)
                        readings.append(sensors.read())
            finally:
                stopping.set()
                for thread in threads:
                    thread.join()
                sensors.close()
        (window,) = meter.windows
        if idle is not None and window.energy_j is not None:
            self._take_power(idle.power_w, window.energy_j / window.wall_s, readings[0])
        tenth = max(1, len(speeds) // 10)
        found = {
            "load_s": load_s,
            "load_gmac_s_at_first": statistics.median(speeds[:tenth]),
            "load_gmac_s_at_last": statistics.median(speeds[-tenth:]),
        }
        temperatures = [r.temperature_c for r in readings if r.temperature_c is not None]
        if temperatures:
            found["load_hottest_c"] = max(temperatures)
        throttled = [len(r.throttled_now) > 0 for r in readings if r.throttled_now is not None]
        if throttled:
            found["load_throttled_share"] = sum(throttled) / len(throttled)
        return found

    def _take_power(self, idle_w: float, busy_w: float, readings: Readings) -> None:
        self.power = {
            "idle_w": float(f"{idle_w:.3g}"),
            "busy_w": float(f"{max(busy_w, idle_w):.3g}"),
            "power_error_percent": max(10, round(readings.power_error_percent or 0)),
        }
