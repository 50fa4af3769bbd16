"""Soaks sessions: `python tests/fuzz/soak.py --seconds 3600`.

Four threads run sessions of two banks in random shapes, switch their precision, close them, drop
them without closing and open new ones under random budgets, while the disk stutters and fails.
Every answer must be one of a plan that was asked for, every error must have a name. Now and then
all sessions are closed: memory, file handles and threads must then be what they were at first.
"""

from __future__ import annotations

import argparse
import errno
import faulthandler
import gc
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), str(TESTS.parent / "tools")]

import numpy as np  # noqa: E402

from bapq_edge import Session  # noqa: E402
from bapq_edge.errors import (  # noqa: E402
    BankTruncatedError,
    BapqWarning,
    BudgetTooSmallError,
    DegradedWarning,
    SessionClosedError,
    StorageError,
)
from bapq_edge.telemetry import rss_bytes  # noqa: E402

THREADS = 4
SLOTS = 3
"""Sessions that are open at a time."""

HANG_S = 120
ROUND_S = 20.0
"""Time from one look at memory and handles to the next."""

GROWTH_BYTES = 2 << 20
"""Most that the memory of a process without sessions may grow by in the last quarter of an hour,
by the medians: the heap is never the same, and takes a while to find its size."""

SHORT_GROWTH_BYTES = 8 << 20
"""In a run of few rounds."""

POOL = 12
"""Samples that inputs are made of; the answers to each are known."""

WEIGHT_BUDGETS = (None, "60KiB", "100KiB", "200KiB")
BUDGETS = (None, "auto", "2GiB", "1MiB")


class Bank:
    """A bank, samples, and what each is answered with in every precision."""

    def __init__(self, path: Path, samples: np.ndarray) -> None:
        """`samples` are (POOL, ...) in the shape of the model's input."""
        from support.streaming import PRECISIONS, resident_outputs

        self.path, self.samples = path, samples
        self.precisions = list(PRECISIONS)
        outputs = resident_outputs(path, [samples])
        self._legal = [[row.tobytes() for row in y] for (y,) in outputs]

    def is_legal(self, picked: np.ndarray, answer: np.ndarray) -> bool:
        """Whether these samples are answered so in one of the precisions, the same for all."""
        rows = [row.tobytes() for row in answer]
        return any(
            all(row == legal[sample] for row, sample in zip(rows, picked, strict=True))
            for legal in self._legal
        )


class Soak:
    """The sessions, and what happened to them."""

    def __init__(self, banks: list[Bank], seed: int, answer_reads: Callable[..., None]) -> None:
        """`answer_reads` says how the disk answers from now on."""
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []
        self._banks = banks
        self._chance = random.Random(seed)
        self._answer_reads = answer_reads
        self._lock = threading.Lock()
        self._slots: list[tuple[Bank, Session] | None] = [None] * SLOTS
        self._ending = threading.Event()

    def play(self, seconds: float) -> None:
        """Let everything happen for so long; closes all sessions then."""
        self._ending.clear()
        seeds = [self._chance.random() for _ in range(THREADS)]
        workers = [threading.Thread(target=self._work, args=(seed,)) for seed in seeds]
        for worker in workers:
            worker.start()
        end_s = time.monotonic() + seconds
        while time.monotonic() < end_s and not self.wrong:
            faulthandler.dump_traceback_later(HANG_S, exit=True)
            self._answer_reads(
                well=self._chance.randrange(200),
                fail=self._chance.choice([0, 0, 1, 3, -1]),
                error=self._chance.choice([errno.EIO, 0]),
                largest=self._chance.choice([0, 3000]),
                microseconds=self._chance.choice([0, 0, 0, 200]),
            )
            time.sleep(self._chance.random() * 0.05)
        self._answer_reads()
        self._ending.set()
        for worker in workers:
            worker.join()
        for place in range(SLOTS):
            self._put(place, None)
        faulthandler.cancel_dump_traceback_later()

    def _work(self, seed: float) -> None:
        chance = random.Random(seed)
        while not self._ending.is_set() and not self.wrong:
            try:
                self._act(chance, chance.randrange(SLOTS))
            except DegradedWarning:
                self.counts["degraded"] += 1
            except (StorageError, BankTruncatedError):
                self.counts["reads that failed"] += 1
            except (SessionClosedError, CancelledError):
                self.counts["closed by another thread"] += 1
            except BudgetTooSmallError:
                self.counts["budgets refused"] += 1
            except BaseException as error:
                self.wrong.append(f"{type(error).__name__}: {error}")
                raise

    def _act(self, chance: random.Random, place: int) -> None:
        with self._lock:
            entry = self._slots[place]
        dice = chance.random()
        if entry is None or dice < 0.01:
            bank = chance.choice(self._banks)
            session = Session(
                bank.path,
                threads=chance.choice([1, 2]),
                weight_budget=chance.choice(WEIGHT_BUDGETS),
                **chance.choice(bank.precisions),
            )
            self.counts["sessions"] += 1
            self._put(place, (bank, session), closing=chance.random() < 0.5)
            return
        bank, session = entry
        if dice < 0.1:
            precision = chance.choice(bank.precisions)
            if "level" in precision:
                session.set_level(precision["level"])
            else:
                session.set_bits(precision["bits"])
            self.counts["switches"] += 1
        elif dice < 0.12:
            session.set_memory_budget(chance.choice(BUDGETS))
            self.counts["budgets"] += 1
        elif dice < 0.14:
            session.stats()
            session.events()
        else:
            self._run(chance, bank, session)

    def _run(self, chance: random.Random, bank: Bank, session: Session) -> None:
        picked = np.array(chance.choices(range(POOL), k=chance.randint(1, 9)))
        run: Any = session.run if chance.random() < 0.8 else _submitted(session)
        (answer,) = run(None, {"x": bank.samples[picked]})
        self.counts["answers"] += 1
        if not bank.is_legal(picked, answer):
            self.wrong.append(f"an answer of no plan: samples {picked} of {bank.path.name}")

    def _put(self, place: int, entry: tuple[Bank, Session] | None, *, closing: bool = True) -> None:
        """Another session in the place; the one before is closed, or only dropped."""
        with self._lock:
            before, self._slots[place] = self._slots[place], entry
        if before is not None and closing:
            before[1].close()
        self.counts["closed" if closing else "dropped"] += before is not None


