"""The session: opens a bank, runs it under a memory budget, and closes it.

bank on disk ── Bank.open ──► manifest, tables, graph
                                 │                │
                              Store (libbapq)   Graphs (ONNX Runtime + our operators)
                                 │                │
run():             Passes: begin run ─► ticket ─► graph ─► end run ─► report
                   with a policy, the runner makes one or more of them, each at its own plan

budget, level, bits, policy, sensors ──► replanner ──► plans ──► publisher ──► Store
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .bank.layout import Level
from .bank.reader import Bank
from .control.device_profile import find_profile, load_profile
from .engine.feeds import check_feed, checked_names
from .engine.graph import Graphs, check_run_options
from .engine.library import kernels_name
from .engine.store import Store
from .errors import RequestError
from .options import (
    PolicyName,
    SessionOptions,
    checked_bits,
    checked_budget,
    checked_level,
    checked_listener,
)
from .planning.ledger import MemoryLedger
from .planning.passes import Passes
from .planning.publisher import Publisher
from .planning.replanner import Replanner
from .policy import Policy
from .runs_in_flight import RunQueue, RunsInFlight
from .telemetry import Event, EventLog, RunTotals, SessionStats, trim_heap
from .units import counted, format_size

if TYPE_CHECKING:  # loaded by sessions that need them
    from .adaptive.policy_runner import PolicyRunner
    from .control.monitor import Monitor
    from .internals import Internals

__all__ = ["Session"]


class Session:
    """A model in a bank, ready to run; the shape of `onnxruntime.InferenceSession`.

    Safe to use from several threads: runs go on side by side, and each sees one plan from its first
    operator to its last, whatever is switched meanwhile. Once closed, a session tells its `events`
    and may be closed again; all else raises SessionClosedError.
    """

    # ---- opening ----

    def __init__(
        self,
        bank: str | os.PathLike[str],
        *,
        memory_budget: int | str | None = None,
        level: Level | str = "auto",
        bits: float | None = None,
        policy: Policy | PolicyName | None = None,
        target_agreement: float | None = None,
        latency_ms: float | None = None,
        weight_budget: int | str | None = None,
        threads: int | None = None,
        controller: Literal["auto"] | None = None,
        profile: str | os.PathLike[str] | None = None,
        direct_io: bool = False,
        on_switch: Callable[[Event], None] | None = None,
    ) -> None:
        """Open the bank; its weights are read as runs need them.

        Args:
            bank: the bank's directory.
            memory_budget: bytes that the process's resident memory may grow by for this model, as
                a number or such as "64MiB"; "auto" takes a share of what the device has free now;
                None is no limit.
            level: 32, 8, 4, 2 or 1 for all chunks, or "auto": the planner's choice.
            bits: bits per weight on average over all weights, 1 to 32; the planner's best plan of
                so many.
            policy: who chooses the precision of every run: "gate" or "escalate", by the bank's
                boundary models; an object with a method `choose` (see bapq_edge.policy); "static"
                or None: nobody, unless `target_agreement` is given.
            target_agreement: share of inputs, 0 to 1, that are to be answered as the float model
                does; the boundary model that keeps it with the fewest bits is chosen. With a policy
                by name `bits` may be given instead, not as well: the best agreement at so many bits
                on average.
            latency_ms: time that a run may take for reading: with level "auto" the planner then
                streams what can be read in it, if that makes the answer better. Escalating: an
                answer that would come later is not asked for.
            weight_budget: most bytes of weights in memory, whatever `memory_budget` leaves.
            threads: threads that one operator runs on, 1 to 1024; None is one per core that this
                process may use.
            controller: "auto" watches memory, power and temperature on a thread and replans; None
                leaves all switching to the caller, and the session is deterministic.
            profile: a device profile's name or file; None is the board's own, if there is one.
            direct_io: read around the page cache, which then stays for other programs.
            on_switch: called with every Event of kind "switch", on the thread that switched.

        Raises:
            RequestError and its kinds: a setting that cannot be had.
            BankError and its kinds, StorageError: the bank cannot be used.
            PlatformError: this machine cannot run it.
        """
        self._ledger = MemoryLedger()  # what comes from here on counts
        options = SessionOptions(
            bank,
            memory_budget=memory_budget,  # type: ignore[arg-type]
            level=level,  # type: ignore[arg-type]
            bits=bits,
            policy=policy,
            target_agreement=target_agreement,
            latency_ms=latency_ms,
            weight_budget=weight_budget,  # type: ignore[arg-type]
            threads=threads,
            controller=controller,
            profile=profile,
            direct_io=direct_io,
            on_switch=on_switch,
        )
        self._threads = int(options.threads or len(os.sched_getaffinity(0)))
        self._bank = Bank.open(bank)
        self._log = EventLog(Path(self._bank.path).name)
        self._profile = find_profile() if profile is None else load_profile(profile)
        self._request = options.request(
            self._profile.storage_read_mb_s * 1e6 if self._profile else None
        )
        self._runner = self._open_runner(options)

        self._runs = RunsInFlight(str(self._bank.path))
        self._lock = threading.Lock()  # short: totals and the queue
        self._giving_back = threading.RLock()  # who closes waits for another who does
        self._totals = RunTotals()
        self._queue = RunQueue()
        self._monitor: Monitor | None = None

        with contextlib.ExitStack() as undo:
            undo.callback(trim_heap)
            self._store = Store(self._bank, direct=options.direct_io)
            undo.callback(self._store.close)
            splits = self._runner is not None and self._runner.splits
            self._graphs = Graphs(self._bank, self._store, self._threads, split=splits)
            undo.callback(self._graphs.close)
            self._publisher = Publisher(self._store)
            self._replanner = Replanner(
                self._bank,
                self._store,
                self._publisher,
                self._ledger,
                self._log,
                request=self._request,
                shares=None if self._runner is None else self._runner.shares,
                threads=self._threads,
                weight_budget_bytes=options.weight_budget,
                on_switch=options.on_switch,
            )
            undo.callback(self._replanner.close)
            self._passes = Passes(
                self._store, self._graphs, self._publisher, self._replanner, self._ledger
            )
            budget_bytes, reason = self._budget_of(options.memory_budget)
            if reason is not None:
                self._replanner.record("budget", reason)
            if options.controller is not None:
                self._monitor = self._make_monitor(budget_bytes)
                undo.callback(self._monitor.stop)
            envelope = None if self._monitor is None else self._monitor.envelope
            self._replanner.open(budget_bytes, envelope, self._passes.warm_up)
            self._replanner.record(
                "open", f"kernels {kernels_name()}, {counted(self._threads, 'thread')}"
            )
            undo.callback(self._replanner.record, "close", "closed")
            self._parts = undo.pop_all()  # which `close` closes
        if self._monitor is not None:
            self._monitor.start()

    def _open_runner(self, options: SessionOptions) -> PolicyRunner | None:
        if not options.steered:
            return None
        from .adaptive.policies import open_policy  # only such a session pays for them
        from .adaptive.policy_runner import PolicyRunner

        policy = open_policy(
            self._bank,
            options.policy,
            target_agreement=options.target_agreement,
            bits=options.bits,
            latency_s=options.latency_s,
        )
        default = options.default_precision(self._bank.levels)
        return PolicyRunner(policy, default, lambda *event: self._replanner.record(*event))

    def _budget_of(self, budget: int | Literal["auto"] | None) -> tuple[int | None, str | None]:
        """The budget in bytes; for "auto" a share of what is free, and how it was found."""
        if budget != "auto":
            return budget, None
        from .control.controller import automatic_budget_bytes  # only such a session pays for them
        from .sensors import open_sensors

        with contextlib.closing(open_sensors()) as sensors:
            held_bytes = self._ledger.held_bytes() if self._replanner.is_open else 0
            size_bytes, reason = automatic_budget_bytes(sensors.read(), held_bytes=held_bytes)
        return size_bytes, f"{format_size(size_bytes)}: {reason}"

    def _make_monitor(self, budget_bytes: int | None) -> Monitor:
        from .control.monitor import Monitor  # only such a session pays for them
        from .sensors import open_sensors

        return Monitor(
            open_sensors(),
            self._profile,
            levels=self._bank.levels,
            threads=self._threads,
            budget_bytes=budget_bytes,
            minimum_bytes=self._replanner.smallest_limit(),
            follow=self._replanner.follow,
        )

    # ---- running ----

    def run(
        self,
        output_names: Sequence[str] | None,
        input_feed: Mapping[str, Any],
        run_options: Any = None,
    ) -> list[Any]:
        """Run the model; arguments and result as in `onnxruntime.InferenceSession.run`.

        Args:
            output_names: the outputs to return, in this order; one that is named again is returned
                again. None or an empty list: all of them.
            input_feed: an array for every input, by name, in the shapes and types of `get_inputs`,
                of either byte order.
            run_options: an `onnxruntime.RunOptions`, or None.

        Returns:
            One array per output, in the shapes and types of `get_outputs`.

        Raises:
            RunInputError: the feed or the output names do not fit the model.
            RequestError: the run options are none, or the policy asks for what cannot be had.
            ExecutionError: the graph fails.
            BankIntegrityError, BankTruncatedError, StorageError: weights cannot be read. A level
                below that is in memory stands in, with a DegradedWarning and an event.
            SessionClosedError: the session was closed.
        """
        with self._runs as in_flight:
            check_feed(self._graphs.input_names, input_feed)
            names = checked_names(self._graphs.output_names, output_names)
            check_run_options(run_options)
            self._replanner.make_room(input_feed, in_flight)
            outputs = self._answer(input_feed, list(dict.fromkeys(names)), run_options)
        return [outputs[name] for name in names]

    def run_async(
        self, output_names: Sequence[str] | None, input_feed: Mapping[str, Any]
    ) -> Future[list[Any]]:
        """Run the model on a thread of the session's own; the future gives what `run` would.

        Such runs are made one after the other. Closing cancels those that have not begun. Raises
        RunInputError where the feed or the output names do not fit the model.
        """
        with self._lock:
            self._runs.check_open()
            check_feed(self._graphs.input_names, input_feed)
            names = checked_names(self._graphs.output_names, output_names)
            return self._queue.submit(self.run, list(names), dict(input_feed))

    def _answer(
        self, feed: Mapping[str, Any], names: Sequence[str], run_options: Any
    ) -> dict[str, Any]:
        """Outputs by name: of one pass, or of those that the policy asks for."""
        if self._runner is None:
            outputs, bits, degraded = self._passes.run("whole", None, feed, names, run_options)
            with self._lock:
                self._totals.count(bits, degraded)
            return outputs
        run_part = partial(self._passes.run, run_options=run_options)
        answer = self._runner.answer(run_part, feed, names)
        with self._lock:
            self._totals.count(answer.bits, answer.degraded)
            self._totals.count_answer(answer.region, answer.escalated, answer.late)
        self._publisher.publish_main()
        return answer.outputs

    # ---- changing what runs are made at ----

    def set_memory_budget(self, budget: int | str | None) -> None:
        """Take another budget, live: bytes, a size such as "64MiB", "auto", or None for no limit.

        Raises SizeError, BudgetTooSmallError, or for "auto" SensorError, and then changes nothing.
        """
        with self._replanner.changing():
            self._runs.check_open()
            wanted = checked_budget(budget)
            budget_bytes, found = self._budget_of(wanted)
            reason = f"set_memory_budget({budget!r})" + (f": {found}" if found else "")
            self._replanner.set_budget(budget_bytes, reason)
            if self._monitor is not None:
                least_bytes = self._replanner.smallest_limit()
                envelope = self._monitor.set_budget(budget_bytes, least_bytes)
                self._replanner.set_envelope(envelope, "budget", reason)

    def set_level(self, level: Level | str) -> None:
        """Run at this level, or at "auto", from the next run on; runs in flight keep theirs.

        Where runs need more than the budget already, a level that needs no more weights in memory
        than now is taken with a BudgetExceededWarning. Raises UnknownLevelError,
        BudgetTooSmallError, or with a policy RequestError, and then changes nothing.
        """
        with self._replanner.changing():
            self._runs.check_open()
            self._set_request(f"set_level({level!r})", checked_level(level), None)

    def set_bits(self, bits: float) -> None:
        """Run at so many bits per weight on average, 1 to 32, as the planner spreads them best.

        Over the budget it does as `set_level`. Raises RequestError or BudgetTooSmallError and then
        changes nothing.
        """
        with self._replanner.changing():
            self._runs.check_open()
            self._set_request(f"set_bits({bits})", "auto", checked_bits(bits))

    @property
    def on_switch(self) -> Callable[[Event], None] | None:
        """Called with every Event of kind "switch", on the thread that switched; assignable."""
        self._runs.check_open()
        return self._replanner.on_switch

    @on_switch.setter
    def on_switch(self, listener: Callable[[Event], None] | None) -> None:
        with self._replanner.lock:
            self._runs.check_open()
            self._replanner.on_switch = checked_listener(listener)

    def _set_request(self, reason: str, level: Level | Literal["auto"], bits: float | None) -> None:
        if self._runner is not None:
            raise RequestError(
                "a policy decides about precision here: open a session without one, or write one"
            )
        self._replanner.set_request(replace(self._request, level=level, bits=bits), reason)

    # ---- what the session tells ----

    def get_inputs(self) -> list[Any]:
        """The model's inputs, as `onnxruntime.NodeArg` (name, shape, type)."""
        self._runs.check_open()
        return list(self._graphs.inputs)

    def get_outputs(self) -> list[Any]:
        """The model's outputs, as `onnxruntime.NodeArg` (name, shape, type)."""
        self._runs.check_open()
        return list(self._graphs.outputs)

    def stats(self) -> SessionStats:
        """Memory, precision and counts of this moment."""
        with self._replanner.lock, self._lock:
            self._runs.check_open()
            store, plan, totals = self._store.stats(), self._replanner.plans.main_plan, self._totals
            return SessionStats(
                level=plan.uniform_level,
                planned_bits_per_weight=plan.bits_per_weight,
                resident_bytes=store.home_bytes + store.ring_bytes + store.row_cache_bytes,
                peak_bytes=self._ledger.growth_bytes(),
                streamed_bytes=store.read_bytes,
                read_wait_s=store.wait_ns / 1e9,
                bits_per_weight=totals.last_bits,
                mean_bits_per_weight=totals.bits / totals.runs if totals.runs else 0.0,
                runs=totals.runs,
                degraded=totals.degraded,
                switches=self._log.count("switch"),
                escalated=totals.escalated,
                late=totals.late,
                region=totals.region,
            )

    def events(self) -> list[Event]:
        """What changed how the session answers, oldest first; of a closed one, too.

        These are the last 10,000 events.
        """
        return self._log.events()

    @property
    def internals(self) -> Internals:
        """The parts inside, for the profiler, tests and benchmarks; see `bapq_edge.internals`."""
        from .internals import Internals

        self._runs.check_open()
        return Internals(
            self._bank,
            self._store,
            self._graphs,
            self._replanner,
            self._passes,
            self._log,
            self._monitor,
        )

    # ---- closing ----

    def close(self) -> None:
        """Wait for the runs in flight, then give all memory back. Closing twice is fine.

        Runs of `run_async` that have not begun are cancelled. Whoever closes, on any thread, finds
        the session closed afterwards. Raises RequestError on a thread that is in a run, such as in
        a policy or in a listener that the run calls: it would wait for itself.
        """
        self._runs.check_may_close()
        if self._monitor is not None:
            self._monitor.stop()
        with self._replanner.lock, self._lock:
            self._runs.close()
        self._queue.close()
        self._runs.wait()
        with self._giving_back:
            self._parts.close()  # each part once, whoever comes first

    def __enter__(self) -> Session:
        """Give the session itself."""
        self._runs.check_open()
        return self

    def __exit__(self, *raised: object) -> None:
        """Close the session."""
        self.close()

    def __repr__(self) -> str:
        """Tell the bank, and the plan or that it is closed."""
        state = "closed" if self._runs.is_closed else self._replanner.plans.main_plan.reason
        return f"<bapq_edge.Session {Path(self._bank.path).name}: {state}>"
