"""Runs on the emulated board: a model on some engines, with a mark before and after each run.

    guest.py FOLDER RUNS ENGINE...

An engine is fp32 or int8 (ONNX Runtime), ncnn, or a level of the bank. Prints a line of JSON for
each: its runs, or why there are none; `benchmarks.arm.counts` tells what a mark is.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

Feed = dict[str, np.ndarray]

WARM_UP_RUNS = 2
"""they read the weights, and size ONNX Runtime's arena"""
SLOW_S = 5.0
"""A run that takes longer is measured once: its number of instructions hardly varies"""


def main(folder: Path, runs: int, engines: list[str]) -> None:
    """Measure each engine in turn."""
    with np.load(folder / "input.npz") as arrays:
        feed = {name: arrays[name] for name in arrays.files}
    for engine in engines:
        record: dict[str, Any] = {"engine": engine}
        try:
            run, record["version"] = open_engine(folder, engine, feed)
            for _ in range(WARM_UP_RUNS):
                started_s = time.monotonic()
                run()
        except Exception as error:  # an engine that cannot run a model must not end the others
            print(json.dumps({**record, "failed": f"{type(error).__name__}: {error}"}), flush=True)
            continue
        record["runs"] = 1 if time.monotonic() - started_s > SLOW_S else runs
        gc.collect()
        gc.disable()
        for _ in range(record["runs"]):
            os.getppid()
            run()
        os.getppid()
        gc.enable()
        print(json.dumps(record), flush=True)
        del run


def open_engine(folder: Path, engine: str, feed: Feed) -> tuple[Callable[[], object], str]:
    """What makes one run of the model with all its weights in memory, and on what."""
    if engine in ("fp32", "int8"):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        file = {"fp32": "model.onnx", "int8": "int8.onnx"}[engine]
        session = onnxruntime.InferenceSession(
            str(folder / file), options, providers=["CPUExecutionProvider"]
        )
        return lambda: session.run(None, feed), f"ONNX Runtime {onnxruntime.__version__}"
    if engine == "ncnn":
        return open_ncnn(folder / "ncnn", feed)
    from bapq_edge import Session, __version__
    from bapq_edge.engine.library import kernels_name

    ours = Session(folder / "model.bank", level=int(engine), threads=1)
    return lambda: ours.run(None, feed), f"bapq-edge {__version__}, {kernels_name()}"


def open_ncnn(folder: Path, feed: Feed) -> tuple[Callable[[], object], str]:
    """On a CPU that computes in float16, ncnn does so by default; on others, float32 throughout."""
    import ncnn

    net = ncnn.Net()
    net.opt.num_threads = 1
    features = Path("/proc/cpuinfo").read_text().split()
    half = "asimdhp" in features
    if not half:
        net.opt.use_fp16_packed = net.opt.use_fp16_storage = net.opt.use_fp16_arithmetic = False
    if net.load_param(str(folder / "model.ncnn.param")) or net.load_model(
        str(folder / "model.ncnn.bin")
    ):
        raise RuntimeError("ncnn does not load the model")
    # pnnx numbers the inputs; a batch of one has no axis. ncnn may write on what it does not own.
    types = json.loads((folder / "inputs.json").read_text())
    arrays = [feed[name][0].astype(kind) for name, kind in types.items()]
    inputs = [ncnn.Mat(array).clone() for array in arrays]

    def run() -> object:
        extractor = net.create_extractor()
        for index, value in enumerate(inputs):
            extractor.input(f"in{index}", value)
        status, output = extractor.extract("out0")
        if status:
            raise RuntimeError(f"ncnn ended with {status}")
        return output

    return run, f"ncnn {ncnn.__version__}, {'fp16' if half else 'fp32'}"


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
