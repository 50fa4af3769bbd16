"""Nested levels of one model: what each gives and takes, what switches cost, a trace of budgets."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from bapq_edge import Session
from bapq_edge.bank.reader import Bank
from bapq_edge.control.envelope import Envelope
from bapq_edge.profiling import Meter
from bapq_edge.telemetry import peak_rss_bytes, rss_bytes
from experiments.results import forget_peak

__all__ = ["FLOAT", "TRACE", "Task", "measure_level", "measure_switches", "measure_trace"]

Feed = dict[str, np.ndarray]
FLOAT = "float32"
"""Level of the row that is ONNX Runtime on the model itself."""
TRACE = (1.0, 0.6, 0.3, 0.15, 0.05, 0.6, 1.0)
"""Scripted budgets for the weights, as shares of the bytes of the highest level, in turn."""
_WARM_RUNS = 5
_TIMED_RUNS = 50
_METERED_S = 2.0


@dataclass(frozen=True)
class Task:
    """What a model is run on and judged by."""

    model: Path
    bank: Path
    single: Feed
    """Input of one run that is timed."""
    held_out: Sequence[Feed]
    output: str
    """Output that holds the answer, (samples, scores)."""
    labels: np.ndarray | None = None
    """Right classes of the held-out samples; without them answers are compared with float32's."""
    expected: Path | None = None
    """.npy of float32's answers to the held-out samples, where there are no labels. A file, because
    the process that measures a session's memory is to hold no such arrays of its own."""
    threads: int = 1

    def open(self, level: str) -> Any:
        """A session of the bank, or of ONNX Runtime on the model for FLOAT."""
        if level != FLOAT:
            return Session(self.bank, level=level, threads=self.threads)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.threads
        return onnxruntime.InferenceSession(
            str(self.model), options, providers=["CPUExecutionProvider"]
        )

    def answers(self, session: Any) -> Iterator[np.ndarray]:
        """The answers to the held-out samples, (samples, scores), feed by feed."""
        for feed in self.held_out:
            yield session.run([self.output], feed)[0]

    def accuracy(self, session: Any) -> float:
        """Share of right answers; without labels the mean cosine with the answers of float32."""
        judge, right = (
            (_cosines, np.load(self.expected, mmap_mode="r"))
            if self.expected is not None
            else (_right, self.labels)
        )
        if right is None:
            raise ValueError("neither labels nor expected answers: there is nothing to judge by")
        total, samples = 0.0, 0
        for found in self.answers(session):
            total += float(judge(found, right[samples : samples + len(found)]).sum())
            samples += len(found)
        return total / samples


def _right(found: np.ndarray, labels: np.ndarray) -> np.ndarray:
    return found.argmax(1) == labels


def _cosines(found: np.ndarray, expected: np.ndarray) -> np.ndarray:
    found, expected = found.reshape(len(found), -1), expected.reshape(len(found), -1)
    norms = np.linalg.norm(found, axis=1) * np.linalg.norm(expected, axis=1)
    return np.sum(found * expected, axis=1) / norms


def measure_level(task: Task, level: str) -> dict[str, Any]:
    """One row for a level, of this process: call it in one of its own.

    Memory and times are those of single runs; the accuracy is measured after them.
    """
    forget_peak()
    before_bytes = rss_bytes()
    session = task.open(level)
    for _ in range(_WARM_RUNS):
        session.run(None, task.single)
    times_s = []
    for _ in range(_TIMED_RUNS):
        started_s = time.perf_counter()
        session.run(None, task.single)
        times_s.append(time.perf_counter() - started_s)
    row = {
        "resident_bytes": None,
        "peak_bytes": peak_rss_bytes() - before_bytes,
        "bits_per_weight": None,
        "read_bytes": None,
        "latency_ms": statistics.median(times_s) * 1e3,
        "energy_j": None,
    }
    if level != FLOAT:
        stats = session.stats()
        row |= {
            "resident_bytes": stats.resident_bytes,
            "bits_per_weight": stats.bits_per_weight,
            "read_bytes": stats.streamed_bytes,
        }
    row["energy_j"] = _energy_j(session, task.single)
    return {**row, "accuracy": task.accuracy(session)}


