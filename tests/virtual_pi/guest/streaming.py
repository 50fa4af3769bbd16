"""On the board, as root: weights streamed from a cold card, against reading and computing alone.

Usage: streaming.py BANK INPUT.npz LENGTH LEVEL WEIGHT_BUDGET; of the input's second axis, LENGTH
are taken.

Each round takes all three, side by side: a run with all weights in memory (the compute), a plain
read of a plane around the page cache (the card's speed), and a run that streams, after the page
cache was dropped. One record with the medians.
"""

from __future__ import annotations

import json
import mmap
import os
import statistics
import sys
import time
from pathlib import Path

import numpy as np

import bapq_edge
from bapq_edge.bank.reader import Bank

ROUNDS = 5


def main(bank: str, source: str, length: str, level: str, weight_budget: str) -> None:
    """Measure and tell."""
    feed = {name: array[:, : int(length)] for name, array in np.load(source).items()}
    opened = Bank.open(bank)
    plane = max((opened.plane_path(name) for name in opened.planes), key=os.path.getsize)
    chosen = int(level)
    with (
        bapq_edge.Session(bank, level=chosen) as resident,
        bapq_edge.Session(bank, level=chosen, weight_budget=weight_budget) as streamed,
    ):
        for session in (resident, streamed):
            session.run(None, feed)
        compute_s, card_bytes_per_s, run_s, read_bytes = [], [], [], []
        for _ in range(ROUNDS):
            compute_s.append(seconds(lambda: resident.run(None, feed)))
            drop_caches()
            card_bytes_per_s.append(card_speed(plane))
            drop_caches()
            before = streamed.stats().streamed_bytes
            run_s.append(seconds(lambda: streamed.run(None, feed)))
            read_bytes.append(streamed.stats().streamed_bytes - before)
        same = np.array_equal(resident.run(None, feed)[0], streamed.run(None, feed)[0])
        io_s = statistics.median(read_bytes) / statistics.median(card_bytes_per_s)
        record = {
            "compute_s": statistics.median(compute_s),
            "io_s": io_s,
            "run_s": statistics.median(run_s),
            "run_s_all": run_s,
            "read_bytes": statistics.median(read_bytes),
            "card_bytes_per_s": statistics.median(card_bytes_per_s),
            "weight_bytes": streamed.stats().resident_bytes,
            "same_answer": same,
        }
        print(json.dumps(record), flush=True)


def seconds(work) -> float:
    started_s = time.perf_counter()
    work()
    return time.perf_counter() - started_s


def drop_caches() -> None:
    Path("/proc/sys/vm/drop_caches").write_text("3")


def card_speed(path: Path) -> float:
    """Bytes per second of a plain sequential read around the page cache."""
    block = mmap.mmap(-1, 1 << 20)
    block[:] = bytes(len(block))
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
    done, started_s = 0, time.perf_counter()
    while count := os.preadv(descriptor, [block], done):
        done += count
        if count < len(block):
            break
    took_s = time.perf_counter() - started_s
    os.close(descriptor)
    return done / took_s


if __name__ == "__main__":
    main(*sys.argv[1:])
