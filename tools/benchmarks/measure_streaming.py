"""One measurement under a budget, in a process of its own; `streaming.py` starts them.

    PYTHONPATH=tools python -m benchmarks.measure_streaming KIND FOLDER [ARGUMENT ...]

FOLDER is that of `measure.py`. Level 8 and one thread throughout; RUNTIME is fp32 or 8, BUDGET such
as 64MiB, or none. What is printed is JSON.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from bapq_edge.bank.reader import Bank
from bapq_edge.telemetry import peak_rss_bytes, rss_bytes

from .measure import open_runtime, run_s, single_input

PEAK_RUNS = 12
ROUNDS = 11
COLD_RUNS = 7


def peak(folder: Path, runtime: str, budget: str) -> dict[str, Any]:
    """Growth of the peak by a session and 12 runs, and a digest of each run's outputs."""
    feeds = _feeds(folder)
    gc.collect()
    before_bytes = rss_bytes()
    session = _open(folder, runtime, budget)
    digests = [_digest(session.run(None, feed)) for feed in feeds]
    return {"growth_bytes": peak_rss_bytes() - before_bytes, "digests": digests}


def ratio(folder: Path, budget: str, cores: str) -> dict[str, Any]:
    """Time of a streamed run over that of one with all weights resident, in turns.

    Fails if any output differs. `cores` is "one" for reader and operators on the same core.
    """
    if cores == "one":
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    feeds = _feeds(folder)
    resident = _open(folder, "8", "none")
    expected = [_digest(resident.run(None, feed)) for feed in feeds]
    streamed = _open(folder, "8", budget)
    if [_digest(streamed.run(None, feed)) for feed in feeds] != expected:
        raise AssertionError(f"{folder.name} in {budget}: streamed outputs differ")
    before = streamed.stats()
    pairs = [
        (run_s(streamed, feeds[i % PEAK_RUNS]), run_s(resident, feeds[i % PEAK_RUNS]))
        for i in range(_rounds(resident, feeds[0]))
    ]
    after = streamed.stats()
    streamed_s, resident_s = map(statistics.median, zip(*pairs, strict=True))
    return {
        "ratio": streamed_s / resident_s,
        "read_bytes": (after.streamed_bytes - before.streamed_bytes) // len(pairs),
        "wait_share": (after.read_wait_s - before.read_wait_s) / sum(s for s, _ in pairs),
    }


def cold(folder: Path, budget: str) -> dict[str, float]:
    """Runs one after another past the page cache, and the same with all weights resident."""
    feed = single_input(folder)
    with _open(folder, "8", "none", direct_io=True) as session:
        for _ in range(2):
            session.run(None, feed)
        compute_s = statistics.median(run_s(session, feed) for _ in range(COLD_RUNS))
    with _open(folder, "8", budget, direct_io=True) as session:
        for _ in range(3):
            session.run(None, feed)
        before = session.stats()
        started_s = time.perf_counter()
        for _ in range(COLD_RUNS):
            session.run(None, feed)
        seconds = time.perf_counter() - started_s
        after = session.stats()
    return {
        "compute_s": compute_s,
        "run_s": seconds / COLD_RUNS,
        "read_bytes": (after.streamed_bytes - before.streamed_bytes) / COLD_RUNS,
    }


def load(folder: Path, runtime: str) -> float:
    """Time from nothing but the imports to the first answer, in seconds."""
    feed = single_input(folder)
    started_s = time.perf_counter()
    _open(folder, runtime, "none").run(None, feed)
    return time.perf_counter() - started_s


def switch(folder: Path) -> dict[str, float]:
    """Level 8 to 4 and back: time until the memory is back, and bytes that are read."""
    feed = single_input(folder)
    session = _open(folder, "8", "none")
    for _ in range(2):
        session.run(None, feed)
    bank = Bank.open(folder / "model.bank")
    plane_bytes = int(bank.chunks("r8")["bytes"].sum())
    downs_s, read_down, read_up, freed = [], [], [], []
    for _ in range(ROUNDS):
        read_bytes, full_bytes = session.stats().streamed_bytes, _anonymous_bytes()
        started_s = time.perf_counter()
        session.set_level(4)
        while _anonymous_bytes() > full_bytes - 0.95 * plane_bytes:
            if time.perf_counter() - started_s > 5:
                raise AssertionError(f"{folder.name}: level 4 gave back no memory")
        downs_s.append(time.perf_counter() - started_s)
        freed.append(full_bytes - _anonymous_bytes())
        session.run(None, feed)
        low_bytes = session.stats().streamed_bytes
        session.set_level(8)
        session.run(None, feed)
        read_down.append(low_bytes - read_bytes)
        read_up.append(session.stats().streamed_bytes - low_bytes)
    return {
        "down_s": statistics.median(downs_s),
        "slowest_down_s": max(downs_s),
        "freed_bytes": statistics.median(freed),
        "read_down_bytes": max(read_down),
        "read_up_bytes": max(read_up),
        "plane_bytes": plane_bytes,
    }


def answer(folder: Path, runtime: str, budget: str) -> str:
    """Digest of the answer to one input."""
    return _digest(_open(folder, runtime, budget).run(None, single_input(folder)))


def _open(folder: Path, runtime: str, budget: str, **options: Any) -> Any:
    if budget != "none":
        options["memory_budget"] = budget
    return open_runtime(folder, runtime, threads=1, **options)


def _feeds(folder: Path) -> list[dict[str, np.ndarray]]:
    """As many inputs as runs, made of one without numpy.random, whose import takes memory."""
    single = single_input(folder)
    return [{name: np.roll(x, i) for name, x in single.items()} for i in range(PEAK_RUNS)]


def _digest(outputs: list[np.ndarray]) -> str:
    return hashlib.sha256(b"".join(output.tobytes() for output in outputs)).hexdigest()


def _rounds(session: Any, feed: dict[str, np.ndarray]) -> int:
    """Enough for a median, and no more than some twenty seconds of both sides."""
    return min(max(int(8 / run_s(session, feed)), ROUNDS), 501)


def _anonymous_bytes() -> int:
    with open("/proc/self/status", encoding="ascii") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon:"))


if __name__ == "__main__":
    kind, place, *rest = sys.argv[1:]
    kinds = {f.__name__: f for f in (peak, ratio, cold, load, switch, answer)}
    print(json.dumps(kinds[kind](Path(place), *rest)))
