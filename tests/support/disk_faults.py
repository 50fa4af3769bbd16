"""What a session does on a disk that fails: run in a process of its own, where faulty_pread.c
answers the reads of plane files. Usage: disk_faults.py SCENARIO DIRECTORY
"""

from __future__ import annotations

import errno
import gc
import mmap
import os
import random
import re
import struct
import sys
import threading
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from bapq_edge import Session
from bapq_edge.bank.layout import LEVELS
from bapq_edge.errors import BankTruncatedError, DegradedWarning, StorageError
from bapq_edge.planning.planner import Request, plan
from support.internals import adopt, costs_of
from support.streaming import (
    PRECISIONS,
    all_resident,
    branches_bank,
    chain_bank,
    inputs,
    limits,
    publish,
    resident_outputs,
    run,
    tied_bank,
)


class Disk:
    """How reads of plane files go from now on."""

    def __init__(self) -> None:
        """Connects to the preloaded library; reads go well."""
        with open(os.environ["BAPQ_FAULTS"], "r+b") as file:
            self._shared = mmap.mmap(file.fileno(), 0)

    @property
    def reads(self) -> int:
        """Of plane files since the process began."""
        count: int = struct.unpack_from("i", self._shared)[0]
        return count

    def answer(
        self,
        *,
        well: int = 0,
        fail: int = 0,
        error: int = errno.EIO,
        interrupts: int = 0,
        largest: int = 0,
        microseconds: int = 0,
    ) -> None:
        """So many reads go well, then so many fail (-1: all); error 0 is the end of the file."""
        # The order matters to a reader that looks meanwhile: no failure before its details.
        struct.pack_into("i", self._shared, 8, 0)
        struct.pack_into("4i", self._shared, 12, error, interrupts, largest, microseconds)
        struct.pack_into("i", self._shared, 4, well)
        struct.pack_into("i", self._shared, 8, fail)


disk = Disk()


def outcome(session: Session, x: np.ndarray) -> tuple[np.ndarray | None, Exception | None, bool]:
    """(output, error, whether a lower level stood in); every error must name what failed."""
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        try:
            y = run(session, x)
        except (StorageError, BankTruncatedError) as error:
            assert re.search(r"m.bank: layer \w+: plane \w+ .* chunk \d+[: ]", str(error)), error
            assert "\n" not in str(error) and "bapq verify" in str(error)
            assert error.errno == errno.EIO
            return None, error, False
    degraded = [entry for entry in heard if issubclass(entry.category, DegradedWarning)]
    assert len(degraded) == len(heard)
    assert bool(degraded) == (session.events()[-1].kind == "degraded")
    return y, None, bool(degraded)


def interrupted(directory: Path) -> None:
    """Reads that are interrupted or short change nothing."""
    for make, kind in ((chain_bank, "chain"), (tied_bank, "tied")):
        bank = make(directory / f"{kind}.bank")
        xs = inputs(kind)
        outputs = resident_outputs(bank, xs)
        for faults in ({"interrupts": 3}, {"largest": 700}, {"interrupts": 1, "largest": 5000}):
            disk.answer(**faults)
            before = disk.reads
            with Session(bank, threads=2) as session:
                for precision, expected in zip(PRECISIONS, outputs, strict=True):
                    request = Request(**{"level": "auto", **precision})
                    for limit in (limits(costs_of(session), request)[0], None):
                        publish(session, replace(request, weight_bytes_limit=limit))
                        for x, y in zip(xs, expected, strict=True):
                            np.testing.assert_array_equal(run(session, x), y)
            assert disk.reads - before > 200
            disk.answer()


