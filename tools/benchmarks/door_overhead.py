"""What other ways to run cost over `Session.run`: io_binding, OrtValues, futures, the interpreter.

    PYTHONPATH=tools python -m benchmarks.door_overhead [-r ROUNDS] [--format table|md|json]

Tiny models on one thread; medians of rounds that take all ways in turns, in time of the process,
all threads together: the turns of other programs do not count. A column is what a way takes beyond
`run`. "submit" waits for every future before the next; "submit, queued" gives the session QUEUED
runs and then waits; "thread and back" is what that takes without any run. --clock times by the
clock, where the machine has nothing else to do. Banks go to .cache/bench.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnxruntime

from bapq_edge import Session
from bapq_edge.compat.tflite import Interpreter
from bapq_edge.engine.library import kernels_name

from .measure import build, single_input
from .models import WORK
from .run_overhead import MODELS, cpu_name
from .tables import add_format, print_table

ROUND_RUNS = 50
QUEUED = 10
WAYS = (
    "run",
    "run_with_iobinding",
    "run_with_iobinding, bound output",
    "run_with_ort_values",
    "submit",
    "submit, queued",
    "set_tensor, invoke, get_tensor",
)
EMPTY = "thread and back"


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="benchmarks.door_overhead", description=__doc__)
    parser.add_argument("-r", "--rounds", type=int, default=101, metavar="ROUNDS")
    parser.add_argument("--clock", action="store_true", help="time by the clock")
    add_format(parser, "json")
    arguments = parser.parse_args()
    folders = [WORK / name for name in MODELS]
    for folder in folders:
        if not (folder / "model.bank").exists():
            build(folder)
    now_ns = time.perf_counter_ns if arguments.clock else time.process_time_ns
    rows = {
        folder.name: _median_us(ways, arguments.rounds, now_ns)
        for folder in folders
        for ways in _ways(folder)
    }
    setting = {
        "cpu": f"{cpu_name()}, kernels {kernels_name()}",
        "python": platform.python_version(),
        "onnxruntime": onnxruntime.__version__,
    }
    if arguments.format == "json":
        print(json.dumps({**setting, "us": rows}, indent=1))
        return 0
    heads = ("model", EMPTY, WAYS[0], *(f"+ {way}" for way in WAYS[1:]))
    cells = [
        [
            name,
            f"{us[EMPTY]:.1f}",
            f"{us[WAYS[0]]:.1f}",
            *(f"{us[way] - us[WAYS[0]]:.1f}" for way in WAYS[1:]),
        ]
        for name, us in rows.items()
    ]
    title = f"One run, µs ({', '.join(' '.join(item) for item in setting.items())})"
    print_table(title, heads, cells, arguments.format)
    return 0


def _ways(folder: Path) -> Iterator[dict[str, Callable[[], object]]]:
    ((name, value),) = single_input(folder).items()
    bank = folder / "model.bank"
    with (
        Session(bank, level=8, threads=1) as session,
        Interpreter(bank, level=8, num_threads=1) as interpreter,
        ThreadPoolExecutor(1) as pool,
    ):
        first = [session.get_outputs()[0].name]
        loose, bound = session.io_binding(), session.io_binding()
        (made,) = session.run(first, {name: value})
        target = np.empty_like(made)
        for binding in (loose, bound):
            binding.bind_cpu_input(name, value)
        loose.bind_output(first[0])
        address = target.ctypes.data
        bound.bind_output(first[0], "cpu", 0, target.dtype, target.shape, address)
        ort_value = onnxruntime.OrtValue.ortvalue_from_numpy(value)
        read = interpreter.get_input_details()[0]
        written = interpreter.get_output_details()[0]
        interpreter.resize_tensor_input(read["index"], value.shape)
        interpreter.allocate_tensors()

        def interpreted() -> None:
            interpreter.set_tensor(read["index"], value)
            interpreter.invoke()
            interpreter.get_tensor(written["index"])

        def queued() -> None:
            for future in [session.submit(first, {name: value}) for _ in range(QUEUED)]:
                future.result()

        runs: tuple[Callable[[], object], ...] = (
            lambda: session.run(first, {name: value}),
            lambda: session.run_with_iobinding(loose),
            lambda: session.run_with_iobinding(bound),
            lambda: session.run_with_ort_values(first, {name: ort_value}),
            lambda: session.submit(first, {name: value}).result(),
            queued,
            interpreted,
        )
        yield {**dict(zip(WAYS, runs, strict=True)), EMPTY: lambda: pool.submit(int).result()}


def _median_us(
    ways: Mapping[str, Callable[[], object]], rounds: int, now_ns: Callable[[], int]
) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, run in ways.items():
            run()
            started_ns = now_ns()
            for _ in range(ROUND_RUNS // (QUEUED if "queued" in name else 1)):
                run()
            times[name].append((now_ns() - started_ns) / ROUND_RUNS)
    return {name: statistics.median(each) / 1e3 for name, each in times.items()}


if __name__ == "__main__":
    sys.exit(main())
