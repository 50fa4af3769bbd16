"""What a session tells of itself while it runs: its status now, and the last minutes of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from bapq_edge.units import counted, format_size

from .charts import line_chart
from .page import section, table

__all__ = ["event_rows", "layer_rows", "live_sections", "reading_rows", "state_rows"]

_MIB = 1 << 20


def live_sections(history: Sequence[dict[str, Any]]) -> Iterator[str]:
    """The sections, from statuses of one session, oldest first."""
    now = history[-1]
    times = [each["time_s"] for each in history]
    weights = [each["stats"]["resident_bytes"] / _MIB for each in history]
    process = [each["rss_bytes"] / _MIB for each in history]
    bits = [each["stats"]["planned_bits_per_weight"] for each in history]
    reads = [each["stats"]["streamed_bytes"] / _MIB for each in history]
    yield section(
        "Now",
        f"{counted(now['stats']['runs'], 'run')} in {now['time_s']:.0f} s.",
        table(["", ""], state_rows(now)),
    )
    yield section(
        "The last minutes",
        "Memory of the process and of its weights, bits per weight, and what was read.",
        line_chart(
            [
                ("process", list(zip(times, process, strict=True))),
                ("weights", list(zip(times, weights, strict=True))),
            ],
            x_label="seconds",
            y_label="MiB",
        ),
        line_chart(
            [("", list(zip(times, bits, strict=True)))],
            x_label="seconds",
            y_label="bits per weight",
            steps=True,
        ),
        line_chart(
            [("", list(zip(times, reads, strict=True)))],
            x_label="seconds",
            y_label="MiB read",
        ),
    )
    if readings := reading_rows(now):
        yield section("The board", "", table(["sensor", "reads"], readings))
    yield section("Changes", "", table(["seconds", "event", "bits", "cause"], event_rows(now)))
    yield section("Layers", "", table(["layer", "level", "in memory"], layer_rows(now)))


def state_rows(now: dict[str, Any]) -> list[list[str]]:
    """Names and values of what a session is doing."""
    stats, budget = now["stats"], now["budget_bytes"]
    predicted = stats["predicted_ms"]
    rows = [
        ["model", f"{now['bank']['model']}, {now['bank']['path']}"],
        ["process", f"{now['pid']}, {counted(now['threads'], 'thread')} per operator"],
        ["budget", "no limit" if budget is None else format_size(budget)],
        ["grew at its peak by", format_size(stats["peak_bytes"])],
        ["weights in memory", format_size(stats["resident_bytes"])],
        ["bits per weight", f"{stats['planned_bits_per_weight']:.2f}"],
        ["predicted error", f"{stats['predicted_error']:.4f}"],
        ["predicted time", "not measured" if predicted is None else f"{predicted:.1f} ms"],
        [
            "read",
            f"{format_size(stats['streamed_bytes'])}, waited {stats['read_wait_s']:.2f} s for it",
        ],
        ["runs", f"{stats['runs']}, {stats['degraded']} of them degraded"],
        ["switches", str(stats["switches"])],
        ["plan", stats["plan"]],
    ]
    if stats["region"] is not None:
        rows.append(["region of the last run", str(stats["region"])])
        rows.append(
            [
                "answered again",
                f"{stats['escalated_samples']} of {counted(stats['samples'], 'sample')}, "
                f"{counted(stats['late'], 'run')} too late for it",
            ]
        )
    return rows


def reading_rows(now: dict[str, Any]) -> list[list[str]]:
    """Names and values of what the sensors tell; none where no controller reads them."""
    readings = now["readings"] or {}
    shown = (
        ("memory available", "available_bytes", format_size),
        ("memory pressure", "memory_pressure_percent", "{:.1f} %".format),
        ("temperature", "temperature_c", "{:.1f} °C".format),
        ("power", "power_w", "{:.2f} W".format),
        ("battery", "battery_percent", "{:.0f} %".format),
    )
    return [
        [name, form(readings[key])] for name, key, form in shown if readings.get(key) is not None
    ]


def event_rows(now: dict[str, Any]) -> list[list[str]]:
    """The last events, the newest first."""
    return [
        [
            f"{event['time_s']:.1f}",
            event["kind"],
            f"{event['bits_per_weight']:.2f}",
            event["reason"],
        ]
        for event in reversed(now["events"])
    ]


def layer_rows(now: dict[str, Any]) -> list[list[str]]:
    """Every layer: its level, and how much of it is in memory."""
    return [
        [layer["name"], _level(layer), f"{layer['pinned_share']:.0%}"] for layer in now["layers"]
    ]


def _level(layer: dict[str, Any]) -> str:
    low, high = layer["lowest_level"], layer["highest_level"]
    return str(high) if low == high else f"{low} to {high}, {layer['mean_level']:.1f} on average"
