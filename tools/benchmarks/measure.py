"""One measurement in a process of its own; `models.py` starts them and reads their JSON.

    PYTHONPATH=tools python -m benchmarks.measure build|errors FOLDER
    PYTHONPATH=tools python -m benchmarks.measure latency FOLDER [RUNTIME ...]
    PYTHONPATH=tools python -m benchmarks.measure memory FOLDER RUNTIME

FOLDER is named after a model of the zoo and holds what `build` writes: model.onnx, model.bank and
single.npz, the input of one run. A runtime is fp32 (ONNX Runtime on model.onnx), dynamic_int8 (the
same after `quantize_dynamic`), or a level of the bank.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

# A process that measures memory imports no more than a device has.
from bapq_edge import Session
from bapq_edge.bank.layout import LEVELS
from bapq_edge.bank.reader import Bank
from bapq_edge.telemetry import peak_rss_bytes, rss_bytes

__all__ = ["open_runtime", "run_s", "runtimes_of", "single_input"]

LATENCY_S = 5.0
"""Time to measure each runtime for, together with the float32 runs between"""
LATENCY_ROUNDS = range(11, 1001)


def runtimes_of(folder: Path) -> list[str]:
    """List what runs the model: fp32 first, then the peers, then the levels, highest first."""
    peers = ["dynamic_int8"] if (folder / "dynamic_int8.onnx").exists() else []
    return ["fp32", *peers, *map(str, LEVELS)]


def build(folder: Path) -> dict[str, Any]:
    """Write model, bank and input; seconds of the bank's build, and bytes per runtime."""
    from bapq_tools import build_bank
    from benchmarks.zoo import make_model

    from .cases import load_case

    model, bank_path = folder / "model.onnx", folder / "model.bank"
    folder.mkdir(parents=True, exist_ok=True)
    make_model(folder.name, model)
    case = load_case(folder.name, model)
    np.savez(folder / "single.npz", **case.single)
    started_s = time.perf_counter()
    report = build_bank(
        model, bank_path, calibration=case.calibration, levels=LEVELS, progress=False
    )
    seconds = time.perf_counter() - started_s
    if folder.name == "minilm":
        _quantize_dynamic(model, folder / "dynamic_int8.onnx")

    bank = Bank.open(bank_path)
    graph_bytes = bank.manifest.graph.bytes
    sizes = {str(level): graph_bytes + bank.weight_bytes(level) for level in LEVELS}
    for runtime, file in (("fp32", model), ("dynamic_int8", folder / "dynamic_int8.onnx")):
        if runtime in runtimes_of(folder):
            sizes[runtime] = file.stat().st_size
    return {
        "weights": report.weights,
        "layers": report.layers,
        "build_s": seconds,
        "bank_bytes": sum(path.stat().st_size for path in bank_path.rglob("*") if path.is_file()),
        "f32_plane_bytes": report.plane_bytes["f32"],
        "bytes": sizes,
    }


def _quantize_dynamic(model: Path, out: Path) -> None:
    from onnxruntime.quantization import quantize_dynamic

    logging.disable(logging.WARNING)  # it advises to run shape inference first, to no effect here
    quantize_dynamic(model, out)


def errors(folder: Path) -> dict[str, dict[str, Any]]:
    """Per runtime: the relative error, that of the worst float output, and the answers' quality."""
    from .cases import judge, load_case, relative_error

    case = load_case(folder.name, folder / "model.onnx")
    session = open_runtime(folder, "fp32", threads=len(os.sched_getaffinity(0)))
    names = [value.name for value in session.get_outputs() if value.type == "tensor(float)"]
    reference: dict[str, list[np.ndarray]] = {}
    results = {}
    for runtime in runtimes_of(folder):
        session = open_runtime(folder, runtime, threads=len(os.sched_getaffinity(0)))
        runs = [session.run(names, feed) for feed in case.held_out]
        outputs = dict(zip(names, map(list, zip(*runs, strict=True)), strict=True))
        reference = reference or outputs
        worst = max(relative_error(case, outputs[name], reference[name]) for name in names)
        judged = case.judged_output
        quality = judge(case, outputs[judged], reference[judged]) if judged else {}
        results[runtime] = {"relative_error": worst, **quality}
    return results


def memory(folder: Path, runtime: str) -> int:
    """Growth of this process's peak memory by opening a session and running it once, in bytes."""
    feed = single_input(folder)
    gc.collect()
    before_bytes = rss_bytes()
    session = open_runtime(folder, runtime, threads=1)
    session.run(None, feed)
    return peak_rss_bytes() - before_bytes


def latency(folder: Path, *runtimes: str) -> dict[str, float]:
    """Per runtime, by default all: median time of a run over fp32's, in turns on one core."""
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    feed = single_input(folder)
    reference = open_runtime(folder, "fp32", threads=1)
    ratios = {}
    for runtime in runtimes or runtimes_of(folder)[1:]:
        session = open_runtime(folder, runtime, threads=1)
        for _ in range(2):  # warm up
            pair_s = run_s(session, feed) + run_s(reference, feed)
        rounds = min(max(int(LATENCY_S / pair_s), LATENCY_ROUNDS.start), LATENCY_ROUNDS.stop - 1)
        pairs = [(run_s(session, feed), run_s(reference, feed)) for _ in range(rounds)]
        ours_s, fp32_s = map(statistics.median, zip(*pairs, strict=True))
        ratios[runtime] = ours_s / fp32_s
    return ratios


def single_input(folder: Path) -> dict[str, np.ndarray]:
    """Input of one run, as `build` wrote it."""
    with np.load(folder / "single.npz") as arrays:
        return {name: arrays[name] for name in arrays.files}


def open_runtime(folder: Path, runtime: str, threads: int, **options: Any) -> Any:
    """A session of the runtime; the options are those of `bapq_edge.Session`."""
    if runtime.isdecimal():
        return Session(folder / "model.bank", level=int(runtime), threads=threads, **options)
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = threads
    file = "model.onnx" if runtime == "fp32" else f"{runtime}.onnx"
    return onnxruntime.InferenceSession(
        str(folder / file), settings, providers=["CPUExecutionProvider"]
    )


def run_s(session: Any, feed: dict[str, np.ndarray]) -> float:
    """Time of one run, in seconds."""
    started_s = time.perf_counter()
    session.run(None, feed)
    return time.perf_counter() - started_s


if __name__ == "__main__":
    kind, place, *rest = sys.argv[1:]
    measurement = {"build": build, "errors": errors, "memory": memory, "latency": latency}[kind]
    print(json.dumps(measurement(Path(place), *rest)))
