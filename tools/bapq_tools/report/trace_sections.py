"""What a trace of `bapq profile` shows over time."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bapq_edge.errors import RequestError
from bapq_edge.input_files import input_file_errors

from .charts import line_chart
from .page import section, table

__all__ = ["read_trace", "trace_sections"]

_COUNTERS = {
    "Memory": (("process MB", "pinned weights MB", "ring MB", "row cache MB"), "MB"),
    "Available memory": (("available MB",), "MB"),
    "Temperature": (("temperature C",), "°C"),
    "Power": (("power W",), "W"),
}
_BINS = 120


def read_trace(path: Path) -> list[dict[str, Any]]:
    """The events of a trace. Raises InputFileError or RequestError."""
    with input_file_errors(path):
        text = path.read_text(encoding="utf-8")
    try:
        events = json.loads(text)["traceEvents"]
        return [event for event in events if isinstance(event, dict)]
    except (ValueError, KeyError, TypeError) as error:
        raise RequestError(f"{path} is no trace of bapq profile: write one with -o") from error


def trace_sections(events: list[dict[str, Any]]) -> Iterator[str]:
    """Counters, reads and waits over time, and where the plan changed."""
    counters: defaultdict[str, list[tuple[float, float]]] = defaultdict(list)
    for event in events:
        if event.get("ph") == "C":
            (value,) = event["args"].values()
            counters[event["name"]].append((event["ts"] / 1e6, value))
    for title, (names, unit) in _COUNTERS.items():
        series = [(name.rpartition(" ")[0], counters[name]) for name in names if counters[name]]
        if series:
            yield section(
                title, "", line_chart(series, x_label="seconds", y_label=f"{title}, {unit}")
            )
    spans = [event for event in events if event.get("ph") == "X"]
    if spans:
        end_s = max(event["ts"] + event["dur"] for event in spans) / 1e6
        reads = _binned(spans, end_s, lambda event: event["args"].get("bytes", 0) / 1e6)
        waits = _binned(
            spans,
            end_s,
            lambda event: event["dur"] / 1e3 if event["name"].startswith("wait for") else 0.0,
        )
        width_ms = end_s / _BINS * 1e3
        yield section(
            "Reads and waits",
            f"In each {width_ms:.0f} ms: what was read, and how long operators waited for it.",
            line_chart([("", reads)], x_label="seconds", y_label="MB read", steps=True),
            line_chart([("", waits)], x_label="seconds", y_label="ms waited", steps=True),
        )
    changes = [event for event in events if event.get("ph") == "i"]
    if changes:
        rows = [
            [
                f"{event['ts'] / 1e6:.3f}",
                event["name"],
                f"{event['args']['bits_per_weight']:.2f}",
                event["args"]["reason"],
            ]
            for event in changes
        ]
        heads = ["seconds", "event", "bits per weight", "cause"]
        yield section("Changes of the plan", "", table(heads, rows))


def _binned(spans: list[dict[str, Any]], end_s: float, value_of: Any) -> list[tuple[float, float]]:
    sums = [0.0] * (_BINS + 1)
    for event in spans:
        index = min(int(event["ts"] / 1e6 / end_s * _BINS), _BINS) if end_s else 0
        sums[index] += value_of(event)
    return [(index * end_s / _BINS, value) for index, value in enumerate(sums)]
