"""The replanner: keeps the plans of a session in step with what is wanted and what memory allows.

request, budget, envelope ──► terms ──┐
ledger: what is not weights ──────────┼──► PlanMaker.make ──► PlanSet ──► Publisher ──► store
what is pinned now ───────────────────┘        pure           adopted      runs that began before
                                                              as a whole   keep their plan
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..bank.boundary import Precision
from ..bank.reader import Bank
from ..engine.feeds import element_count
from ..engine.store import RunReport, Store
from ..errors import BudgetExceededWarning, BudgetTooSmallError
from ..telemetry import Event, EventLog, logger, rss_bytes, warn_caller
from .ledger import MemoryLedger, too_small
from .plan_set import PlanMaker, PlanSet
from .planner import ChunkCosts, Request
from .publisher import Publisher, register_regions
from .speed_meter import SpeedMeter
from .timing import Speeds

if TYPE_CHECKING:  # only a session with a controller loads it
    from ..control.envelope import Decision, Envelope

__all__ = ["Replanner"]

_MEASURED = "measured what a run needs besides weights"

_MOST_LEARNT = 8
"""Precisions that a policy asked for without announcing them: all plans are made together, and each
more takes longer."""

_ROUNDED_UP = 1 + 1e-9
"""A mean of bits is rounded; times this, it is a bound that does not fall short of the mean."""


@dataclass(frozen=True, eq=False)
class _Terms:
    """What plans are made for."""

    request: Request
    budget_bytes: int | None
    """What the process may grow by; None is no limit."""
    envelope: Envelope | None
    """What the controller allows; None: there is no controller."""
    precisions: tuple[Precision | None, ...]
    """What runs may be made at; None stands for the request."""


class Replanner:
    """The plans of one session. Safe to use from several threads.

    Runs never wait for a change of plan. `set_request`, `set_budget` and `set_envelope` are to be
    called inside `changing`; one that raises changes nothing.
    """

    def __init__(
        self,
        bank: Bank,
        store: Store,
        publisher: Publisher,
        ledger: MemoryLedger,
        log: EventLog,
        *,
        request: Request,
        shares: Mapping[Precision, float] | None,
        threads: int,
        storage_bytes_s: float | None,
        weight_budget_bytes: int | None,
    ) -> None:
        """Plan nothing yet: that is `open`.

        Args:
            bank: the open bank.
            store: where the weights are.
            publisher: holds the plans that are adopted.
            ledger: the session's account, opened before the store.
            log: where changes are recorded.
            request: what is wanted.
            shares: of runs at each precision, where a policy steers; None: none does.
            threads: threads that one operator runs on, if no envelope says otherwise.
            storage_bytes_s: read speed to plan with until it is measured.
            weight_budget_bytes: most bytes of weights, whatever the budget leaves.
        """
        self.lock = threading.RLock()
        """Held while plans change."""
        self.on_switch: Callable[[Event], None] | None = None
        """Called with every Event of kind "switch", outside the lock, on the thread that switched;
        assignable. The switch has taken effect: what the listener raises is logged."""
        self._store, self._publisher, self._ledger, self._log = store, publisher, ledger, log
        skipped = None if shares is None else register_regions(bank, store)
        self._maker = PlanMaker(bank, shares, skipped)
        self._steered = shares is not None
        self._threads = threads
        self._meter = SpeedMeter(store, len(bank.manifest.layers), storage_bytes_s)
        self._speeds: Speeds | None = None
        """Those that plans were last made with."""
        self._weight_budget_bytes = weight_budget_bytes
        self._switches: list[Event] = []
        self._warnings: list[str] = []
        self._terms = _Terms(request, None, None, self._maker.announced)
        self._closed = False
        ledger.settle(rss_bytes(), weight_bytes=0)

    def open(
        self, budget_bytes: int | None, envelope: Envelope | None, warm_up: Callable[[], bool]
    ) -> None:
        """Adopt the first plans; None is no budget, and no controller.

        With a budget `warm_up` runs the model, on plans that hold as little as can be, so that a
        budget too small is refused now; it tells whether that measured what runs need.
        """
        terms = replace(self._terms, budget_bytes=budget_bytes, envelope=envelope)
        self._terms = terms
        if budget_bytes is None:
            self.adopt(self._make(terms))
            self._tell_held_back()
            return
        with self._ledger.opening():
            self.adopt(self._make(terms, minimal=True))
            measured = warm_up()
            self._meter.learn()
            plans = self._make(terms)
        # Else the first real run measures.
        self.adopt(plans if measured else self._make_minimal(plans))
        self._tell_held_back()

    def close(self) -> None:
        """Follow no controller from now on, and tell nobody."""
        with self.lock:
            self._closed = True
            self.on_switch = None

    # ---- what is planned now ----

    @property
    def is_open(self) -> bool:
        """Whether there are plans."""
        return self._publisher.plans is not None

    @property
    def plans(self) -> PlanSet:
        """The plans of the runs that begin now."""
        plans = self._publisher.plans
        assert plans is not None, "the replanner was not opened"
        return plans

    @property
    def costs(self) -> ChunkCosts:
        """What the bank offers to the planner."""
        return self._maker.costs

    @property
    def main(self) -> Precision | None:
        """What most runs are made at; None without a policy."""
        return self._maker.main

    @property
    def budget_bytes(self) -> int | None:
        """The memory budget; None is no limit."""
        return self._terms.budget_bytes

    def smallest_limit(self) -> int:
        """Smallest number of weight bytes that the session can do with."""
        return self._maker.smallest_limit(self._terms.request, self._terms.precisions)

    def weight_bytes(self) -> int:
        """Bytes of weights in memory."""
        stats = self._store.stats()
        return stats.home_bytes + stats.ring_bytes + stats.row_cache_bytes

    # ---- runs ----

    def make_room(self, feed: Mapping[str, Any], open_runs: int) -> None:
        """Before a run, which is one of so many.

        Where it may need more memory than any before, as few weights as can be are kept for it, and
        the others read as it needs them; at the same precision.
        """
        if self._terms.budget_bytes is None:
            return
        with self.lock:
            heavier = self._ledger.is_heavier(element_count(feed) * open_runs)
            if heavier:
                self._meter.forget_computing()
            if heavier and not self.plans.minimal:
                self.adopt(self._make_minimal(self.plans))

    def check_inputs(self, input_bytes: int) -> None:
        """Refuse inputs that alone take more than the budget. Raises BudgetTooSmallError."""
        budget_bytes = self._terms.budget_bytes
        if budget_bytes is not None and input_bytes > budget_bytes:
            raise too_small("memory_budget", budget_bytes, input_bytes, " for the inputs alone")

    def learn(self, precision: Precision | None) -> None:
        """Before a pass: plan for its precision, if no policy announced it.

        Of such precisions the last few are kept: a policy may wish for ever new ones.

        Raises UnknownLevelError, RequestError or BudgetTooSmallError.
        """
        if precision in self.plans.by_precision:
            return
        with self.lock:
            if precision in self.plans.by_precision:
                return
            announced = self._maker.announced
            learnt = self._terms.precisions[len(announced) :][1 - _MOST_LEARNT :]
            terms = replace(self._terms, precisions=(*announced, *learnt, precision))
            now = self.plans
            made = self._make(terms, minimal=now.minimal)
            self.adopt(replace(made, over_budget=now.over_budget))
            self._terms = terms

    def settle(self, report: RunReport) -> None:
        """After a pass: follow what it needed besides weights, and how fast it was."""
        has_budget, follows_speeds = self._terms.budget_bytes is not None, self._follows_speeds()
        if not has_budget and not follows_speeds:
            return
        cause = None
        with self.lock:
            plans = self.plans
            if follows_speeds:
                cause = self._learn_speeds(plans)
            if has_budget:
                self._ledger.settle(report.rss_bytes, report.weight_bytes)
                self._ledger.is_measured = True
                waits = plans.minimal and not plans.over_budget  # for this measurement
                if waits or self._ledger.outgrows(plans.overhead_bytes):
                    cause = "memory", _MEASURED
            if cause is None:
                return
        with self.changing():
            try:
                self._replan(self._terms, *cause)
            except BudgetTooSmallError as error:  # the run is over, and its answer right
                if not self.plans.over_budget:  # else it was said
                    self._warnings.append(str(error))
                self._exceed(self._terms, *cause, error)

    def _follows_speeds(self) -> bool:
        """Whether other speeds may mean another plan."""
        request, made = self._terms.request, self.plans.main_plan
        chooses = request.level == "auto" and request.bits is None and not self._steered
        return chooses and (made.streamed_bytes > 0 or made.held_back is not None)

    def _learn_speeds(self, plans: PlanSet) -> tuple[str, str] | None:
        """Take in how fast the last runs were; kind and reason of a change, if it calls for one."""
        self._meter.learn()
        if plans.minimal:
            return None
        now = self._meter.speeds(plans.threads)
        moved = self._meter.moved(self._speeds, now, self._terms.request.latency_s)
        made = plans.main_plan
        matters = made.held_back is not None if moved > 0 else made.streamed_bytes > 0
        return ("storage", f"measured {now}") if moved and matters else None

    # ---- changes ----

    @contextlib.contextmanager
    def changing(self) -> Iterator[None]:
        """Holds the lock; switches and warnings made meanwhile are told once it is free again."""
        with self.lock:
            try:
                yield
            finally:
                switches, self._switches = self._switches, []
                warnings, self._warnings = self._warnings, []
        for event in switches:
            if (listener := self.on_switch) is not None:
                try:
                    listener(event)
                except Exception:
                    logger.exception("%s: on_switch raised at %s", self._log.source, event)
        for text in warnings:
            warn_caller(text, BudgetExceededWarning)

    def set_request(self, request: Request, reason: str) -> None:
        """Run as this asks, from the next run on.

        Where runs need more than the budget already, a request that needs no more than the present
        one is taken all the same, with a BudgetExceededWarning. Raises UnknownLevelError,
        RequestError or BudgetTooSmallError.
        """
        terms = replace(self._terms, request=request)
        try:
            self._replan(terms, "request", reason)
        except BudgetTooSmallError as error:
            least = self._maker.smallest_limit(request, terms.precisions)
            if least > self.plans.main_plan.resident_bytes:
                raise
            self._exceed(terms, "request", reason, error)
            self._warnings.append(str(error))

    def set_budget(self, budget_bytes: int | None, reason: str) -> None:
        """Take another budget. Raises BudgetTooSmallError."""
        self._replan(replace(self._terms, budget_bytes=budget_bytes), "budget", reason)

    def set_envelope(self, envelope: Envelope, kind: str, reason: str) -> None:
        """Stay within what the controller allows now."""
        terms = replace(self._terms, envelope=envelope)
        try:
            self._replan(terms, kind, reason)
        except BudgetTooSmallError as error:
            self._exceed(terms, kind, reason, error)

    def follow(self, step: Callable[[int], Decision]) -> None:
        """Called by the monitor after every reading; `step` decides, given the weight bytes now."""
        with self.changing():
            if self._closed:
                return
            decision = step(self.weight_bytes())
            for name in decision.lost:
                self.record("sensor", f"{name} can no longer be read; its limits stay")
            if decision.changed:
                cause = decision.cause or "controller"
                self.set_envelope(decision.envelope, "controller", cause)

    def _replan(self, terms: _Terms, kind: str, reason: str) -> None:
        """Adopt what fits the terms; they hold from then on.

        Raises what making the plans raises, and then the terms before still hold.
        """
        self._change(terms, self._make(terms), kind, reason)

    def _exceed(self, terms: _Terms, kind: str, reason: str, error: BudgetTooSmallError) -> None:
        """Take terms that nothing fits: keep as little as can be, and say it."""
        least = self._make(terms, minimal=True)
        self._change(terms, replace(least, over_budget=True), kind, reason)
        self.record("budget", f"exceeded: {error}")

    def _change(self, terms: _Terms, after: PlanSet, kind: str, reason: str) -> None:
        """Adopt plans made for these terms, and say where runs are made otherwise."""
        before = self.plans
        self.adopt(after)
        self._terms = terms
        if before.minimal or before.main_plan.held_back is None:
            self._tell_held_back()
        if after.levels_differ(before):
            previous_bits = before.main_plan.bits_per_weight
            self._switches.append(self.record("switch", reason, previous_bits))
        elif after.differs(before):
            self.record(kind, reason)

    def _tell_held_back(self) -> None:
        """Say it where reading is too slow for the best answers."""
        plans = self.plans
        if not plans.minimal and (held_back := plans.main_plan.held_back) is not None:
            self.record("storage", held_back)

    def adopt(self, plans: PlanSet) -> None:
        """Make these the plans of the runs that begin from now on."""
        self._publisher.publish(plans)
        logger.info("%s: plan: %s", self._log.source, plans.main_plan.reason)

    def record(self, kind: str, reason: str, previous_bits: float | None = None) -> Event:
        """Record an event, with what is planned after it."""
        plan = self.plans.main_plan if self.is_open else None
        return self._log.record(
            kind,
            reason,
            bits_per_weight=plan.bits_per_weight if plan else 0.0,
            previous_bits_per_weight=previous_bits,
            weight_bytes=plan.resident_bytes if plan else 0,
        )

    # ---- plans: these change nothing ----

    def _make(
        self, terms: _Terms, *, minimal: bool = False, request: Request | None = None
    ) -> PlanSet:
        """Plans for the terms' request, or another, in what memory allows; minimal: the least."""
        request, threads, envelope = request or terms.request, self._threads, terms.envelope
        if envelope is not None:
            threads = envelope.threads
            if self._steered or request.level == "auto":
                request = replace(request, highest_level=envelope.highest_level)
        smallest = self._maker.smallest_limit(request, terms.precisions)
        limit = smallest if minimal else self._weight_limit_bytes(terms, smallest)
        if envelope is not None and envelope.weight_bytes_limit is not None:
            allowed = envelope.weight_bytes_limit
            limit = max(smallest, allowed if limit is None else min(limit, allowed))
        self._speeds = self._meter.speeds(threads)
        return self._maker.make(
            replace(request, weight_bytes_limit=limit, speeds=self._speeds),
            terms.precisions,
            resident=self.plans.main_plan.pinned if self.is_open else None,
            threads=threads,
            overhead_bytes=self._ledger.overhead_bytes,
            measured=terms.budget_bytes is not None,
            minimal=minimal,
        )

    def _make_minimal(self, plans: PlanSet) -> PlanSet:
        """Plans of the same precision that hold as little in memory as can be."""
        request = self._terms.request
        if not self._steered and request.level == "auto" and request.bits is None:
            # Left to itself the planner meets a small limit with low levels.
            request = replace(request, bits=plans.main_plan.bits_per_weight * _ROUNDED_UP)
        return self._make(self._terms, minimal=True, request=request)

    def _weight_limit_bytes(self, terms: _Terms, smallest_bytes: int) -> int | None:
        """What the budgets leave for weights, rows that are read one by one aside."""
        row_cache_bytes = self._store.stats().row_cache_limit_bytes
        least_bytes = smallest_bytes + row_cache_bytes
        limits = []
        if (budget_bytes := terms.budget_bytes) is not None:
            limits.append(self._ledger.weight_limit_bytes(budget_bytes, least_bytes))
        if (budget_bytes := self._weight_budget_bytes) is not None:
            if budget_bytes < least_bytes:
                raise too_small("weight_budget", budget_bytes, least_bytes, ": allow more")
            limits.append(budget_bytes)
        return min(limits) - row_cache_bytes if limits else None
