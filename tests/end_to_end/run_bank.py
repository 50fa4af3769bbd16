"""Runs a bank at each level on stored inputs; needs the device package alone.

Each level runs with all weights in memory, and again with as many streamed as can be.

Usage: run_bank.py BANK INPUT.npz OUTPUT.npz
"""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
import onnxruntime

from bapq_edge import Session
from bapq_edge.bank.reader import Bank
from bapq_edge.engine.library import kernels_name
from bapq_edge.planning.planner import Request, chunk_costs, plan, smallest_limit


def main(bank: str, source: str, target: str) -> None:
    with np.load(source) as arrays:
        feed = {name: arrays[name] for name in arrays.files}
    outputs = {}
    costs = chunk_costs(Bank.open(bank))
    with Session(bank) as session:
        for level in (32, 8, 4, 2, 1):
            request = Request(level=level)
            least = Request(level=level, weight_bytes_limit=smallest_limit(costs, request))
            for kind, precision in (("resident", request), ("streamed", least)):
                planned = plan(costs, precision)
                replanner = session.internals.replanner
                replanner.adopt(replace(replanner.plans, by_precision={None: planned}))
                session.run(None, feed)  # brings home what stays
                read_bytes = session.stats().streamed_bytes
                values = session.run(None, feed)
                reads = session.stats().streamed_bytes > read_bytes
                assert reads == (not planned.pinned.all()), (level, kind)
                for value, output in zip(session.get_outputs(), values, strict=True):
                    outputs[f"{value.name}@{level} {kind}"] = output
    np.savez(target, **outputs)
    print(onnxruntime.__version__, kernels_name())


if __name__ == "__main__":
    main(*sys.argv[1:])
