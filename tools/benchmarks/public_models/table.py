"""The figures of models as tables, and as the reason where a row is bad."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bapq_edge.units import format_size
from benchmarks.tables import print_table

from .measure import SHOWN_LEVELS, plan_rows

__all__ = ["print_tables", "reason", "write_files"]

_COVERED = 0.9
_GOOD = 0.95
"""Rows below are bad, and say why."""

_HEADS = (
    "model",
    "task",
    "covered",
    "bytes of fp32",
    *(f"bytes at {level}" for level in SHOWN_LEVELS),
)
_ANSWER_HEADS = (
    "model",
    "measure",
    *(f"at {level}" for level in SHOWN_LEVELS),
    "at 3.0 bits",
    *(f"memory at {level}" for level in (8, 4)),
    *(f"time at {level}" for level in (8, 4)),
)
_PLAN_HEADS = (
    "model",
    "asked",
    "used",
    "plan",
    "best level of no more bits",
    "it is better by",
    "at least",
    "beyond doubt",
)


def print_tables(results: Sequence[dict[str, Any]], style: str) -> None:
    """Print what `figures_of` found, in the styles of `print_table`."""
    done = [each for each in results if "failed" not in each]
    print_table("Coverage and bytes", _HEADS, [_row(each) for each in done], style)
    answers = [_answer_row(each) for each in done]
    print_table("Answers, memory and time beside float32", _ANSWER_HEADS, answers, style)
    for each in done:
        if said := reason(each):
            print(f"- {each['model']}: {said}")
    for each in results:
        if "failed" in each:
            print(f"- {each['model']}: {each['failed']}")
    print()
    plans = [_plan_row(row) for each in done for row in plan_rows(each)]
    print_table("Plans beside the best level of no more bits", _PLAN_HEADS, plans, style)


def write_files(results: Sequence[dict[str, Any]], folder: Path) -> None:
    """Write public_models.md and public_models.json into the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    page = io.StringIO()
    with contextlib.redirect_stdout(page):
        print_tables(results, "md")
    (folder / "public_models.md").write_text(page.getvalue(), encoding="utf-8")
    figures = json.dumps(list(results), indent=1)
    (folder / "public_models.json").write_text(figures + "\n", encoding="utf-8")


def reason(each: dict[str, Any]) -> str:
    """Why a row is bad: what stays in float, or what the levels lose; "" where it is good."""
    said = []
    if each["coverage"] < _COVERED:
        why, weights = max(each["kept"].items(), key=lambda pair: pair[1])
        in_float = 1 - each["coverage"]
        said.append(f"{in_float:.0%} of the weights stay in float, {weights:,} of them: {why}")
    bad = [level for level in (8, 4) if each["scores"][f"level {level}"]["mean"] < _GOOD]
    if bad:
        worst = each["sensitive"].get(str(bad[0]))
        cause = (
            "the bank does not know of which layer"
            if worst is None
            else f"{worst['share']:.0%} of the error is that of the layer {worst['layer']:.60}"
        )
        said.append(f"below {_GOOD} at level {bad[0]}: {cause}")
    return "; ".join(said)


def _row(each: dict[str, Any]) -> list[str]:
    return [
        each["model"],
        each["task"],
        f"{each['coverage']:.1%}",
        format_size(each["fp32_bytes"]),
        *(format_size(each["bytes"][str(level)]) for level in SHOWN_LEVELS),
    ]


def _answer_row(each: dict[str, Any]) -> list[str]:
    def ratio(kind: str, level: int) -> str:
        return f"{each[kind][str(level)]:.2f}x" if kind in each else ""

    names = (*(f"level {level}" for level in SHOWN_LEVELS), "3 bits")
    return [
        each["model"],
        each["measure"],
        *(f"{each['scores'][name]['mean']:.4f}" for name in names),
        *(ratio(kind, level) for kind in ("memory_ratio", "time_ratio") for level in (8, 4)),
    ]


def _plan_row(row: dict[str, Any]) -> list[str]:
    return [
        row["model"],
        f"{row['asked']:g}",
        f"{row['used']:.2f}",
        f"{row['plan']:.4f}",
        f"{row['level']}: {row['level_mean']:.4f}",
        f"{row['lost']:+.4f}",
        f"{row['lost_low']:+.4f}",
        "yes" if row["worse"] else "no",
    ]
