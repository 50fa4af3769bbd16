"""The session: opens a bank, runs it, and changes its precision while it runs.

bank on disk ── Bank.open ──► manifest, chunk tables, graph
                                 │                  │
                              Store (libbapq)    open_graph (ONNX Runtime + our operators)
                                 │                  │
run():  ticket = store.begin_run() ──► graph.run(feed + ticket) ──► store.end_run(ticket)
set_level():  store.publish(levels)          runs that began before keep their plan
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from .bank.layout import Level
from .bank.reader import Bank
from .engine.graph import RUN_INPUT, open_graph
from .engine.native import Store, kernels_name
from .errors import (
    BudgetTooSmallError,
    ExecutionError,
    RequestError,
    RunInputError,
    SessionClosedError,
    UnknownLevelError,
)
from .telemetry import Event, SessionStats, peak_rss_bytes, rss_bytes, trim_heap
from .units import format_size, parse_size

if TYPE_CHECKING:
    import onnxruntime

__all__ = ["Session"]


class Session:
    """A model in a bank, ready to run; the shape of `onnxruntime.InferenceSession`.

    Safe to use from several threads: runs go on side by side, and each sees one plan from its first
    operator to its last, whatever is switched meanwhile.
    """

    def __init__(
        self,
        bank: str | os.PathLike[str],
        *,
        memory_budget: int | str | None = None,
        level: Level | str = "auto",
        threads: int | None = None,
        on_switch: Callable[[Event], None] | None = None,
    ) -> None:
        """Open the bank and read the weights of the chosen level.

        Args:
            bank: the bank's directory.
            memory_budget: most bytes of weights in memory, as a number or such as "64MiB";
                None is no limit.
            level: 32, 8, 4, 2 or 1 for all chunks, or "auto": the highest that the bank holds and
                the budget allows.
            threads: threads that one operator runs on; None is one per core this process may use.
            on_switch: called with every Event of kind "switch", on the thread that switched.

        Raises:
            BankError, UnknownLevelError, BudgetTooSmallError, StorageError, PlatformError.
        """
        self._opened_s = time.monotonic()
        self._rss_before_bytes = rss_bytes()
        self.on_switch = on_switch
        self._threads = len(os.sched_getaffinity(0)) if threads is None else threads
        if self._threads < 1:
            raise RequestError(f"threads is {threads}, the least is 1")
        self._bank = Bank.open(bank)
        self._budget_bytes = None if memory_budget is None else parse_size(memory_budget)
        self._level = self._choose_level(level)

        self._lock = threading.Lock()
        self._switching = threading.Lock()  # one switch at a time; runs never wait for it
        self._plans: list[Level] = []  # plan number n is the n-th published
        self._idle = threading.Condition(self._lock)
        self._closed = False
        self._running = 0
        self._runs = 0
        self._bits_sum = 0.0
        self._last_bits = 0.0
        self._events: list[Event] = []
        self._executor: ThreadPoolExecutor | None = None

        self._store = Store(self._bank, self._threads)
        try:
            self._publish(self._level)
            self._graph: onnxruntime.InferenceSession = open_graph(
                self._bank.graph_bytes(), self._threads
            )
        except BaseException:
            self._store.close()
            raise
        self._inputs = [value for value in self._graph.get_inputs() if value.name != RUN_INPUT]
        self._record("open", None, f"kernels {kernels_name()}, {self._threads} threads")

    # ---- running ----

    def run(
        self,
        output_names: Sequence[str] | None,
        input_feed: Mapping[str, Any],
        run_options: Any = None,
    ) -> list[Any]:
        """Run the model; arguments and result as in `onnxruntime.InferenceSession.run`.

        Raises RunInputError for a feed that does not fit, ExecutionError when the graph fails,
        BankIntegrityError or StorageError when the weights cannot be read.
        """
        self._check_feed(input_feed)
        with self._lock:
            self._check_open()
            self._running += 1
        try:
            return self._run_once(output_names, input_feed, run_options)
        finally:
            with self._lock:
                self._running -= 1
                self._idle.notify_all()

    def run_async(
        self, output_names: Sequence[str] | None, input_feed: Mapping[str, Any]
    ) -> Future[list[Any]]:
        """Run the model on a thread of the session's own; the future gives what `run` would."""
        with self._lock:
            self._check_open()
            if self._executor is None:
                self._executor = ThreadPoolExecutor(1, thread_name_prefix="bapq-run")
            return self._executor.submit(self.run, output_names, dict(input_feed))

    def _run_once(
        self, output_names: Sequence[str] | None, feed: Mapping[str, Any], run_options: Any
    ) -> list[Any]:
        ticket, plan_number = self._store.begin_run()
        failure: Exception | None = None
        outputs: list[Any] = []
        try:
            run_feed = {**feed, RUN_INPUT: np.array(ticket, dtype=np.int64)}
            outputs = self._graph.run(output_names, run_feed, run_options)
        except Exception as error:  # ONNX Runtime raises classes of its own, without a common base
            failure = error
        finally:
            self._store.end_run(ticket)  # an operator of ours that failed raises here, by name
        if failure is not None:
            reason = str(failure).splitlines()[0]
            kind = RunInputError if _is_input_error(failure) else ExecutionError
            raise kind(f"{self._bank.path}: ONNX Runtime: {reason}") from failure
        with self._lock:
            self._runs += 1
            self._last_bits = float(self._plans[plan_number - 1])
            self._bits_sum += self._last_bits
        return outputs

    def _check_feed(self, feed: Mapping[str, Any]) -> None:
        wanted = [value.name for value in self._inputs]
        if set(feed) != set(wanted):
            raise RunInputError(f"the feed has {sorted(feed)}, the model needs {sorted(wanted)}")

    # ---- precision ----

    def set_level(self, level: Level) -> None:
        """Run at this level from the next run on; runs in flight finish on the level they began.

        Going down frees memory and reads nothing; going up reads only the missing planes. Raises
        UnknownLevelError or BudgetTooSmallError and then changes nothing.
        """
        chosen = self._choose_level(level)
        with self._switching:
            self._check_open()
            previous = self._level
            if chosen == previous:
                return
            self._publish(chosen)
            event = self._record("switch", previous, "set_level")
        if self.on_switch is not None:
            self.on_switch(event)

    def _choose_level(self, level: Level | str) -> Level:
        held = self._bank.levels
        budget = self._budget_bytes
        fitting = [x for x in held if budget is None or self._bank.weight_bytes(x) <= budget]
        smallest = min(held, key=self._bank.weight_bytes)
        if not fitting:
            raise BudgetTooSmallError(
                f"memory_budget is {format_size(budget or 0)}, the smallest that works is "
                f"{self._bank.weight_bytes(smallest)} bytes (level {smallest})"
            )
        if level == "auto":
            return fitting[0]
        for candidate in held:
            if level == candidate or level == str(candidate):
                if candidate in fitting:
                    return candidate
                raise BudgetTooSmallError(
                    f"memory_budget is {format_size(budget or 0)}, level {candidate} needs "
                    f"{self._bank.weight_bytes(candidate)} bytes; the highest that fits is "
                    f"level {fitting[0]}"
                )
        raise UnknownLevelError(
            f"level {level!r} is not in the bank, which holds {', '.join(map(str, held))}"
        )

    def _publish(self, level: Level) -> None:
        chunk_count = sum(layer.chunk_count for layer in self._bank.manifest.layers)
        self._plans.append(level)  # before a run can begin on it
        try:
            self._store.publish([level] * chunk_count)
        except BaseException:
            self._plans.pop()
            raise
        self._level = level

    # ---- what the session tells ----

    def get_inputs(self) -> list[Any]:
        """The model's inputs, as `onnxruntime.NodeArg` (name, shape, type)."""
        return list(self._inputs)

    def get_outputs(self) -> list[Any]:
        """The model's outputs, as `onnxruntime.NodeArg` (name, shape, type)."""
        with self._lock:
            self._check_open()
        return list(self._graph.get_outputs())

    def stats(self) -> SessionStats:
        """Memory, precision and counts at this moment."""
        with self._switching, self._lock:
            self._check_open()
            store = self._store.stats()
            return SessionStats(
                level=self._level,
                resident_bytes=store.resident_bytes,
                peak_bytes=max(0, peak_rss_bytes() - self._rss_before_bytes),
                streamed_bytes=store.read_bytes,
                bits_per_weight=self._last_bits,
                mean_bits_per_weight=self._bits_sum / self._runs if self._runs else 0.0,
                runs=self._runs,
                switches=sum(event.kind == "switch" for event in self._events),
                escalated=0,
                region=None,
            )

    def events(self) -> list[Event]:
        """Everything that changed how the session answers, oldest first."""
        return list(self._events)

    def _record(self, kind: str, previous: int | None, reason: str) -> Event:
        event = Event(time.monotonic() - self._opened_s, kind, self._level, previous, reason)
        self._events.append(event)
        return event

    # ---- closing ----

    def close(self) -> None:
        """Wait for the runs in flight, then give all memory back. Closing twice is fine."""
        with self._switching, self._lock:
            if self._closed:
                return
            self._closed = True
            while self._running:
                self._idle.wait()
        if self._executor is not None:
            self._executor.shutdown(cancel_futures=True)
        del self._graph
        self._store.close()
        trim_heap()
        self._record("close", None, "closed")

    def _check_open(self) -> None:
        if self._closed:
            raise SessionClosedError(f"the session of {self._bank.path} is closed: open a new one")

    def __enter__(self) -> Session:
        """The session itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close."""
        self.close()

    def __repr__(self) -> str:
        """Bank, level and whether it is open."""
        state = "closed" if self._closed else f"level {self._level}"
        return f"<bapq_edge.Session {Path(self._bank.path).name}: {state}>"


def _is_input_error(error: Exception) -> bool:
    return type(error).__name__ == "InvalidArgument" or isinstance(error, ValueError | RuntimeError)