def _submitted(session: Session) -> Callable[..., Any]:
    def run(names: Any, feed: Any) -> Any:
        return session.submit(names, feed).result(timeout=HANG_S)

    return run


def held() -> dict[str, int]:
    """What the process holds, once what was dropped is given back."""
    from bapq_edge import internals

    gc.collect()
    while internals._giving_back:
        time.sleep(0.01)
    return {
        "rss_bytes": rss_bytes(),
        "handles": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
    }


def soak(seconds: float, seed: int, folder: Path) -> dict[str, Any]:
    """Play round after round; what happened, and what was held after each."""
    from support.disk_faults import disk
    from support.streaming import chain_bank, mobile_bank

    rng = np.random.default_rng(seed)
    banks = [
        Bank(chain_bank(folder / "chain.bank"), rng.standard_normal((POOL, 96), np.float32)),
        Bank(
            mobile_bank(folder / "mobile.bank"), rng.standard_normal((POOL, 48, 7, 6), np.float32)
        ),
    ]
    warnings.simplefilter("ignore", BapqWarning)
    warnings.simplefilter("error", DegradedWarning)
    warnings.simplefilter("ignore", ResourceWarning)
    play = Soak(banks, seed, disk.answer)
    end_s = time.monotonic() + seconds
    rounds = []
    while not play.wrong and (len(rounds) < 3 or time.monotonic() < end_s):
        play.play(min(ROUND_S, max(1.0, seconds / 4)))
        rounds.append(held())
        print(
            f"{len(rounds)} rounds: {dict(play.counts)}, {rounds[-1]}", file=sys.stderr, flush=True
        )
    return {
        "counts": dict(play.counts),
        "wrong": play.wrong,
        "leaks": leaks_of(rounds),
        "rounds": rounds,
    }


def leaks_of(rounds: list[dict[str, int]]) -> list[str]:
    """What a process without sessions holds more of, round after round."""
    quarter = max(1, len(rounds) // 4)
    before, last = rounds[-2 * quarter : -quarter], rounds[-quarter:]

    def grown(name: str) -> float:
        middle = [statistics.median(each[name] for each in part) for part in (before, last)]
        return middle[1] - middle[0]

    most_bytes = GROWTH_BYTES if quarter >= 10 else SHORT_GROWTH_BYTES
    leaks = ["rss_bytes"] if before and grown("rss_bytes") > most_bytes else []
    for name in ("handles", "threads"):
        if min(each[name] for each in last) > rounds[0][name]:
            leaks.append(name)
    return leaks


def main() -> None:
    """Start again with the library that answers reads, and soak."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    if "BAPQ_FAULTS" not in os.environ:
        build = [TESTS / "native/build.sh", "tests", "faulty_pread"]
        library = subprocess.run(build, check=True, capture_output=True, text=True).stdout.strip()
        with tempfile.NamedTemporaryFile(prefix="bapq-faults-") as faults:
            faults.write(bytes(28))
            faults.flush()
            environment = {**os.environ, "LD_PRELOAD": library, "BAPQ_FAULTS": faults.name}
            command = [sys.executable, *sys.argv]
            sys.exit(subprocess.run(command, env=environment, check=False).returncode)
    with tempfile.TemporaryDirectory(prefix="bapq-soak-") as folder:
        found = soak(arguments.seconds, arguments.seed, Path(folder))
    print(json.dumps(found))
    sys.exit(bool(found["wrong"] or found["leaks"]))


if __name__ == "__main__":
    main()
