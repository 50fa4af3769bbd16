"""The controller on a scripted trace: readings above, what it decides below.

    PYTHONPATH=tools python -m benchmarks.controller_trace [--trace CSV] [--profile NAME]
        [-o OUT.svg]

Without --trace: a Raspberry Pi 4 on which another process takes memory and frees it, the sun heats
the case and leaves it, and the battery runs down and is charged, all with noise. Its free memory
follows what the controller decides, as on a board; that of a trace from a file does not.
"""

from __future__ import annotations

import argparse
import itertools
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bapq_edge.control.controller import Controller, ControllerConfig, Envelope
from bapq_edge.control.device_profile import load_profile
from bapq_edge.errors import BapqError
from bapq_edge.sensors import MockSensors, Readings
from bapq_edge.sensors.mock import load_trace
from bapq_edge.units import format_size, parse_size
from bapq_tools.build_support.extras import host_packages

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MIB = 1 << 20
LEVELS = (8, 4, 2, 1)
# of the model that the scripted board runs: 8.5, 4.5, 2.5 and 1.1 bits per weight
WEIGHT_MIB = {8: 128.0, 4: 67.8, 2: 37.6, 1: 16.6}
SECONDS = 330


def main() -> int:
    """Play, print every switch with its cause, and draw."""
    parser = argparse.ArgumentParser(description="Draw what the controller makes of a trace.")
    parser.add_argument("--trace", type=Path, help="CSV of readings; a scripted one without it")
    parser.add_argument("--profile", default="raspberry_pi_4", help="board or YAML file")
    parser.add_argument("--budget", default="128MiB", help="memory budget of the weights")
    parser.add_argument("-o", dest="out", type=Path, default=Path("controller_trace.svg"))
    arguments = parser.parse_args()
    try:
        config = ControllerConfig.from_profile(load_profile(arguments.profile))
        controller = Controller(config, LEVELS, parse_size(arguments.budget), threads=4)
        trace = _play(arguments.trace, config) if arguments.trace else _script(controller)
        rows = []
        for readings in trace:
            decision = controller.update(readings)
            rows.append((readings, decision.envelope))
            for name in decision.lost:
                print(f"{readings.time_s:6.0f} s  {name} is lost, its limits stay")
            if decision.changed:
                print(f"{readings.time_s:6.0f} s  {_words(decision.envelope)}  ({decision.cause})")
        _draw(rows, config, arguments.out)
    except BapqError as error:
        print(f"controller_trace: {error}", file=sys.stderr)
        return error.exit_code
    print(f"{arguments.out}: {arguments.out.stat().st_size / 1000:.0f} kB")
    return 0


def _words(envelope: Envelope) -> str:
    limit = envelope.weight_bytes_limit
    size = "no limit" if limit is None else format_size(limit)
    return f"weights {size:>9}, level <= {envelope.highest_level}, {envelope.threads} threads"


def _between(time_s: int, points: list[tuple[int, float]]) -> float:
    """Linear between the points, constant outside of them."""
    for (start_s, start), (end_s, end) in itertools.pairwise(points):
        if start_s <= time_s < end_s:
            return start + (end - start) * (time_s - start_s) / (end_s - start_s)
    return points[0][1] if time_s < points[0][0] else points[-1][1]


def _script(controller: Controller) -> Iterator[Readings]:
    """One reading a second; each is taken after the envelope of the one before is in force."""
    noise = random.Random(1)
    for time_s in range(SECONDS):
        envelope = controller.envelope
        limit_mib = (envelope.weight_bytes_limit or 0) / MIB
        weights_mib = min(limit_mib, WEIGHT_MIB[envelope.highest_level])
        others_mib = _between(time_s, [(15, 0), (17, 170), (40, 170), (41, 0)])
        free_mib = 340 - weights_mib - others_mib + noise.uniform(-8, 8)
        celsius = _between(time_s, [(110, 62), (140, 80), (160, 80), (190, 62)])
        percent = _between(time_s, [(190, 80), (270, 10), (275, 10), (330, 16)])
        yield Readings(
            time_s=float(time_s),
            available_bytes=int(free_mib * MIB),
            temperature_c=celsius + noise.uniform(-1.5, 1.5),
            battery_percent=percent + noise.uniform(-0.8, 0.8),
            on_battery=time_s < 275,
        )


