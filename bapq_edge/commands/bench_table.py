"""The results of `bapq bench` as text: a table in Markdown, CSV, JSON, or JSON line by line."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable
from typing import Any

from ..units import format_size

__all__ = ["FIELDS", "FORMATS", "to_text"]

FIELDS = (
    "name",
    "load_ms",
    "run_ms",
    "run_sd_ms",
    "ratio",
    "peak_growth_bytes",
    "weight_bytes",
    "streamed_bytes_per_run",
    "bits_per_weight",
    "energy_j",
    "energy_error_j",
    "idle_w",
    "power_source",
    "power_scope",
    "power_hz",
    "energy_estimated",
    "error",
)
"""Keys of a result."""


_HEADS = ("", "load ms", "run ms", "ratio", "peak growth", "weights", "read per run", "bits")


def to_text(results: Iterable[dict[str, Any]], style: str) -> str:
    """The results in one of FORMATS; ends with a newline."""
    return FORMATS[style](list(results))


def _markdown(results: list[dict[str, Any]]) -> str:
    measured = [result for result in results if result["energy_j"] is not None]
    heads = [*_HEADS, *(["energy mJ"] if measured else [])]
    rows = [
        (
            result["name"],
            _number(result["load_ms"], 1),
            _time(result),
            _number(result["ratio"], 2),
            _size(result["peak_growth_bytes"]),
            _size(result["weight_bytes"]),
            _size(result["streamed_bytes_per_run"]),
            _number(result["bits_per_weight"], 2),
            *([_energy(result)] if measured else []),
        )
        for result in results
    ]
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    marks = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    text = ""
    for row in (heads, marks, *rows):
        cells = [
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        text += f"| {' | '.join(cells)} |\n"
    if any(result["ratio"] is not None for result in results):
        text += (
            f"\nratio: run ms over those of {results[0]['name']} between the same runs, so not the "
            "quotient of two rows\n"
        )
    if measured:
        text += f"\nenergy of a run: {_energy_facts(measured[0])}\n"
    return text


def _energy(result: dict[str, Any]) -> str:
    if result["energy_j"] is None:
        return ""
    return f"{result['energy_j'] * 1e3:.3g} ± {result['energy_error_j'] * 1e3:.1g}"


def _energy_facts(result: dict[str, Any]) -> str:
    beyond = f"beyond that of the idle board, {result['idle_w']:.2f} W"
    if result["energy_estimated"]:
        return f"estimate, {beyond}, by the {result['power_source']}"
    scope = "" if result["power_scope"] is None else f" ({result['power_scope']})"
    meter = f"{result['power_source']}{scope}, {result['power_hz']:.1f} Hz"
    return f"{beyond} measured before; {meter}; ± is meter and sampling together"


def _size(value: float | None) -> str:
    return "" if value is None else format_size(value)


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _time(result: dict[str, Any]) -> str:
    if result["error"] is not None:
        return "failed"
    if result["run_ms"] is None:
        return ""
    return f"{result['run_ms']:.2f} ± {result['run_sd_ms']:.2f}"


def _csv(results: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, FIELDS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(results)
    return text.getvalue()


def _json(results: list[dict[str, Any]]) -> str:
    return json.dumps(results, indent=1) + "\n"


def _jsonl(results: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(result) + "\n" for result in results)


FORMATS: dict[str, Callable[[list[dict[str, Any]]], str]] = {
    "md": _markdown,
    "csv": _csv,
    "json": _json,
    "jsonl": _jsonl,
}
