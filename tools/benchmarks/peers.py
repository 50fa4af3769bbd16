"""Times of whole models beside ONNX Runtime's float32 and int8, by kernel family and threads.

    PYTHONPATH=tools python -m benchmarks.peers                   # all, ten minutes
    PYTHONPATH=tools python -m benchmarks.peers resnet50 --isa avx2 --rounds 15

Each engine has a process of its own with all weights in memory. Their runs take turns, and a
figure is the median of the ratios of a round, in which all engines run once. Models are those of
`benchmarks.arm`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, cast

import numpy as np

from .arm.models import MODELS, prepare
from .tables import add_format, add_names, print_table

WORK = Path(__file__).resolve().parents[2] / "build" / "bench_arm" / "models"
LARGE = ("squeezenet", "resnet50", "minilm_16", "minilm_64")
FAMILIES = ("avx2", "avx512vnni")
LEVELS = ("8", "4", "2")
ROUNDS = 21


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="benchmarks.peers", description=__doc__)
    add_names(parser, MODELS)
    parser.add_argument("--isa", nargs="+", choices=FAMILIES, default=FAMILIES)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    add_format(parser, "json")
    arguments = parser.parse_args()
    cells = [
        cell
        for model in arguments.names or LARGE
        for cell in _measure(model, arguments.isa, arguments.rounds)
    ]
    if arguments.format == "json":
        print(json.dumps(cells, indent=1))
        return
    print_table(
        f"Medians of {arguments.rounds} rounds",
        ["model", "kernels", "level", "ms", "over fp32", "over int8", "2 threads against 1"],
        [
            [
                MODELS[cell["model"]],
                cell["engine"].partition(" ")[0],
                cell["engine"].partition(" ")[2],
                f"{cell['ms']:.1f}",
                f"{cell['over_fp32']:.2f}",
                f"{cell['over_int8']:.2f}",
                f"{cell['gain']:.2f}",
            ]
            for cell in cells
        ],
        arguments.format,
    )


def _measure(model: str, families: list[str], rounds: int) -> Iterator[dict[str, Any]]:
    """Every engine on one thread, and on two in turns with it."""
    folder = WORK / model
    prepare(model, folder, None)
    engines = ["ort fp32", "ort int8", *(f"{isa} {level}" for isa in families for level in LEVELS)]
    with ExitStack() as processes:
        asked = {
            (engine, threads): processes.enter_context(_process(folder, engine, threads))
            for engine in engines
            for threads in (1, 2)
        }
        took_ms: dict[tuple[str, int], list[float]] = {key: [] for key in asked}
        for _ in range(rounds):
            for key, pipe in asked.items():
                pipe.send(None)
                took_ms[key].append(cast(float, pipe.recv()))
    median = partial(_median_ratio, took_ms)
    for engine in engines:
        yield {
            "model": model,
            "engine": engine,
            "ms": statistics.median(took_ms[engine, 1]),
            "over_fp32": median((engine, 1), ("ort fp32", 1)),
            "over_int8": median((engine, 1), ("ort int8", 1)),
            "gain": median((engine, 1), (engine, 2)),
        }


def _median_ratio(
    took_ms: dict[tuple[str, int], list[float]], one: tuple[str, int], other: tuple[str, int]
) -> float:
    return statistics.median(a / b for a, b in zip(took_ms[one], took_ms[other], strict=True))


@contextmanager
def _process(folder: Path, engine: str, threads: int) -> Iterator[Connection]:
    """A process that runs the model whenever it is asked, and answers with milliseconds."""
    context = multiprocessing.get_context("spawn")
    pipe, end = context.Pipe()
    process = context.Process(target=_serve, args=(end, folder, engine, threads), daemon=True)
    process.start()
    pipe.recv()
    try:
        yield pipe
    finally:
        pipe.close()
        process.join()


def _serve(pipe: Connection, folder: Path, engine: str, threads: int) -> None:
    with np.load(folder / "input.npz") as arrays:
        feed = {name: arrays[name] for name in arrays.files}
    if threads == 1:
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    session = _open(folder, engine, threads)
    for _ in range(3):
        session.run(None, feed)
    pipe.send(None)
    while True:
        try:
            pipe.recv()
        except EOFError:
            return
        session.run(None, feed)  # brings code and weights back into the caches
        started_s = time.perf_counter()
        session.run(None, feed)
        pipe.send((time.perf_counter() - started_s) * 1e3)


def _open(folder: Path, engine: str, threads: int) -> Any:
    family, _, name = engine.partition(" ")
    if family == "ort":
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        # As our sessions do: idle threads leave the core to the next engine.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        file = {"fp32": "model.onnx", "int8": "int8.onnx"}[name]
        return onnxruntime.InferenceSession(
            str(folder / file), options, providers=["CPUExecutionProvider"]
        )
    os.environ["BAPQ_ISA"] = family  # before our library looks
    from bapq_edge import Session

    return Session(folder / "model.bank", level=int(name), threads=threads)


if __name__ == "__main__":
    main()
