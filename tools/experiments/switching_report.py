"""Runs the three measurements of `switching` and writes their tables."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from bapq_edge.bank.reader import Bank
from experiments.results import in_own_process, plot_means, write_results
from experiments.switching import FLOAT, Task, measure_level, measure_switches, trace_rows

__all__ = ["report_switching"]


def report_switching(task: Task, runs: int, output: Path) -> None:
    """Levels to `output`; switches and the budget trace to files of its name beside it."""
    held = sorted((level for level in Bank.open(task.bank).levels if level != 32), reverse=True)
    levels = [FLOAT, *map(str, held)]
    if task.labels is None:
        expected = task.bank.with_name("float32.npy")
        np.save(expected, np.concatenate([*task.answers(task.open(FLOAT))]))
        task = dataclasses.replace(task, expected=expected)
    rows, switches, trace = [], [], []
    for run in range(1, runs + 1):
        for level in levels:
            rows.append({"run": run, "level": level, **in_own_process(measure_level, task, level)})
        for low in levels[2:]:
            found = in_own_process(measure_switches, task, low, levels[1])
            switches += [{"run": run, **row} for row in found]
        trace += [{"run": run, **row} for row in in_own_process(trace_rows, task)]
    summary = write_results(rows, ["level"], output)
    write_results(switches, ["levels", "way"], beside(output, "switches"))
    by = ["step", "budget_share", "budget_bytes"]
    write_results(trace, by, beside(output, "trace"))
    labels = {
        "accuracy": "accuracy",
        "peak_bytes": "peak memory, bytes",
        "latency_ms": "run, ms",
        "energy_j": "joules a run",
    }
    plot_means(summary, "level", labels, [], output.with_suffix(".svg"))


def beside(output: Path, part: str) -> Path:
    """The file for another part of the results."""
    return output.with_name(f"{output.stem}_{part}.csv")
