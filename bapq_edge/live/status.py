"""What a session is doing, as one JSON object, and as metrics of Prometheus."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ..bank.reader import Bank
from ..planning.planner import Plan
from ..sensors.readings import Readings
from ..telemetry import Event, SessionStats, rss_bytes

__all__ = ["PROTOCOL", "to_prometheus", "to_status"]

PROTOCOL = 1
"""Version of the object: it goes up when a key changes its meaning or goes."""

_EVENTS_SHOWN = 20


def to_status(
    bank: Bank,
    plan: Plan,
    stats: SessionStats,
    events: Sequence[Event],
    *,
    time_s: float,
    budget_bytes: int | None,
    threads: int,
    readings: Readings | None,
) -> dict[str, Any]:
    """The status, ready for JSON; see docs/how-to/monitor.md for its keys.

    `time_s` is the time since the session opened, `readings` the controller's last ones.
    """
    return {
        "protocol": PROTOCOL,
        "pid": os.getpid(),
        "time_s": time_s,
        "bank": {
            "path": os.path.realpath(bank.path),
            "model": bank.manifest.model.name,
            "digest": bank.manifest.digest,
        },
        "threads": threads,
        "budget_bytes": budget_bytes,
        "rss_bytes": rss_bytes(),
        "stats": dataclasses.asdict(stats),
        "layers": [*_layers(bank, plan)],
        "events": [dataclasses.asdict(event) for event in events[-_EVENTS_SHOWN:]],
        "readings": None if readings is None else dataclasses.asdict(readings),
    }


def _layers(bank: Bank, plan: Plan) -> Iterator[dict[str, Any]]:
    for layer in bank.manifest.layers:
        levels = plan.levels[layer.chunk_range]
        yield {
            "name": layer.name,
            "weights": layer.rows * layer.columns,
            "highest_level": int(levels.max()),
            "lowest_level": int(levels.min()),
            "mean_level": float(np.mean(levels)),
            "pinned_share": float(np.mean(plan.pinned[layer.chunk_range])),
        }


_METRICS = (
    ("runs_total", "counter", "Runs that ended.", "runs"),
    ("degraded_runs_total", "counter", "Runs with a chunk at a lower level.", "degraded"),
    ("switches_total", "counter", "Changes of the planned levels.", "switches"),
    ("escalated_runs_total", "counter", "Answers that were asked for again.", "escalated"),
    ("samples_total", "counter", "Samples that a policy looked at.", "samples"),
    ("escalated_samples_total", "counter", "Those answered again.", "escalated_samples"),
    ("whole_batches_total", "counter", "Batches answered again as a whole.", "whole_batches"),
    ("late_runs_total", "counter", "Answers that stood since time was up.", "late"),
    ("read_bytes_total", "counter", "Bytes of weights read from storage.", "streamed_bytes"),
    ("read_wait_seconds_total", "counter", "Time that runs waited for reads.", "read_wait_s"),
    ("weight_bytes", "gauge", "Bytes of weights in memory.", "resident_bytes"),
    ("peak_growth_bytes", "gauge", "Growth of the process at its peak.", "peak_bytes"),
    ("planned_bits_per_weight", "gauge", "Of the next run.", "planned_bits_per_weight"),
    ("predicted_error_ratio", "gauge", "Of the next run's outputs.", "predicted_error"),
)
"""Name without bapq_, type, help, and where it stands in the statistics."""

_READINGS = (
    ("temperature_celsius", "Of the hottest zone.", "temperature_c", 1.0),
    ("power_watts", "Drawn, as far as the meter sees.", "power_w", 1.0),
    ("battery_ratio", "Charge of the battery.", "battery_percent", 0.01),
    ("available_bytes", "Memory that the system can hand out.", "available_bytes", 1.0),
)


def to_prometheus(statuses: Sequence[Mapping[str, Any]]) -> str:
    """The metrics of sessions in Prometheus' text format, version 0.0.4.

    Each has the labels `bank`, its folder's name, and `pid`. What is not known, such as a budget
    where there is none, is left out.
    """
    lines: list[str] = []

    def add(name: str, kind: str, text: str, values: Sequence[tuple[str, Any]]) -> None:
        known = [(labels, value) for labels, value in values if value is not None]
        if known:
            lines.append(f"# HELP bapq_{name} {text}")
            lines.append(f"# TYPE bapq_{name} {kind}")
            lines.extend(f"bapq_{name}{labels} {value:.17g}" for labels, value in known)

    labelled = [(_labels(status), status) for status in statuses]
    for name, kind, text, key in _METRICS:
        add(name, kind, text, [(labels, each["stats"][key]) for labels, each in labelled])
    for name, text, key in (
        ("budget_bytes", "Most bytes that the process may grow by.", "budget_bytes"),
        ("resident_bytes", "Resident memory of the process.", "rss_bytes"),
    ):
        add(name, "gauge", text, [(labels, each[key]) for labels, each in labelled])
    for name, text, key, factor in _READINGS:
        values = [(labels, (each["readings"] or {}).get(key)) for labels, each in labelled]
        scaled = [(labels, None if value is None else value * factor) for labels, value in values]
        add(name, "gauge", text, scaled)
    return "\n".join(lines) + "\n" if lines else ""


def _labels(status: Mapping[str, Any]) -> str:
    name = os.path.basename(status["bank"]["path"])
    quoted = name.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
    return f'{{bank="{quoted}",pid="{status["pid"]}"}}'
