"""Tables in Markdown of what was counted."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from textwrap import shorten
from typing import Any

from .counts import PARTS

__all__ = ["ENGINES", "table", "to_markdown"]

ENGINES = {
    "fp32": "ORT fp32",
    "int8": "ORT int8",
    "ncnn": "ncnn",
    "32": "ours 32",
    "8": "ours 8",
    "4": "ours 4",
    "2": "ours 2",
    "1": "ours 1",
}
"""name of an engine -> its name in the table"""


def to_markdown(cells: Sequence[Mapping[str, Any]], models: Mapping[str, str]) -> str:
    """A table of all engines for each CPU, then what ours are made of, in millions."""
    sections = []
    for cpu in dict.fromkeys(cell["cpu"] for cell in cells):
        own = [cell for cell in cells if cell["cpu"] == cpu]
        versions = dict.fromkeys(cell["version"] for cell in own if "version" in cell)
        sections += [f"### {cpu}", f"Millions of instructions: {'; '.join(versions)}."]
        sections += [_totals(own, models), _parts(own, models)]
        failures = dict.fromkeys(
            f"- {models[cell['model']]}, {ENGINES[cell['engine']]}: {shorten(cell['failed'], 120)}"
            for cell in own
            if "failed" in cell
        )
        sections.append("\n".join(failures))
    return "\n\n".join(section for section in sections if section)


def _totals(cells: Sequence[Mapping[str, Any]], models: Mapping[str, str]) -> str:
    engines = [name for name in ENGINES if any(cell["engine"] == name for cell in cells)]
    by_name = {(cell["model"], cell["engine"]): cell for cell in cells}
    rows = []
    for model in dict.fromkeys(cell["model"] for cell in cells):
        found = (by_name.get((model, engine), {}).get("parts") for engine in engines)
        totals = (_millions(sum(parts.values())) if parts else "" for parts in found)
        rows.append([models[model], *totals])
    return table(["model", *(ENGINES[name] for name in engines)], rows)


def _parts(cells: Sequence[Mapping[str, Any]], models: Mapping[str, str]) -> str:
    rows = [
        [models[cell["model"]], ENGINES[cell["engine"]], *map(_millions, cell["parts"].values())]
        for cell in cells
        if "parts" in cell and cell["engine"].isdecimal()
    ]
    return table(["model", "engine", *PARTS.values()], rows) if rows else ""


def _millions(instructions: int) -> str:
    """Three digits or more."""
    millions = instructions / 1e6
    return f"{millions:.{0 if millions >= 1000 else 1 if millions >= 10 else 2}f}"


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Text cells as a table in Markdown."""
    lines = (heads, ["---"] * len(heads), *rows)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
