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
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from .bank.layout import Level
from .engine.feeds import check_feed, check_shapes, checked_names
from .engine.graph import Graphs, check_run_options
from .errors import RequestError, SessionClosedError
from .internals import Internals
from .options import (
    PolicyName,
    SessionOptions,
    checked_bits,
    checked_budget,
    checked_deadline,
    checked_level,
    checked_listener,
)
from .ort_api.arguments import checked_ort_arguments
from .ort_api.methods import InferenceSessionMethods
from .planning.ledger import MemoryLedger
from .policy import Policy
from .runs_in_flight import RunQueue, RunsInFlight
from .telemetry import Event, RunTotals, SessionStats

__all__ = ["Session"]


class Session(InferenceSessionMethods):
    """A model in a bank, ready to run; a drop-in for `onnxruntime.InferenceSession`.

    Safe to use from several threads: runs go on side by side, and each sees one plan from its first
    operator to its last, whatever is switched meanwhile. Once closed, a session tells its `events`
    and may be closed again; all else raises SessionClosedError.
    """

    # ---- opening ----

    def __init__(
        self,
        bank: str | os.PathLike[str],
        sess_options: Any = None,
        providers: Sequence[Any] | None = None,
        provider_options: Sequence[Mapping[Any, Any]] | None = None,
        *,
        memory_budget: int | str | None = None,
        level: Level | str = "auto",
        bits: float | None = None,
        policy: Policy | PolicyName | None = None,
        target_agreement: float | None = None,
        latency_ms: float | None = None,
        max_slowdown: float | None = None,
        weight_budget: int | str | None = None,
        threads: int | None = None,
        controller: Literal["auto"] | None = None,
        profile: str | os.PathLike[str] | None = None,
        direct_io: bool = False,
        max_shapes: Mapping[str, Sequence[int]] | None = None,
        allow_overrun: bool = False,
        trusted_key: str | os.PathLike[str] | None = None,
        monitor: bool | None = None,
        on_switch: Callable[[Event], None] | None = None,
    ) -> None:
        """Open the bank; its weights are read as runs need them.

        Args:
            bank: the bank's directory.
            sess_options: as in ONNX Runtime. What a bank cannot honour of it, and of the next two,
                is an IgnoredSettingWarning, once by name.
            providers: as in ONNX Runtime; a bank runs on the CPU.
            provider_options: as in ONNX Runtime.
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
            latency_ms: time that a run may take: level "auto" streams what makes the answer better
                and can be read in it. Escalating: a later answer is not asked for.
            max_slowdown: most time of such a run, in times of one from memory; None is 1.1.
            weight_budget: most bytes of weights in memory, whatever `memory_budget` leaves.
            threads: threads that one operator runs on, 1 to 1024; None is one per core that this
                process may use.
            controller: "auto" watches memory, power and temperature on a thread and replans; None
                leaves all switching to the caller, and the session is deterministic.
            profile: a device profile's name or file; None is the board's own, if there is one.
            direct_io: read around the page cache, which then stays for other programs.
            max_shapes: the largest shape of inputs by name, such as {"image": (32, 3, 224, 224)}:
                the memory budget holds for runs up to it, one at a time, and a larger input is
                refused before anything is allocated for it.
            allow_overrun: run larger inputs than `max_shapes` all the same.
            trusted_key: a public key of minisign, its file or its line: the bank must be signed
                with it, and all of its bytes are read and checked when it is opened. Needs the
                extra [sign].
            monitor: tell `bapq monitor` the status, over a socket for this user only; None does so
                where the environment has BAPQ_MONITOR=1.
            on_switch: called with every Event of kind "switch", on the thread that switched; what
                it raises is logged. It may call any method.

        Raises:
            RequestError and its kinds: a setting that cannot be had.
            BankError and its kinds, StorageError: the bank cannot be used.
            ResourceError and its kinds: the system has no memory, or no file handles, for it.
            PlatformError: this machine cannot run it; MissingExtraError: [sign] is not installed.
        """
        ledger = MemoryLedger()  # what comes from here on counts
        options = SessionOptions(
            bank,
            memory_budget=memory_budget,  # type: ignore[arg-type]
            level=level,  # type: ignore[arg-type]
            bits=bits,
            policy=policy,
            target_agreement=target_agreement,
            latency_ms=latency_ms,
            max_slowdown=max_slowdown,
            weight_budget=weight_budget,  # type: ignore[arg-type]
            threads=threads,
            controller=controller,
            profile=profile,
            direct_io=direct_io,
            max_shapes=max_shapes,  # type: ignore[arg-type]
            allow_overrun=allow_overrun,
            trusted_key=trusted_key,
            monitor=monitor,
            on_switch=on_switch,
        )
        ort_threads, settings = checked_ort_arguments(sess_options, providers, provider_options)
        self._listener = options.on_switch
        self._most_shapes = None if options.allow_overrun else options.max_shapes
        self._lock = threading.Lock()  # short: totals and the queue
        self._giving_back = threading.RLock()  # who closes waits for another who does
        self._totals = RunTotals()
        self._queue = RunQueue()
        self._runs = RunsInFlight(os.fspath(bank))
        self._parts = Internals(
            options,
            ledger,
            _weak_listener(self),
            _weak_status(self),
            ort_threads=ort_threads,
            settings=settings,
        )
        self._dropped = weakref.finalize(self, self._parts.give_back_later())
        self._dropped.atexit = False  # the system takes it all back
        self._parts.start()

    # ---- running ----

    def run(
        self,
        output_names: Sequence[str] | None,
        input_feed: Mapping[str, Any],
        run_options: Any = None,
        *,
        deadline_ms: float | None = None,
    ) -> list[Any]:
        """Run the model; arguments and result as in `onnxruntime.InferenceSession.run`.

        Args:
            output_names: the outputs to return, in this order; one that is named again is returned
                again. None or an empty list: all of them.
            input_feed: an array for every input, by name, in the shapes and types of `get_inputs`,
                of either byte order.
            run_options: an `onnxruntime.RunOptions`, or None.
            deadline_ms: time after which an answer that a policy has made again is given up: the
                one before stands, with a LateAnswerWarning.

        Returns:
            One array per output, in the shapes and types of `get_outputs`.

        Raises:
            RunInputError: the feed or the output names do not fit the model, or an input is larger
                than `max_shapes`.
            RequestError: the run options or the deadline are none, or there is no policy that
                answers again; or the policy asks for what cannot be had.
            ExecutionError: the graph fails.
            BankIntegrityError, BankTruncatedError, StorageError: weights cannot be read. A level
                below that is in memory stands in, with a DegradedWarning and an event.
            OutOfMemoryError: the system refused memory for weights; the next run tries again.
            SessionClosedError: the session was closed.
            ForkedSessionError: this process was forked after the session was opened.
        """
        with self._runs as in_flight:
            check_feed(self._graphs.input_names, input_feed)
            names = checked_names(self._graphs.output_names, output_names)
            check_run_options(run_options)
            deadline_s = checked_deadline(deadline_ms, steered=self._parts.runner is not None)
            check_shapes(self._most_shapes, input_feed)
            self._parts.replanner.make_room(input_feed, in_flight)
            outputs = self._answer(input_feed, list(dict.fromkeys(names)), run_options, deadline_s)
        return [outputs[name] for name in names]

    def submit(
        self,
        output_names: Sequence[str] | None,
        input_feed: Mapping[str, Any],
        run_options: Any = None,
    ) -> Future[list[Any]]:
        """Run the model on a thread of the session's own; the future gives what `run` would.

        Such runs are made one after the other. Closing cancels those that have not begun. Raises
        RunInputError where the feed or the output names do not fit the model.
        """
        self._runs.check_open()
        with self._lock:
            self._runs.check_open()
            check_feed(self._graphs.input_names, input_feed)
            names = checked_names(self._graphs.output_names, output_names)
            return self._queue.submit(self.run, list(names), dict(input_feed), run_options)

    def _answer(
        self,
        feed: Mapping[str, Any],
        names: Sequence[str],
        run_options: Any,
        deadline_s: float | None,
    ) -> dict[str, Any]:
        """Outputs by name: of one pass, or of those that the policy asks for."""
        if self._parts.runner is None:
            outputs, bits, degraded = self._parts.passes.run(
                "whole", None, feed, names, run_options
            )
            with self._lock:
                self._totals.count(bits, degraded)
            return outputs
        run_part = partial(self._parts.passes.run, run_options=run_options)
        answer = self._parts.runner.answer(run_part, feed, names, deadline_s)
        with self._lock:
            self._totals.count(answer.bits, answer.degraded)
            self._totals.count_answer(answer.counts)
        self._parts.publisher.publish_main()
        return answer.outputs

    # ---- changing what runs are made at ----

    def set_memory_budget(self, budget: int | str | None) -> None:
        """Take another budget, live: bytes, a size such as "64MiB", "auto", or None for no limit.

        Raises SizeError, BudgetTooSmallError, or for "auto" SensorError, and then changes nothing.
        """
        with self._changing():
            wanted = checked_budget(budget)
            budget_bytes, found = self._parts.budget_of(wanted)
            reason = f"set_memory_budget({budget!r})" + (f": {found}" if found else "")
            self._parts.replanner.set_budget(budget_bytes, reason)
            if self._parts.monitor is not None:
                least_bytes = self._parts.replanner.smallest_limit()
                envelope = self._parts.monitor.set_budget(budget_bytes, least_bytes)
                self._parts.replanner.set_envelope(envelope, "budget", reason)

    def set_level(self, level: Level | str) -> None:
        """Run at this level, or at "auto", from the next run on; runs in flight keep theirs.

        Where runs need more than the budget already, a level that needs no more weights in memory
        than now is taken with a BudgetExceededWarning. Raises UnknownLevelError,
        BudgetTooSmallError, or with a policy RequestError, and then changes nothing.
        """
        with self._changing():
            self._set_request(f"set_level({level!r})", checked_level(level), None)

    def set_bits(self, bits: float) -> None:
        """Run at so many bits per weight on average, 1 to 32, as the planner spreads them best.

        Over the budget it does as `set_level`. Raises RequestError or BudgetTooSmallError and then
        changes nothing.
        """
        with self._changing():
            self._set_request(f"set_bits({bits})", "auto", checked_bits(bits))

    @property
    def on_switch(self) -> Callable[[Event], None] | None:
        """Called with every Event of kind "switch", on the thread that switched; assignable."""
        self._runs.check_open()
        return self._listener

    @on_switch.setter
    def on_switch(self, listener: Callable[[Event], None] | None) -> None:
        self._runs.check_open()
        self._listener = checked_listener(listener)

    @contextlib.contextmanager
    def _changing(self) -> Iterator[None]:
        self._runs.check_open()  # first: after a fork the lock may be held for ever
        with self._parts.replanner.changing():
            self._runs.check_open()
            yield

    def _set_request(self, reason: str, level: Level | Literal["auto"], bits: float | None) -> None:
        if self._parts.runner is not None:
            raise RequestError(
                "a policy decides about precision here: open a session without one, or write one"
            )
        self._parts.replanner.set_request(
            replace(self._parts.request, level=level, bits=bits), reason
        )

    # ---- what the session tells ----

    def stats(self) -> SessionStats:
        """Memory, precision and counts of this moment."""
        self._runs.check_open()
        with self._parts.replanner.lock, self._lock:
            self._runs.check_open()
            store, plan, totals = (
                self._parts.store.stats(),
                self._parts.replanner.plans.main_plan,
                self._totals,
            )
            return SessionStats(
                level=plan.uniform_level,
                planned_bits_per_weight=plan.bits_per_weight,
                predicted_error=plan.relative_error,
                predicted_ms=plan.predicted_s * 1e3 or None,
                plan=plan.reason,
                resident_bytes=store.home_bytes + store.ring_bytes + store.row_cache_bytes,
                peak_bytes=self._parts.ledger.growth_bytes(),
                streamed_bytes=store.read_bytes,
                read_wait_s=store.wait_ns / 1e9,
                bits_per_weight=totals.last_bits,
                mean_bits_per_weight=totals.bits / totals.runs if totals.runs else 0.0,
                runs=totals.runs,
                degraded=totals.degraded,
                switches=self._parts.log.count("switch"),
                escalated=totals.escalated,
                late=totals.late,
                samples=totals.samples,
                escalated_samples=totals.escalated_samples,
                whole_batches=totals.whole_batches,
                region=totals.region,
            )

    def status(self) -> dict[str, Any]:
        """All that `bapq monitor` shows, ready for JSON; its keys: docs/how-to/monitor.md."""
        stats = self.stats()
        return self._parts.status(stats)

    def events(self) -> list[Event]:
        """What changed how the session answers, oldest first; of a closed one, too.

        These are the last 10,000 events.
        """
        return self._parts.log.events()

    @property
    def internals(self) -> Internals:
        """The parts inside, for the profiler, tests and benchmarks; see `bapq_edge.internals`."""
        self._runs.check_open()
        return self._parts

    @property
    def _graphs(self) -> Graphs:
        return self._parts.graphs

    # ---- closing ----

    def close(self) -> None:
        """Wait for the runs in flight, then give all memory back. Closing twice is fine.

        Runs of `submit` that have not begun are cancelled. Whoever closes, on any thread, finds
        the session closed afterwards. Raises RequestError on a thread that is in a run, such as in
        a policy or in a listener that the run calls: it would wait for itself. In a process that
        was forked from the one that opened the session, it does nothing.
        """
        if self._runs.is_forked:
            return
        self._runs.check_may_close()
        if self._parts.monitor is not None:
            self._parts.monitor.stop()
        with self._parts.replanner.lock, self._lock:
            self._runs.close()
        self._queue.close()
        self._runs.wait()
        with self._giving_back:
            self._parts.close()  # each part once, whoever comes first
            self._dropped.detach()
            self._listener = None

    def __enter__(self) -> Session:
        """Give the session itself."""
        self._runs.check_open()
        return self

    def __exit__(self, *raised: object) -> None:
        """Close the session."""
        self.close()

    def __repr__(self) -> str:
        """Tell the bank, and the plan or that it is closed."""
        state = "closed" if self._runs.is_closed else self._parts.replanner.plans.main_plan.reason
        return f"<bapq_edge.Session {Path(self._parts.bank.path).name}: {state}>"


def _weak_listener(session: Session) -> Callable[[Event], None]:
    """What tells the session's listener, but does not keep a session that was dropped."""
    reference = weakref.ref(session)

    def tell(event: Event) -> None:
        listener = None if (told := reference()) is None else told._listener
        if listener is not None:
            listener(event)

    return tell


def _weak_status(session: Session) -> Callable[[], dict[str, Any] | None]:
    """What tells the session's status, None once it is closed, and does not keep it."""
    reference = weakref.ref(session)

    def tell() -> dict[str, Any] | None:
        told = reference()
        try:
            return None if told is None else told.status()
        except SessionClosedError:
            return None

    return tell
