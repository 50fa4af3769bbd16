"""Runs a bank at each level on stored inputs; needs the device package alone.

Usage: run_bank.py BANK INPUT.npz OUTPUT.npz
"""

from __future__ import annotations

import sys

import numpy as np
import onnxruntime

from bapq_edge import Session


def main(bank: str, source: str, target: str) -> None:
    with np.load(source) as arrays:
        feed = {name: arrays[name] for name in arrays.files}
    outputs = {}
    with Session(bank) as session:
        for level in (32, 8, 4, 2, 1):
            session.set_level(level)
            for value, output in zip(session.get_outputs(), session.run(None, feed), strict=True):
                outputs[f"{value.name}@{level}"] = output
    np.savez(target, **outputs)
    print(onnxruntime.__version__)


if __name__ == "__main__":
    main(*sys.argv[1:])
