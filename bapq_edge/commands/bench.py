"""`bapq bench`: speed and memory of a bank's levels, beside ONNX Runtime on the model itself.

Each row of the table is a process of its own, so that its memory is its own; this process has them
run in turns, so that whatever else the machine does hits all of them alike.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..bank.reader import Bank
from ..errors import BapqError, RequestError, UnknownLevelError
from ..units import format_size
from .bench_row import Row, Subject
from .feeds import add_feed, parse_shapes

__all__ = ["add_bench"]

_WARM_UP_RUNS = 2
_PAUSE_S = 0.005
"""Before every run: ONNX Runtime's threads spin for a while after theirs, on the next's cores."""


def add_bench(commands: Any) -> None:
    """Add `bench`."""
    command = commands.add_parser("bench", help="measure speed and memory, level by level")
    command.add_argument("bank", type=Path)
    command.add_argument(
        "--against",
        nargs="+",
        action="extend",
        default=[],
        type=Path,
        metavar="MODEL.onnx",
        help="models to run in ONNX Runtime as it comes; times are given over the first one's",
    )
    command.add_argument("--levels", help="such as 8,4 (default: all but 32), or auto")
    command.add_argument(
        "--budget", metavar="SIZE", help="what a process may grow by, such as 64MiB, or auto"
    )
    add_feed(command)
    command.add_argument("-r", "--runs", type=int, default=20, help="of each row (default: 20)")
    command.add_argument("--threads", type=int, help="of each row (default: one per core)")
    command.add_argument("-o", "--output", choices=_PRINTERS, default="md", help="(default: md)")
    command.set_defaults(command=_bench)


def _bench(arguments: argparse.Namespace) -> None:
    if arguments.runs < 1:
        raise RequestError(f"--runs is {arguments.runs}, it must be at least 1")
    common = {
        "threads": arguments.threads,
        "input_path": arguments.input,
        "shapes": parse_shapes(arguments.shape),
    }
    subjects = [
        *(Subject(path=path, level=None, budget=None, **common) for path in arguments.against),
        *(
            Subject(path=arguments.bank, level=level, budget=arguments.budget, **common)
            for level in _levels(arguments.bank, arguments.levels)
        ),
    ]
    failures: list[BapqError] = []
    results = _measure(subjects, arguments.runs, failures)
    _PRINTERS[arguments.output](results)
    if failures:
        raise failures[0]


def _levels(path: Path, wanted: str | None) -> list[str]:
    held = [str(level) for level in Bank.open(path).levels]
    if wanted is None:
        return [level for level in held if level != "32"] or held
    levels = [level.strip() for level in wanted.split(",")]
    for level in levels:
        if level not in held and level != "auto":
            raise UnknownLevelError(
                f"level {level!r} is not in the bank, which holds {', '.join(held)}"
            )
    return levels


def _measure(subjects: list[Subject], runs: int, failures: list[BapqError]) -> list[dict[str, Any]]:
    """One result per subject; the first model also runs between the others' runs."""
    results: list[dict[str, Any]] = []
    reference: Row | None = None
    for subject in subjects:
        times_ms: list[float] = []
        reference_ms: list[float] = []
        result: dict[str, Any] = dict.fromkeys(_FIELDS)
        result["name"] = subject.name
        results.append(result)
        row = Row(subject)
        try:
            result["load_ms"] = row.open()
            for _ in range(_WARM_UP_RUNS):
                row.run()
            row.forget_reads()
            for _ in range(runs):
                time.sleep(_PAUSE_S)
                times_ms.append(row.run())
                if reference is not None:
                    time.sleep(_PAUSE_S)
                    reference_ms.append(reference.run())
            result.update(row.report())
        except BapqError as error:
            failures.append(error)
            result["error"] = str(error)
            row.close()
            continue
        result["run_ms"] = statistics.median(times_ms)
        result["run_sd_ms"] = statistics.stdev(times_ms) if runs > 1 else 0.0
        if subject.level is None and len(results) == 1:
            reference = row
            result["ratio"] = 1.0
            continue
        if reference is not None:
            result["ratio"] = result["run_ms"] / statistics.median(reference_ms)
        row.close()
    if reference is not None:
        reference.close()
    return results


# ---- tables ----

_FIELDS = (
    "name",
    "load_ms",
    "run_ms",
    "run_sd_ms",
    "ratio",
    "peak_growth_bytes",
    "weight_bytes",
    "streamed_bytes_per_run",
    "bits_per_weight",
    "error",
)


def _size(value: float | None) -> str:
    return "" if value is None else format_size(value)


def _number(digits: int) -> Callable[[float | None], str]:
    return lambda value: "" if value is None else f"{value:.{digits}f}"


def _time(result: dict[str, Any]) -> str:
    if result["run_ms"] is None:
        return ""
    return f"{result['run_ms']:.2f} ± {result['run_sd_ms']:.2f}"


def _print_md(results: list[dict[str, Any]]) -> None:
    heads = ("", "load ms", "run ms", "ratio", "peak growth", "weights", "read per run", "bits")
    rows = [
        (
            result["name"],
            _number(1)(result["load_ms"]),
            _time(result),
            _number(2)(result["ratio"]),
            _size(result["peak_growth_bytes"]),
            _size(result["weight_bytes"]),
            _size(result["streamed_bytes_per_run"]),
            _number(2)(result["bits_per_weight"]) if result["error"] is None else "failed",
        )
        for result in results
    ]
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    marks = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    for row in (heads, marks, *rows):
        cells = [
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        print(f"| {' | '.join(cells)} |")


def _print_csv(results: list[dict[str, Any]]) -> None:
    writer = csv.DictWriter(sys.stdout, _FIELDS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(results)


def _print_json(results: list[dict[str, Any]]) -> None:
    print(json.dumps(results, indent=1))


def _print_jsonl(results: list[dict[str, Any]]) -> None:
    for result in results:
        print(json.dumps(result))


_PRINTERS = {"md": _print_md, "csv": _print_csv, "json": _print_json, "jsonl": _print_jsonl}