def _play(path: Path, config: ControllerConfig) -> Iterator[Readings]:
    """Read what the mock in real time would read, without the waiting."""
    rows = load_trace(path)
    span_s = rows[-1].time_s - rows[0].time_s + config.hold_s
    now_s = 0.0
    sensors = MockSensors(path, clock=lambda: now_s)
    while now_s <= span_s:
        yield sensors.read()
        now_s += config.period_s


def _draw(rows: list[tuple[Readings, Envelope]], config: ControllerConfig, out: Path) -> None:
    with host_packages("drawing"):
        import matplotlib

        matplotlib.use("svg" if out.suffix == ".svg" else "agg")
        # Text as text and no date: the picture is small, and the same on every run.
        matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "bapq", "font.size": 9})
        from matplotlib import pyplot
    heights = [2, 2, 2, 1.5, 1.1, 1.1]
    figure, panels = pyplot.subplots(
        6, 1, sharex=True, figsize=(9, 9.5), height_ratios=heights, layout="constrained"
    )
    times_s = [readings.time_s for readings, _ in rows]

    def reading(panel: Axes, values: list[Any], label: str, limits: dict[str, float]) -> None:
        panel.plot(times_s, [float("nan") if v is None else v for v in values], color="#1f4e79")
        for name, value in limits.items():
            panel.axhline(value, color="#b03a2e", linewidth=0.8, linestyle="--")
            panel.text(times_s[-1], value, f"{name} ", color="#b03a2e", ha="right", va="bottom")
        panel.set_ylabel(label)

    def limit(panel: Axes, values: list[Any], label: str) -> None:
        last = len(values) - 1
        kept = [i for i in range(last + 1) if i in (0, last) or values[i] != values[i - 1]]
        corners = [times_s[i] for i in kept], [values[i] for i in kept]
        panel.step(*corners, where="post", color="#1e7b4b", linewidth=2)
        panel.fill_between(*corners, step="post", color="#1e7b4b", alpha=0.15)
        panel.set_ylim(0, max(values, default=1) * 1.2)
        panel.set_ylabel(label)

    free = [r.available_bytes and r.available_bytes / MIB for r, _ in rows]
    reading(panels[0], free, "available\nMiB", {"reserve": config.reserve_bytes / MIB})
    panels[0].set_ylim(bottom=0)
    celsius = [r.temperature_c for r, _ in rows]
    reading(panels[1], celsius, "temperature\n°C", {"limit": config.temperature_limit_c})
    low, critical = config.battery_low_percent, config.battery_critical_percent
    percent = [r.battery_percent for r, _ in rows]
    reading(panels[2], percent, "battery\n%", {"low": low, "critical": critical})
    panels[2].set_ylim(0, 100)
    on_mains = [r.time_s for r, _ in rows if r.on_battery is False]
    if on_mains:
        marks = [2 if r.on_battery is False else float("nan") for r, _ in rows]
        panels[2].plot(times_s, marks, color="#d4a017", linewidth=4)
        panels[2].text(on_mains[0], 45, "on mains", color="#9a7400")
    limit(panels[3], [(e.weight_bytes_limit or 0) / MIB for _, e in rows], "weight limit\nMiB")
    limit(panels[4], [e.highest_level for _, e in rows], "highest\nlevel")
    limit(panels[5], [e.threads for _, e in rows], "threads")
    panels[4].set_yticks([2, 4, 8])
    panels[5].set_xlabel("seconds")
    panels[0].set_title("readings (blue) and what the controller decides (green)", loc="left")
    for panel in panels:
        panel.grid(color="#dddddd", linewidth=0.5)
        panel.margins(x=0)
    metadata = {"Date": None} if out.suffix == ".svg" else None
    figure.savefig(out, metadata=metadata, dpi=90)
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main())
