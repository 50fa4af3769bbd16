"""On the board: a model at each of its levels, against what the host answers.

Usage: levels.py NAME FOLDER BUDGET; the folder holds bank, input.npz and expected.npz. Each level
runs with all its weights in memory first, if they fit there twice, then within the budget.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import psutil

import bapq_edge
from bapq_edge.bank.reader import Bank
from bapq_edge.engine.library import kernels_name


def main(name: str, folder: str, budget: str) -> None:
    """One record per level."""
    bank = Path(folder, "bank")
    feed = dict(np.load(Path(folder, "input.npz")))
    expected = np.load(Path(folder, "expected.npz"))
    levels = sorted({int(key.partition("@")[2]) for key in expected if "@float" not in key})[::-1]
    resident: dict[int, list[np.ndarray]] = {}
    fits = 2 * Bank.open(bank).weight_bytes(levels[0]) < psutil.virtual_memory().available
    if fits:
        with bapq_edge.Session(bank, level=levels[0]) as session:
            for level in levels:
                session.set_level(level)
                resident[level] = session.run(None, feed)
    Path("/proc/self/clear_refs").write_text("5")  # the high water begins anew
    before_bytes = high_water_bytes()
    with bapq_edge.Session(bank, level=levels[0], memory_budget=budget) as session:
        outputs = [value.name for value in session.get_outputs()]
        for level in levels:
            session.set_level(level)
            read_bytes = session.stats().streamed_bytes
            found = session.run(None, feed)
            host, exact = (
                [expected[f"{output}@{key}"] for output in outputs] for key in (level, "float")
            )
            stats = session.stats()
            record = {
                "model": name,
                "level": level,
                "kernels": kernels_name(),
                "resident_is_same": all(map(np.array_equal, found, resident.get(level, found))),
                "difference": max(map(largest_difference, found, host)),
                "cosine_to_host": min(map(cosine, found, host)),
                "cosine_to_float": cosine(found[0], exact[0]),
                "cosine_to_float_on_host": cosine(host[0], exact[0]),
                "weight_bytes": stats.resident_bytes,
                "read_bytes": stats.streamed_bytes - read_bytes,
                "peak_bytes": stats.peak_bytes,
                "growth_bytes": high_water_bytes() - before_bytes,
            }
            print(json.dumps(record), flush=True)


def largest_difference(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.max(np.abs(found - expected) / (1 + np.abs(expected))))


def cosine(found: np.ndarray, expected: np.ndarray) -> float:
    a, b = found.astype(np.float64).ravel(), expected.astype(np.float64).ravel()
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


def high_water_bytes() -> int:
    """VmHWM of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) << 10
    raise OSError("/proc/self/status has no VmHWM")


if __name__ == "__main__":
    main(*sys.argv[1:])