def _energy_j(session: Any, feed: Feed) -> float | None:
    """Of a run, beyond what the idle board draws; None without a power meter."""
    with Meter() as meter:
        if meter.measure_idle() is None:
            return None
        runs = 0
        with meter.window("runs"):
            end_s = time.monotonic() + _METERED_S
            while time.monotonic() < end_s:
                session.run(None, feed)
                runs += 1
    energy = meter.windows[0].energy_per_run(runs)
    return None if energy is None else energy.energy_j


def measure_switches(task: Task, low: str, high: str) -> list[dict[str, Any]]:
    """Down from level `high` to `low` and up again: a row for each way.

    `switch_ms` is what the call and the first run after it take longer than a run at that level.
    """
    rows = []
    with Session(task.bank, level=high, threads=task.threads) as session:
        _median_run_s(session, task.single)
        for way, level in (("down", low), ("up", high)):
            read_bytes = session.stats().streamed_bytes
            before_bytes = session.stats().resident_bytes
            started_s = time.perf_counter()
            session.set_level(int(level))
            set_s = time.perf_counter() - started_s
            session.run(None, task.single)
            both_s = time.perf_counter() - started_s
            stats = session.stats()
            run_s = _median_run_s(session, task.single)
            rows.append(
                {
                    "way": way,
                    "levels": f"{high}:{low}",
                    "set_ms": set_s * 1e3,
                    "switch_ms": (both_s - run_s) * 1e3,
                    "read_bytes": stats.streamed_bytes - read_bytes,
                    "resident_change_bytes": stats.resident_bytes - before_bytes,
                }
            )
    return rows


def measure_trace(task: Task, shares: Sequence[float] = TRACE) -> Iterator[dict[str, Any]]:
    """The scripted trace: after each change of the budget a row, with the planner's own levels.

    `peak_bytes` is the peak's growth since before the session, what judging it took left out.
    """
    bank = Bank.open(task.bank)
    highest = max(bank.levels)
    whole_bytes = bank.weight_bytes(highest)
    forget_peak()
    before_bytes = rss_bytes()
    peak_bytes = 0
    with Session(task.bank, level="auto", threads=task.threads) as session:
        replanner = session.internals.replanner
        smallest_bytes = replanner.smallest_limit()
        for step, share in enumerate(shares, start=1):
            limit_bytes = max(smallest_bytes, int(share * whole_bytes))
            read_bytes = session.stats().streamed_bytes
            started_s = time.perf_counter()
            envelope = Envelope(limit_bytes, highest, task.threads, ("the script",))
            replanner.set_envelope(envelope, "budget", f"{share:.0%} of the weights")
            session.run(None, task.single)
            both_s = time.perf_counter() - started_s
            switched_bytes = session.stats().streamed_bytes - read_bytes
            run_s = _median_run_s(session, task.single)
            stats = session.stats()
            peak_bytes = max(peak_bytes, peak_rss_bytes() - before_bytes)
            steady_bytes = stats.streamed_bytes - read_bytes - switched_bytes
            yield {
                "step": step,
                "budget_share": share,
                "budget_bytes": limit_bytes,
                "bits_per_weight": stats.bits_per_weight,
                "resident_bytes": stats.resident_bytes,
                "peak_bytes": peak_bytes,
                "switch_ms": (both_s - run_s) * 1e3,
                "switch_read_bytes": switched_bytes,
                "read_bytes_per_run": steady_bytes / _WARM_RUNS,
                "latency_ms": run_s * 1e3,
                "accuracy": task.accuracy(session),
            }
            forget_peak()


def trace_rows(task: Task) -> list[dict[str, Any]]:
    """All rows of `measure_trace`, to be called in a process of its own."""
    return list(measure_trace(task))


def _median_run_s(session: Session, feed: Feed) -> float:
    times_s = []
    for _ in range(_WARM_RUNS):
        started_s = time.perf_counter()
        session.run(None, feed)
        times_s.append(time.perf_counter() - started_s)
    return statistics.median(times_s)
