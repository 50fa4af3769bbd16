"""Trained public models as banks: coverage, bytes, answers, memory and time beside float32.

    make bench-models
    PYTHONPATH=tools python -m benchmarks.public_models [NAME ...] [--format md|json] [--quick]

Each is calibrated with some samples and judged on others, in the measure of its task: how far its
answers are those of the float model. A name is one of the table, or a part of it.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from bapq_edge.units import format_size
from bapq_tools.build_support.progress import Progress
from benchmarks.models import WORK
from benchmarks.tables import add_format, print_table

from .measure import SHOWN_LEVELS, figures_of, plan_rows
from .registry import MODELS


def main() -> int:
    """Measure and print; 1 where a model is missing or refused."""
    parser = argparse.ArgumentParser(prog="benchmarks.public_models", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="models to try (default: all)")
    parser.add_argument("--quick", action="store_true", help="no memory, no time")
    add_format(parser, "json")
    arguments = parser.parse_args()
    chosen = [
        model
        for model in MODELS
        if not arguments.names
        or any(name.lower() in model.name.lower() for name in arguments.names)
    ]
    if not chosen:
        parser.error(
            f"no model {arguments.names[0]!r}; there are {', '.join(m.name for m in MODELS)}"
        )
    results = []
    for model in chosen:
        folder = WORK / "public" / model.name.lower().replace(" ", "-")
        with Progress(True).stage(model.name, 1) as advance:
            results.append(figures_of(model, folder, quick=arguments.quick))
            advance()
    failed = [each for each in results if "failed" in each]
    if arguments.format == "json":
        print(json.dumps(results, indent=1))
        return 1 if failed else 0
    done = [each for each in results if "failed" not in each]
    print_table("Trained public models", _HEADS, [_row(each) for each in done], arguments.format)
    plans = [_plan_cells(row) for each in done for row in plan_rows(each)]
    print_table("Plans beside the best level of no more bits", _PLAN_HEADS, plans, arguments.format)
    for each in done:
        if reason := _reason(each):
            print(f"- {each['model']}: {reason}")
    for each in failed:
        print(f"- {each['model']}: {each['failed']}")
    return 1 if failed else 0


_HEADS = (
    "model",
    "task",
    "covered",
    "bytes of fp32",
    *(f"bytes at {level}" for level in SHOWN_LEVELS),
    "measure",
    *(f"at {level}" for level in SHOWN_LEVELS),
    "memory at 8",
    "time at 8",
    "time at 4",
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


def _row(each: dict[str, Any]) -> list[str]:
    def ratio(kind: str, level: int) -> str:
        return f"{each[kind][str(level)]:.2f}x" if kind in each else ""

    return [
        each["model"],
        each["task"],
        f"{each['coverage']:.1%}",
        format_size(each["fp32_bytes"]),
        *(format_size(each["bytes"][str(level)]) for level in SHOWN_LEVELS),
        each["measure"],
        *(f"{each['scores'][f'level {level}']['mean']:.4f}" for level in SHOWN_LEVELS),
        ratio("memory_ratio", 8),
        ratio("time_ratio", 8),
        ratio("time_ratio", 4),
    ]


def _plan_cells(row: dict[str, Any]) -> list[str]:
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


def _reason(each: dict[str, Any]) -> str:
    """Why not all of it is in planes, if much is not."""
    if each["coverage"] >= 0.9:
        return ""
    reason, weights = max(each["kept"].items(), key=lambda pair: pair[1])
    return f"{1 - each['coverage']:.0%} of the weights stay in float, {weights:,} of them: {reason}"


if __name__ == "__main__":
    sys.exit(main())
