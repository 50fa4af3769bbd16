"""What the experiments share: options, processes of their own, CSV, summary and plot."""

from __future__ import annotations

import argparse
import contextlib
import csv
import gc
import itertools
import multiprocessing
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from bapq_edge.errors import BapqError, RequestError, StorageError
from bapq_edge.telemetry import trim_heap
from bapq_tools.build_support.extras import host_packages

__all__ = [
    "Parser",
    "forget_peak",
    "in_own_process",
    "plot_means",
    "run_script",
    "summary_path",
    "write_results",
]

Row = Mapping[str, Any]


class Parser(argparse.ArgumentParser):
    """With --runs and --output, which every experiment has."""

    def __init__(self, description: str | None, output: str) -> None:
        """`output` is the default file for the results."""
        style = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, formatter_class=style)
        self.add_argument("--runs", type=int, default=5, help="repetitions (default: 5)")
        self.add_argument(
            "--output",
            type=Path,
            default=Path(output),
            help=f"CSV for the results; summary and plot go beside it (default: {output})",
        )


def run_script(main: Callable[[argparse.Namespace], None], parser: argparse.ArgumentParser) -> int:
    """Parse, run, and tell an error in one line; the exit code."""
    arguments = parser.parse_args()
    try:
        if arguments.runs < 1:
            raise RequestError(f"--runs is {arguments.runs}, it must be at least 1")
        if arguments.output.suffix != ".csv":
            raise RequestError(f"--output {arguments.output} must end in .csv")
        main(arguments)
    except BapqError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def in_own_process(work: Callable[..., Any], *arguments: Any) -> Any:
    """What `work` returns in a fresh interpreter, whose memory is its own."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(work, *arguments).result()


def forget_peak() -> None:
    """Give free heap back and let VmHWM begin anew (proc(5), clear_refs).

    Where the kernel refuses, it stays as it is.
    """
    gc.collect()
    trim_heap()
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")


def summary_path(output: Path) -> Path:
    """Where the summary of the results goes."""
    return output.with_name(f"{output.stem}_summary.csv")


def write_results(rows: Sequence[Row], by: Sequence[str], output: Path) -> list[dict[str, Any]]:
    """Write the rows, and for each group of equal `by` the mean and deviation; print these.

    A cell is empty where nothing could be measured.
    """
    rows = list(rows)
    keys = [*dict.fromkeys(tuple(row[name] for name in by) for row in rows)]
    measured = [name for name in rows[0] if name not in (*by, "run")]
    summary = []
    for key in keys:
        group = [row for row in rows if tuple(row[name] for name in by) == key]
        line: dict[str, Any] = {**dict(zip(by, key, strict=True)), "runs": len(group)}
        for name in measured:
            values = [row[name] for row in group if row[name] is not None]
            line[f"{name}_mean"] = statistics.mean(values) if values else None
            line[f"{name}_sd"] = statistics.stdev(values) if len(values) > 1 else None
        summary.append(line)
    for path, lines in ((output, rows), (summary_path(output), summary)):
        try:
            with open(path, "w", encoding="utf-8", newline="") as file:
                writer = csv.DictWriter(file, [*lines[0]], lineterminator="\n")
                writer.writeheader()
                writer.writerows(lines)
        except OSError as error:
            raise StorageError(f"{path} cannot be written: {error.strerror}") from error
    for line in summary:
        head = ", ".join(f"{name} {line[name]}" for name in by)
        print(head or "all", f"({line['runs']} runs)")
        for name in measured:
            print(f"  {name:24} {_mean_and_deviation(line, name)}")
    print(f"{output}, {summary_path(output)}")
    return summary


def _mean_and_deviation(line: Row, name: str) -> str:
    mean, deviation = line[f"{name}_mean"], line[f"{name}_sd"]
    if mean is None:
        return "not measured"
    return f"{mean:.6g}" if deviation is None else f"{mean:.6g} ± {deviation:.2g}"


def plot_means(
    summary: Sequence[Row], x: str, ys: Mapping[str, str], by: Sequence[str], path: Path
) -> None:
    """Draw a panel per name of `ys`, which gives its label, over `x`: a line per group of `by`."""
    with host_packages("drawing"):
        import matplotlib

        matplotlib.use("svg")
        # Text as text and no date: the picture is small, and the same for the same results.
        matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "bapq", "font.size": 9})
        from matplotlib import pyplot
    shown = {name: label for name, label in ys.items() if summary[0][f"{name}_mean"] is not None}
    figure, panels = pyplot.subplots(
        1, len(shown), figsize=(3.2 * len(shown), 2.8), layout="constrained", squeeze=False
    )
    places = {value: place for place, value in enumerate(dict.fromkeys(row[x] for row in summary))}
    ordered = sorted(summary, key=lambda row: [str(row[name]) for name in by])
    groups = itertools.groupby(ordered, key=lambda row: tuple(row[name] for name in by))
    for key, lines in groups:
        group = list(lines)
        for panel, name in zip(panels[0], shown, strict=True):
            panel.errorbar(
                [places[row[x]] for row in group],
                [row[f"{name}_mean"] for row in group],
                [row[f"{name}_sd"] or 0 for row in group],
                marker="o",
                capsize=3,
                label=", ".join(map(str, key)) or None,
            )
    for panel, label in zip(panels[0], shown.values(), strict=True):
        panel.set_xticks(list(places.values()), list(map(str, places)))
        panel.set_xlabel(x)
        panel.set_title(label, loc="left")
        panel.grid(color="#dddddd", linewidth=0.5)
    if by:
        panels[0][0].legend()
    try:
        figure.savefig(path, metadata={"Date": None})
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {error.strerror}") from error
    finally:
        pyplot.close(figure)
    print(path)
