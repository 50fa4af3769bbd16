"""The session: opens a bank, runs it under a memory budget, and changes its plan while it runs.

bank on disk ── Bank.open ──► manifest, tables, graph
                                 │                │
                              Store (libbapq)   open_graph (ONNX Runtime + our operators)
                                 │                │
run():     ticket = store.begin_run() ─► graph.run(feed + ticket) ─► store.end_run(ticket)
           with a policy, the runner makes one or more such passes, each at its own plan

budget ──► ledger ──► bytes for weights ─┐
sensors ──► controller ──► envelope ─────┼─► planner.plan ──► store.publish
level, bits, latency: what is wanted ────┤       runs that began before keep their plan
policy ──► precisions it may choose ──► plan_jointly ┘
"""

from __future__ import annotations

import contextlib
import os
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from .adaptive.policies import open_policy
from .adaptive.policy_runner import Answer, PolicyRunner
from .bank.boundary import Precision
from .bank.layout import Level
from .bank.reader import Bank
from .control.device_profile import find_profile, load_profile
from .engine.feeds import element_count, zeros
from .engine.graph import RUN_INPUT, Graphs, Part
from .engine.native import RunReport, Store, kernels_name
from .errors import (
    BudgetExceededWarning,
    BudgetTooSmallError,
    DegradedWarning,
    ExecutionError,
    RequestError,
    RunInputError,
    SessionClosedError,
    UnknownLevelError,
)
from .planning.ledger import MemoryLedger
from .planning.plan_set import PlanSet
from .planning.planner import Plan, Request
from .policy import Policy
from .telemetry import Event, EventLog, SessionStats, rss_bytes, trim_heap
from .units import format_size, parse_size

if TYPE_CHECKING:
    from .control.controller import Decision
    from .control.monitor import Monitor
    from .sensors import Sensors

__all__ = ["Session"]