def slow(directory: Path) -> None:
    """Runs that all wait for a slow disk get their answers, and say how long they waited."""
    bank = chain_bank(directory / "m.bank")
    xs = inputs("chain")
    (expected,) = resident_outputs(bank, xs, [{"level": 8}])
    wrong = []
    with Session(bank, threads=1) as session:
        request = Request(level=8)
        disk.answer(microseconds=300)
        limit = limits(costs_of(session), request)[0]
        publish(session, replace(request, weight_bytes_limit=limit))

        def work() -> None:
            for x, y in zip(xs, expected, strict=True):
                if not np.array_equal(run(session, x), y):
                    wrong.append(x)

        workers = [threading.Thread(target=work) for _ in range(3)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert session.stats().read_wait_s > 0.01
    assert not wrong


def too_slow(directory: Path) -> None:
    """Level "auto" keeps to the time that a run is allowed, and says so."""
    bank = chain_bank(directory / "m.bank")
    (x, _) = inputs("chain")
    disk.answer(microseconds=2000)
    budget = 60 << 10
    with Session(bank, weight_budget=budget, threads=1) as session:
        for _ in range(12):
            run(session, x)
        slow = session.stats()
        told = [event for event in session.events() if event.kind == "storage"]
        assert told and "ms of computing" in slow.plan, slow.plan
        assert slow.predicted_ms is not None and slow.read_wait_s < 1, slow
        low = costs_of(session).sensitivity[:, -1].sum() ** 0.5
        assert 0 < slow.predicted_error <= low
    with Session(bank, weight_budget=budget, threads=1, latency_ms=60_000) as session:
        for _ in range(3):
            run(session, x)
        ample = session.stats()
        assert ample.planned_bits_per_weight > slow.planned_bits_per_weight
        assert ample.predicted_error < slow.predicted_error
        assert ample.predicted_ms > slow.predicted_ms


def in_another_order(directory: Path) -> None:
    """A slow disk is read once per run, even if the graph's order is not that of the bank."""
    bank = branches_bank(directory / "m.bank")
    x, _ = inputs("chain")
    disk.answer(microseconds=1000)  # the reader has still something to read as a run ends, mostly
    for _ in range(10):
        with Session(bank, level=1, threads=1) as session:
            request = Request(level=8)
            limit = limits(costs_of(session), request)[0]
            planned = publish(session, replace(request, weight_bytes_limit=limit))
            run(session, x)  # tells the order
            run(session, x)  # begins with what was read ahead in the old one
            before = session.stats().streamed_bytes
            run(session, x)
            read_bytes = session.stats().streamed_bytes - before
        assert read_bytes <= planned.streamed_bytes + planned.ring_bytes, read_bytes


def mixtures(session: Session, x: np.ndarray) -> set[bytes]:
    """What level 8 gives, and level 8 with any one chunk at level 4."""
    costs = costs_of(session)
    base = all_resident(costs, plan(costs, Request(level=8)))
    found = set()
    for chunk in range(-1, len(base.levels)):
        levels = base.levels.copy()
        if chunk >= 0:
            levels[chunk] = 4
        adopt(session, replace(base, levels=levels))
        found.add(run(session, x).tobytes())
    assert len(found) == len(base.levels) + 1
    return found


def failing(directory: Path) -> None:
    """From any read on, one, two or all fail: a named error, a fallback, or the right answer."""
    bank = chain_bank(directory / "m.bank")
    x, _ = inputs("chain")
    ((expected,),) = resident_outputs(bank, [x], [{"level": 8}])
    seen = {"right": 0, "degraded": 0, "failed": 0}  # depends on how far the reader is ahead
    with Session(bank, level=1, threads=1) as session:
        chunks = len(costs_of(session).weights)
        legal = mixtures(session, x)
        request = Request(level=8)
        for limit in (None, *limits(costs_of(session), request)[::2]):
            for well in range(0, 2 * chunks, 5):
                for fail, error in ((1, errno.EIO), (2, 0), (-1, errno.EIO), (-1, 0)):
                    session.set_level(1)
                    run(session, x)  # nothing of level 8 is in memory now
                    disk.answer(well=well, fail=fail, error=error)
                    publish(session, replace(request, weight_bytes_limit=limit))
                    y, failure, degraded = outcome(session, x)
                    if failure is not None:
                        seen["failed"] += 1
                        assert isinstance(failure, StorageError if error else BankTruncatedError)
                    elif degraded:
                        seen["degraded"] += 1
                        assert limit != limits(costs_of(session), request)[0]
                        assert y.tobytes() in legal - {expected.tobytes()}
                    else:
                        seen["right"] += 1
                        np.testing.assert_array_equal(y, expected)
                    disk.answer()
                    for _ in range(2):
                        np.testing.assert_array_equal(run(session, x), expected)
    assert seen["failed"] > 50, seen


def dead(directory: Path) -> None:
    """While nothing can be read every run fails by name and switching goes on; then all is well."""
    bank = chain_bank(directory / "m.bank")
    xs = inputs("chain")
    outputs = resident_outputs(bank, xs)
    with Session(bank, level=4, threads=2) as session:
        np.testing.assert_array_equal(run(session, xs[0]), outputs[2][0])
        disk.answer(fail=-1)
        np.testing.assert_array_equal(run(session, xs[0]), outputs[2][0])
        errors: list[Any] = []
        for level in (8, 32, 1, 2, 8):
            session.set_level(level)
            workers = [
                threading.Thread(target=lambda: errors.append(outcome(session, xs[1])[1]))
                for _ in range(1 if level == 8 else 3)
            ]
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()
        assert len(errors) == 11
        # At level 8 the plane of level 4 is still there the first time, so that stands in.
        assert errors[0] is None and all(isinstance(error, StorageError) for error in errors[1:])
        disk.answer()
        for precision, expected in zip(PRECISIONS, outputs, strict=True):
            request = Request(**{"level": "auto", **precision})
            for limit in (None, limits(costs_of(session), request)[0]):
                publish(session, replace(request, weight_bytes_limit=limit))
                for x, y in zip(xs, expected, strict=True):
                    np.testing.assert_array_equal(run(session, x), y)


def opening(directory: Path) -> None:
    """A session that cannot warm up is refused, and leaves neither thread nor file behind."""
    bank = chain_bank(directory / "m.bank")
    x, _ = inputs("chain")
    ((expected,),) = resident_outputs(bank, [x], [{"level": 8}])

    def held() -> tuple[int, int]:
        gc.collect()
        return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))

    before = held()
    disk.answer(fail=-1)
    for _ in range(3):
        try:
            Session(bank, memory_budget="1GiB", level=8)
        except StorageError:
            pass
        else:
            raise AssertionError("a dead disk passed the warm-up")
    assert held() == before, (held(), before)
    disk.answer()
    with Session(bank, memory_budget="1GiB", level=8) as session:
        np.testing.assert_array_equal(run(session, x), expected)


