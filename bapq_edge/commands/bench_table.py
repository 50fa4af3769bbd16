"""The results of `bapq bench` as text: a table in Markdown, CSV, JSON, or JSON line by line."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable
from typing import Any

from ..units import format_size
from .tables import markdown_table

__all__ = ["FIELDS", "FORMATS", "to_text"]

FIELDS = (
    "name",
    "load_ms",
    "run_ms",
    "run_sd_ms",
    "reference_ms",
    "ratio",
    "agreement",
    "input_shapes",
    "zeros",
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


def to_text(results: Iterable[dict[str, Any]], style: str) -> str:
    """The results in one of FORMATS; ends with a newline."""
    return FORMATS[style](list(results))


def _markdown(results: list[dict[str, Any]]) -> str:
    columns = [(head, cell) for head, shown, cell in _COLUMNS if shown(results)]
    rows = [[cell(result) for _, cell in columns] for result in results]
    text = markdown_table([head for head, _ in columns], rows)
    measured = [result for result in results if result["energy_j"] is not None]
    notes = [_input_facts(result) for result in results if result["input_shapes"]][:1]
    reference = results[0]["name"]
    if _compared(results):
        notes.append(
            f"ratio: run ms over reference ms, the runs of {reference} between those of the row"
        )
    if _agreeing(results):
        notes.append(
            f"agreement: mean cosine between the outputs and those of {reference} on this one "
            "input; bapq eval takes many"
        )
    if measured:
        notes.append(f"energy of a run: {_energy_facts(measured[0])}")
    return text + "".join(f"\n{note}\n" for note in notes)


def _compared(results: list[dict[str, Any]]) -> bool:
    return any(result["ratio"] is not None for result in results)


def _agreeing(results: list[dict[str, Any]]) -> bool:
    return any(result["agreement"] is not None for result in results)


def _input_facts(result: dict[str, Any]) -> str:
    shapes = ", ".join(f"{name} {shape}" for name, shape in result["input_shapes"].items())
    return f"input: {shapes}" + (", zeros" if result["zeros"] else "")


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


_COLUMNS: tuple[tuple[str, Callable[..., bool], Callable[[dict[str, Any]], str]], ...] = (
    ("", bool, lambda result: str(result["name"])),
    ("load ms", bool, lambda result: _number(result["load_ms"], 1)),
    ("run ms", bool, _time),
    ("reference ms", _compared, lambda result: _number(result["reference_ms"], 2)),
    ("ratio", _compared, lambda result: _number(result["ratio"], 2)),
    (
        "agreement",
        _agreeing,
        lambda result: _number(result["agreement"], 4),
    ),
    ("peak growth", bool, lambda result: _size(result["peak_growth_bytes"])),
    ("weights", bool, lambda result: _size(result["weight_bytes"])),
    ("read per run", bool, lambda result: _size(result["streamed_bytes_per_run"])),
    ("bits", bool, lambda result: _number(result["bits_per_weight"], 2)),
    (
        "energy mJ",
        lambda results: any(result["energy_j"] is not None for result in results),
        lambda result: _energy(result),
    ),
)
"""Head, whether results show it, and the cell of a result."""


def _csv(results: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, FIELDS, lineterminator="\n")
    writer.writeheader()
    for result in results:
        writer.writerow({**result, "input_shapes": json.dumps(result["input_shapes"])})
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
