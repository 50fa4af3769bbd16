"""What `Session.run` adds to the ONNX Runtime call in it, layer by layer, on tiny models.

    PYTHONPATH=tools python -m benchmarks.run_overhead [-r ROUNDS] [--format table|md|json]

Each layer calls the one before it, and a column is what it adds. One thread on one core; medians of
rounds that take all layers in turns, in time of the thread: the turns of other programs do not
count. Warm: runs follow each other. Cold: the program reads CACHE_BYTES before each, as one does
that has more to do than to run a tiny model. Banks go to .cache/bench.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from bapq_edge import Session
from bapq_edge.adaptive.policies import Static
from bapq_edge.engine.executor import execute
from bapq_edge.engine.graph import RUN_INPUT, open_graph
from bapq_edge.engine.library import kernels_name
from bapq_edge.policy import Precision

from .measure import build, single_input
from .models import WORK
from .tables import add_format, print_table

MODELS = ("digits_mlp", "digits_cnn")
SESSIONS: Mapping[str, dict[str, Any]] = {
    "no budget": {"level": 8},
    "budget": {"level": 8, "memory_budget": "64MiB"},
    "policy": {"policy": Static(Precision(level=8))},
    "policy, budget": {"policy": Static(Precision(level=8)), "memory_budget": "64MiB"},
}
ROUND_RUNS = 50
CACHE_BYTES = 32 << 20
LAYERS = ("ONNX Runtime", "Graph.call", "execute", "Passes.run", "Session.run")
"""From the bottom."""
HEADS = (
    "model", "session", "caches", LAYERS[0], *(f"+ {name}" for name in LAYERS[1:]), "beyond ONNX"
)  # fmt: skip
Layer = Callable[[], object]


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="benchmarks.run_overhead", description=__doc__)
    parser.add_argument("-r", "--rounds", type=int, default=101, metavar="ROUNDS")
    add_format(parser, "json")
    arguments = parser.parse_args()
    core = max(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {core})
    folders = [WORK / name for name in MODELS]
    for folder in folders:
        if not (folder / "model.bank").exists():
            build(folder)
    rows = [
        {"model": model, "session": session, "caches": caches, "us": us(layers, arguments.rounds)}
        for model, session, layers in _cases(folders)
        for caches, us in (("warm", _warm_us), ("cold", _cold_us))
    ]
    setting = {
        "cpu": f"{cpu_name()}, kernels {kernels_name()}, core {core}",
        "python": platform.python_version(),
        "onnxruntime": onnxruntime.__version__,
    }
    if arguments.format == "json":
        print(json.dumps({**setting, "runs": rows}, indent=1))
        return 0
    title = f"One run, µs ({', '.join(' '.join(item) for item in setting.items())})"
    print_table(title, HEADS, [_cells(**row) for row in rows], arguments.format)
    return 0


def _cells(model: str, session: str, caches: str, us: dict[str, float]) -> list[str]:
    totals = list(us.values())
    steps = [totals[0], *(b - a for a, b in itertools.pairwise(totals))]
    figures = [*steps, totals[-1] - totals[0]]
    return [model, session, caches, *(f"{figure:.1f}" for figure in figures)]


def _cases(folders: list[Path]) -> Iterator[tuple[str, str, dict[str, Layer]]]:
    for folder in folders:
        feed = single_input(folder)
        for name, options in SESSIONS.items():
            with (
                Session(folder / "model.bank", threads=1, **options) as session,
                _layers(session, feed) as layers,
            ):
                yield folder.name, name, layers


@contextlib.contextmanager
def _layers(session: Session, feed: dict[str, np.ndarray]) -> Iterator[dict[str, Layer]]:
    """All of them run the same graph on the same plan; the first two in a run that stays open."""
    parts = session.internals
    names = [value.name for value in session.get_outputs()]
    graph, store, precision = parts.graphs["whole"], parts.store, parts.replanner.main
    reference = open_graph(parts.bank.graph_bytes(), store, threads=1)
    run = store.begin_run()
    own_feed = {**feed, RUN_INPUT: run.ticket}
    runs = (
        lambda: reference.run(names, own_feed),
        lambda: graph.call(names, own_feed),
        lambda: execute(store, graph, feed, names),
        lambda: parts.passes.run("whole", precision, feed, names),
        lambda: session.run(None, feed),
    )
    try:
        yield dict(zip(LAYERS, runs, strict=True))
    finally:
        store.end_run(run)


def _warm_us(layers: Mapping[str, Layer], rounds: int) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in layers}
    for _ in range(rounds):
        for name, run in layers.items():
            run()
            started_ns = time.thread_time_ns()
            for _ in range(ROUND_RUNS):
                run()
            times[name].append((time.thread_time_ns() - started_ns) / ROUND_RUNS)
    return {name: statistics.median(each) / 1e3 for name, each in times.items()}


def _cold_us(layers: Mapping[str, Layer], rounds: int) -> dict[str, float]:
    other = np.zeros(CACHE_BYTES, np.uint8)
    times: dict[str, list[float]] = {name: [] for name in layers}
    for _ in range(rounds):
        for name, run in layers.items():
            other += 1
            started_ns = time.thread_time_ns()
            run()
            times[name].append(time.thread_time_ns() - started_ns)
    return {name: statistics.median(each) / 1e3 for name, each in times.items()}


def cpu_name() -> str:
    """The CPU, as the system calls it."""
    text = Path("/proc/cpuinfo").read_text()
    match = re.search(r"^model name\s*: (.*)$", text, re.MULTILINE)
    return match[1] if match else platform.machine()


if __name__ == "__main__":
    sys.exit(main())