def flapping(directory: Path) -> None:
    """Faults that come and go under two running threads and changing plans: no wrong answer."""
    bank = chain_bank(directory / "m.bank")
    x, _ = inputs("chain")
    outputs = resident_outputs(bank, [x])
    legal = {y.tobytes() for (y,) in outputs}
    warnings.simplefilter("error", DegradedWarning)
    counts = {"right": 0, "degraded": 0, "failed": 0}
    wrong: list[Any] = []
    stop = threading.Event()
    chance = random.Random(0)
    with Session(bank, level=8, threads=2) as session:

        def work() -> None:
            while not stop.is_set():
                try:
                    y = run(session, x)
                except DegradedWarning:
                    counts["degraded"] += 1
                except (StorageError, BankTruncatedError):
                    counts["failed"] += 1
                except Exception as error:
                    wrong.append(error)
                else:
                    counts["right"] += 1
                    if y.tobytes() not in legal:
                        wrong.append(y)

        workers = [threading.Thread(target=work) for _ in range(2)]
        for worker in workers:
            worker.start()
        for _ in range(400):
            request = Request(level=chance.choice(LEVELS))
            limit = chance.choice([None, *limits(costs_of(session), request)])
            disk.answer(
                well=chance.randrange(60),
                fail=chance.choice([0, 1, 3, -1]),
                error=chance.choice([errno.EIO, 0]),
                largest=chance.choice([0, 3000]),
            )
            publish(session, replace(request, weight_bytes_limit=limit))
            time.sleep(chance.random() * 0.008)
        disk.answer()
        stop.set()
        for worker in workers:
            worker.join()
        assert not wrong, wrong[:3]
        assert counts["right"] > 20 and counts["failed"] > 20, counts
        for level, (y,) in zip(LEVELS, outputs, strict=False):
            session.set_level(level)
            np.testing.assert_array_equal(run(session, x), y)


SCENARIOS = (interrupted, slow, too_slow, in_another_order, failing, dead, opening, flapping)

if __name__ == "__main__":
    next(s for s in SCENARIOS if s.__name__ == sys.argv[1])(Path(sys.argv[2]))
