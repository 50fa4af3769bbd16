"""Runs a model and its bank at each level; `instructions.c` counts what is between two getppid.

Usage: run_counted.py MODEL.onnx BANK INPUT.npz
"""

from __future__ import annotations

import os
import statistics
import sys

import numpy as np
import onnxruntime

from bapq_edge import Session

RUNS = 5


def count(name: str, session: Session | onnxruntime.InferenceSession, feed: dict) -> None:
    for _ in range(2):  # reads the weights, and sizes ONNX Runtime's arena
        session.run(None, feed)
    print(f"run {name}", file=sys.stderr, flush=True)
    for _ in range(RUNS):
        os.getppid()
        session.run(None, feed)
    os.getppid()


def counted(lines: list[str]) -> dict[str, float]:
    """What the runs of each name took, from the lines that `count` and the plugin wrote."""
    marks: dict[str, list[int]] = {}
    for line in lines:
        kind, _, value = line.partition(" ")
        if kind == "run":
            marks[value] = numbers = []
        elif kind == "instructions" and marks:
            numbers.append(int(value))
    return {name: statistics.median(np.diff(numbers)) for name, numbers in marks.items()}


def main(model: str, bank: str, source: str) -> None:
    with np.load(source) as arrays:
        feed = {name: arrays[name] for name in arrays.files}
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    providers = ["CPUExecutionProvider"]
    count("fp32", onnxruntime.InferenceSession(model, options, providers=providers), feed)
    for level in (32, 8, 4, 2, 1):
        with Session(bank, level=level, threads=1) as session:
            count(f"level {level}", session, feed)


if __name__ == "__main__":
    main(*sys.argv[1:])