@dataclass
class _Totals:
    """What the finished runs add up to."""

    runs: int = 0
    bits: float = 0.0
    last_bits: float = 0.0
    escalated: int = 0
    late: int = 0
    region: int | None = None


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
        bits: float | None = None,
        policy: Policy | Literal["static", "gate", "escalate"] | None = None,
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
            bits: bits per weight on average over all weights; the planner's best plan of so many.
            policy: who chooses the precision of every run: "gate" or "escalate", by the bank's
                boundary models; an object with a method `choose` (see bapq_edge.policy); "static"
                or None: nobody, unless `target_agreement` is given.
            target_agreement: share of inputs, 0 to 1, that are to be answered as the float model
                does; the boundary model that keeps it with the fewest bits is chosen. With a policy
                by name `bits` may be given instead: the best agreement at so many bits on average.
            latency_ms: time that a run may take for reading: with level "auto" the planner then
                streams what can be read in it, if that makes the answer better. Escalating: an
                answer that would come later is not asked for.
            weight_budget: most bytes of weights in memory, whatever `memory_budget` leaves.
            threads: threads that one operator runs on; None is one per core this process may use.
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
        self._ledger = MemoryLedger()
        self._log = EventLog()
        self.on_switch = on_switch
        self._threads = len(os.sched_getaffinity(0)) if threads is None else threads
        if self._threads < 1:
            raise RequestError(f"threads is {threads}, the least is 1")
        self._bank = Bank.open(bank)
        self._profile = find_profile() if profile is None else load_profile(profile)
        self._weight_budget_bytes = None if weight_budget is None else parse_size(weight_budget)
        self._latency_ms = latency_ms
        steered = self._open_policy(policy, level, bits, target_agreement)
        self._request = self._request_for(level, None if steered else bits, latency_ms)
        self._runner = None
        if steered is not None:
            self._runner = PolicyRunner(steered, self._default_precision(level, bits), self._record)

        self._lock = threading.Lock()  # short: counts and the closing
        self._idle = threading.Condition(self._lock)
        self._planning = threading.RLock()  # one change of plan at a time; runs never wait for it
        self._closed = False
        self._running = 0
        self._totals = _Totals()
        self._unheard: list[Event] = []  # switches that on_switch has not been told of
        self._executor: ThreadPoolExecutor | None = None
        self._monitor: Monitor | None = None

        sensors: Sensors | None = None
        if controller == "auto" or memory_budget == "auto":
            from .sensors import open_sensors  # only such a session pays for them

            sensors = open_sensors()
        with contextlib.ExitStack() as undo:
            self._store = Store(self._bank, direct=direct_io)
            undo.callback(self._store.close)
            splits = self._runner is not None and self._runner.splits
            self._graphs = Graphs(self._bank, self._threads, split=splits)
            self._plans = PlanSet(self._bank, self._store, self._runner)
            self._plans.add_regions()
            self._ledger.settle(rss_bytes(), weight_bytes=0)
            self._ledger.budget_bytes = self._budget_bytes(memory_budget, sensors)
            if controller == "auto" and sensors is not None:
                self._monitor = self._make_monitor(sensors)
            self._adopt(self._make_plans(frugal=self._ledger.budget_bytes is not None))
            if self._ledger.budget_bytes is not None:
                measured = self._warm_up()
                plans = self._make_plans()
                # Else the first real run measures.
                self._adopt(plans if measured else self._make_lean_plans(plans))
            self._record("open", f"kernels {kernels_name()}, {self._threads} threads")
            undo.pop_all()
        if self._monitor is not None:
            self._monitor.start()

    def _open_policy(
        self,
        policy: Policy | str | None,
        level: Level | str,
        bits: float | None,
        target_agreement: float | None,
    ) -> Policy | None:
        named = policy is None or isinstance(policy, str)
        if policy == "static" or (policy is None and target_agreement is None):
            if target_agreement is not None:
                raise RequestError(
                    "target_agreement needs a policy that looks at inputs: leave policy out"
                )
            return None
        if not named and target_agreement is not None:
            raise RequestError("target_agreement is for policies by name: leave it out")
        if not named:
            return policy  # type: ignore[return-value]
        if level != "auto":
            raise RequestError(f"level {level} and a policy are both asked for: choose one")
        latency_s = None if self._latency_ms is None else self._latency_ms / 1e3
        return open_policy(
            self._bank,
            policy,  # type: ignore[arg-type]
            target_agreement=target_agreement,
            bits=bits,
            latency_s=latency_s,
        )

    def _default_precision(self, level: Level | str, bits: float | None) -> Precision:
        """What a policy's runs are made at where it does not say."""
        if self._request.level != "auto":
            return Precision(level=self._request.level)
        return Precision(level=self._bank.levels[0]) if bits is None else Precision(bits=bits)

    # ---- running ----

    def run(
        self,
        output_names: Sequence[str] | None,
        input_feed: Mapping[str, Any],
        run_options: Any = None,
    ) -> list[Any]:
        """Run the model; arguments and result as in `onnxruntime.InferenceSession.run`.

        Raises RunInputError for a feed that does not fit, ExecutionError when the graph fails,
        BankIntegrityError, BankTruncatedError or StorageError when the weights cannot be read.
        Where a lower level is in memory the run takes that instead, with a DegradedWarning and an
        event.
        """
        wanted = [value.name for value in self._graphs.inputs]
        if set(input_feed) != set(wanted):
            raise RunInputError(
                f"the feed has {sorted(input_feed)}, the model needs {sorted(wanted)}"
            )
        with self._open_run() as running:
            self._make_room(input_feed, running)
            if self._runner is not None:
                return self._steer(self._runner, output_names, input_feed, run_options)
            outputs, bits = self._run_part("whole", None, input_feed, output_names, run_options)
            self._count(bits)
        return list(outputs.values())

    def run_async(
        self, output_names: Sequence[str] | None, input_feed: Mapping[str, Any]
    ) -> Future[list[Any]]:
        """Run the model on a thread of the session's own; the future gives what `run` would."""
        with self._lock:
            self._check_open()
            if self._executor is None:
                self._executor = ThreadPoolExecutor(1, thread_name_prefix="bapq-run")
            return self._executor.submit(self.run, output_names, dict(input_feed))

    @contextlib.contextmanager
    def _open_run(self) -> Iterator[int]:
        with self._lock:
            self._check_open()
            self._running += 1
            running = self._running
        try:
            yield running
        finally:
            with self._lock:
                self._running -= 1
                self._idle.notify_all()

    def _steer(
        self,
        runner: PolicyRunner,
        output_names: Sequence[str] | None,
        feed: Mapping[str, Any],
        run_options: Any,
    ) -> list[Any]:
        if output_names is None:
            output_names = [value.name for value in self._graphs.outputs]
        run = partial(self._run_part, run_options=run_options)
        answer = runner.answer(run, feed, output_names)
        self._count(answer.bits, answer)
        self._plans.rest()
        return [answer.outputs[name] for name in output_names]

    def _run_part(
        self,
        part: Part,
        precision: Precision | None,
        feed: Mapping[str, Any],
        names: Sequence[str] | None,
        run_options: Any = None,
    ) -> tuple[dict[str, Any], float]:
        """One pass over a part of the graph; its outputs by name, and the bits per weight read."""
        outputs, bits, report = self._pass(part, precision, feed, names, run_options)
        if report is not None:
            self._settle(report)
        return outputs, bits

    def _pass(
        self,
        part: Part,
        precision: Precision | None,
        feed: Mapping[str, Any],
        names: Sequence[str] | None = None,
        run_options: Any = None,
    ) -> tuple[dict[str, Any], float, RunReport | None]:
        if not self._graphs.takes_ticket(part):
            return self._graphs.call(part, names, feed, run_options), 0.0, None
        if precision is not None and precision not in self._plans:
            self._learn(precision)
        ticket, bits = self._plans.begin(part, precision)
        try:
            run_feed = {**feed, RUN_INPUT: np.array(ticket, dtype=np.int64)}
            outputs = self._graphs.call(part, names, run_feed, run_options)
        finally:
            report = self._store.end_run(ticket)  # an operator of ours that failed raises here
        return outputs, bits, report

    def _count(self, bits: float, answer: Answer | None = None) -> None:
        with self._lock:
            self._totals.runs += 1
            self._totals.last_bits = bits
            self._totals.bits += bits
            if answer is not None:
                self._totals.escalated += answer.escalated
                self._totals.late += answer.late
                self._totals.region = answer.region

    def _settle(self, report: RunReport) -> None:
        if report.degraded_by is not None:
            reason = f"{report.degraded_chunks} chunks ran at a lower level: {report.degraded_by}"
            self._record("degraded", reason)
            warnings.warn(reason, DegradedWarning, stacklevel=4)
        if self._ledger.budget_bytes is not None:
            with self._changing():
                grown = self._ledger.settle(report.rss_bytes, report.weight_bytes)
                if grown or self._frugal:
                    self._follow_ledger()

    # ---- memory ----

    def _budget_bytes(self, budget: int | str | None, sensors: Sensors | None) -> int | None:
        if budget is None:
            return None
        if budget == "auto" and sensors is not None:
            from .control.controller import automatic_budget_bytes

            size_bytes, reason = automatic_budget_bytes(sensors.read())
            self._record("budget", f"{format_size(size_bytes)}: {reason}")
            return size_bytes
        return parse_size(budget)

    def _weight_bytes(self) -> int:
        stats = self._store.stats()
        return stats.home_bytes + stats.ring_bytes + stats.row_cache_bytes

    def _warm_up(self) -> bool:
        """Run on zeros, so that a budget too small is refused now rather than later.

        False when that is impossible.
        """
        feed = zeros(self._graphs.inputs)
        if feed is None:
            return False  # strings, sequences
        self._ledger.is_heavier(element_count(feed))
        for _ in range(_WARM_UP_RUNS):
            values = dict(feed)
            try:
                for part in self._graphs.parts:
                    outputs, _, report = self._pass(part, self._plans.main, values)
                    values |= outputs
                    if report is not None:
                        self._ledger.settle(report.rss_bytes, report.weight_bytes)
            except (RunInputError, ExecutionError):
                return False  # a model that zeros of the smallest shape do not fit
        return True

    def _follow_ledger(self) -> None:
        try:
            self._replan("memory", _MEASURED)
        except BudgetTooSmallError as error:
            # The run is over and its answer right: keep as little as can be, and say it.
            if not self._frugal:
                self._adopt(self._make_plans(frugal=True))
            self._record("budget", f"exceeded: {error}")
            warnings.warn(str(error), BudgetExceededWarning, stacklevel=4)

    def _make_room(self, feed: Mapping[str, Any], running: int) -> None:
        """Before a run that may need more memory than any before: keep as few weights as can be,
        and read the others as it needs them; at the same precision."""
        if self._ledger.budget_bytes is None:
            return
        with self._planning:
            heavier = self._ledger.is_heavier(element_count(feed) * running)
            if heavier and not self._frugal:
                self._adopt(self._make_lean_plans(self._plans.by_precision))

    def set_memory_budget(self, budget: int | str | None) -> None:
        """Take another budget, live. Raises BudgetTooSmallError and then changes nothing."""
        size_bytes = None if budget is None else parse_size(budget)
        with self._changing():
            self._check_open()
            previous = self._ledger.budget_bytes
            self._ledger.budget_bytes = size_bytes
            try:
                self._replan("budget", f"set_memory_budget({budget!r})")
            except BaseException:
                self._ledger.budget_bytes = previous
                raise
            if self._monitor is not None:
                self._monitor.set_budget(size_bytes, self._plans.smallest_limit(self._request))

    # ---- precision ----

    def set_level(self, level: Level | str) -> None:
        """Run at this level, or at "auto", from the next run on; runs in flight keep theirs.

        Raises UnknownLevelError or BudgetTooSmallError and then changes nothing.
        """
        self._change_request(
            self._request_for(level, None, self._latency_ms), f"set_level({level!r})"
        )

    def set_bits(self, bits: float) -> None:
        """Run at so many bits per weight on average, as the planner spreads them best.

        Raises RequestError or BudgetTooSmallError and then changes nothing.
        """
        self._change_request(self._request_for("auto", bits, self._latency_ms), f"set_bits({bits})")

    def _change_request(self, request: Request, reason: str) -> None:
        if self._runner is not None:
            raise RequestError(
                "a policy decides about precision here: open a session without one, or write one"
            )
        with self._changing():
            self._check_open()
            previous, self._request = self._request, request
            try:
                self._replan("request", reason)
            except BaseException:
                self._request = previous
                raise

    def _request_for(
        self, level: Level | str, bits: float | None, latency_ms: float | None
    ) -> Request:
        held = self._bank.levels
        chosen: Level | Literal["auto"] | None = "auto" if level == "auto" else None
        for candidate in held:
            if level == candidate or level == str(candidate):
                chosen = candidate
        if chosen is None:
            raise UnknownLevelError(
                f"level {level!r} is not in the bank, which holds {', '.join(map(str, held))}"
            )
        return Request(
            level=chosen,
            bits=bits,
            latency_s=None if latency_ms is None else latency_ms / 1e3,
            storage_bytes_s=self._profile.storage_read_mb_s * 1e6 if self._profile else None,
        )

    # ---- plans: with _planning held, except while opening ----

    def _make_lean_plans(
        self, plans: Mapping[Precision | None, Plan]
    ) -> dict[Precision | None, Plan]:
        """Plans of the same precision that hold as little in memory as can be."""
        request = self._request
        if self._runner is None and request.level == "auto" and request.bits is None:
            # Left to itself the planner meets a small limit with low levels.
            bits = plans[None].bits_per_weight * (1 + 1e-9)  # rounded up
            request = replace(request, bits=bits)
        return self._make_plans(frugal=True, request=request)

    def _make_plans(
        self, *, frugal: bool = False, request: Request | None = None
    ) -> dict[Precision | None, Plan]:
        """Plans for the session's request, or another, in what memory allows; frugal: the least."""
        request, threads = request or self._request, self._threads
        if self._monitor is not None and (request.level == "auto" or self._runner is not None):
            cap = self._monitor.envelope.highest_level
            request = replace(request, highest_level=cap)  # type: ignore[arg-type]
        smallest = self._plans.smallest_limit(request)
        row_cache_bytes = self._store.stats().row_cache_limit_bytes
        limit: int | None = smallest
        if not frugal:
            limit = self._ledger.weight_limit_bytes(smallest + row_cache_bytes)
            limit = None if limit is None else limit - row_cache_bytes
            if self._weight_budget_bytes is not None:
                own = self._weight_budget_bytes - row_cache_bytes
                limit = own if limit is None else min(limit, own)
        if self._monitor is not None:
            envelope = self._monitor.envelope
            threads = envelope.threads
            if envelope.weight_bytes_limit is not None:
                allowed = envelope.weight_bytes_limit
                limit = max(smallest, allowed if limit is None else min(limit, allowed))
        made = self._plans.make(replace(request, weight_bytes_limit=limit))
        self._frugal = frugal
        self._threads_now = threads
        return made

    def _adopt(self, plans: dict[Precision | None, Plan]) -> None:
        self._plans.adopt(plans, self._threads_now)

    def _learn(self, precision: Precision) -> None:
        """Plan for a precision that the policy did not announce."""
        assert self._runner is not None
        with self._planning:
            if precision in self._plans:
                return
            self._runner.shares[precision] = 0.0
            try:
                plans = self._make_plans(frugal=self._frugal)
            except BaseException:
                del self._runner.shares[precision]
                raise
            self._adopt(plans)

    def _replan(self, kind: str, reason: str) -> None:
        """Publish the plans that now fit, if they are others, and say so."""
        previous, threads = self._plans.current, self._threads_now
        new = self._make_plans()
        assert previous is not None
        levels_differ = self._plans.levels_differ(new)
        if not (levels_differ or self._plans.places_differ(new) or self._threads_now != threads):
            return
        self._adopt(new)
        if levels_differ:
            self._unheard.append(self._record("switch", reason, previous.bits_per_weight))
        else:
            self._record(kind, reason)

    @contextlib.contextmanager
    def _changing(self) -> Iterator[None]:
        """Holds _planning; the switches made meanwhile are told once it is free again."""
        with self._planning:
            try:
                yield
            finally:
                heard, self._unheard = self._unheard, []
        if self.on_switch is not None:
            for event in heard:
                self.on_switch(event)

    def _make_monitor(self, sensors: Sensors) -> Monitor:
        from .control.monitor import Monitor

        return Monitor(
            sensors,
            self._profile,
            levels=self._bank.levels,
            threads=self._threads,
            budget_bytes=self._ledger.budget_bytes,
            minimum_bytes=self._plans.smallest_limit(self._request),
            follow=self._follow_monitor,
        )

    def _follow_monitor(self, step: Callable[[int], Decision]) -> None:
        """Called by the monitor after every reading; `step` decides, given the weights now."""
        with self._changing():
            if self._closed:
                return
            decision = step(self._weight_bytes())
            for name in decision.lost:
                self._record("sensor", f"{name} can no longer be read; its limits stay")
            if decision.changed:
                self._replan("controller", decision.cause or "controller")

    # ---- what the session tells ----

    def get_inputs(self) -> list[Any]:
        """The model's inputs, as `onnxruntime.NodeArg` (name, shape, type)."""
        return list(self._graphs.inputs)

    def get_outputs(self) -> list[Any]:
        """The model's outputs, as `onnxruntime.NodeArg` (name, shape, type)."""
        with self._lock:
            self._check_open()
        return list(self._graphs.outputs)

    def stats(self) -> SessionStats:
        """Memory, precision and counts at this context."""
        with self._planning, self._lock:
            self._check_open()
            store = self._store.stats()
            current, totals = self._plans.current, self._totals
            assert current is not None
            return SessionStats(
                level=_uniform_level(current),
                planned_bits_per_weight=current.bits_per_weight,
                resident_bytes=store.home_bytes + store.ring_bytes + store.row_cache_bytes,
                peak_bytes=self._ledger.growth_bytes(),
                streamed_bytes=store.read_bytes,
                read_wait_s=store.wait_ns / 1e9,
                bits_per_weight=totals.last_bits,
                mean_bits_per_weight=totals.bits / totals.runs if totals.runs else 0.0,
                runs=totals.runs,
                switches=self._log.count("switch"),
                escalated=totals.escalated,
                late=totals.late,
                region=totals.region,
            )

    def events(self) -> list[Event]:
        """Everything that changed how the session answers, oldest first."""
        return self._log.events()

    def _record(self, kind: str, reason: str, previous_bits: float | None = None) -> Event:
        current = self._plans.current
        return self._log.record(
            kind,
            reason,
            bits_per_weight=current.bits_per_weight if current else 0.0,
            previous_bits_per_weight=previous_bits,
            weight_bytes=current.resident_bytes if current else 0,
        )

    # ---- closing ----

    def close(self) -> None:
        """Wait for the runs in flight, then give all memory back. Closing twice is fine."""
        monitor, self._monitor = self._monitor, None
        if monitor is not None:
            monitor.stop()
        with self._planning, self._lock:
            if self._closed:
                return
            self._closed = True
        with self._lock:
            while self._running:
                self._idle.wait()
        if self._executor is not None:
            self._executor.shutdown(cancel_futures=True)
        self._graphs.close()
        self._store.close()
        trim_heap()
        self._record("close", "closed")

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
        """Bank, plan and whether it is open."""
        current = self._plans.current
        state = current.reason if current and not self._closed else "closed"
        return f"<bapq_edge.Session {Path(self._bank.path).name}: {state}>"


_MEASURED = "measured what a run needs besides weights"

_WARM_UP_RUNS = 2
"""ONNX Runtime's arena takes its final size in the second."""


def _uniform_level(current: Plan) -> int | None:
    first = int(current.levels[0])
    return first if bool((current.levels == first).all()) else None
