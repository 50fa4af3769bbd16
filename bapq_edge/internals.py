"""The parts of an open session: made together, given back together. They know nothing of it.

The seam for what must see them, such as the profiler, tests and benchmarks:

    store = session.internals.store

No part of the public interface: what is in here changes from version to version.
"""

from __future__ import annotations

import _thread
import atexit
import contextlib
import os
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .bank.reader import Bank
from .bank.settled import open_settled
from .control.device_profile import find_profile, load_profile
from .engine.graph import Graphs
from .engine.library import kernels_name
from .engine.store import Store
from .options import SessionOptions
from .ort_api.arguments import EngineSettings
from .planning.ledger import MemoryLedger
from .planning.passes import Passes
from .planning.publisher import Publisher
from .planning.replanner import Replanner
from .telemetry import Event, EventLog, SessionStats, logger, trim_heap
from .units import counted, format_size

if TYPE_CHECKING:  # loaded by sessions that need them
    from .adaptive.policy_runner import PolicyRunner
    from .control.monitor import Monitor

__all__ = ["Internals"]


_giving_back: set[_thread.LockType] = set()
"""One for each dropped session that a thread gives back now."""

_ending = _thread.allocate_lock()
"""Locked from the end of the program on."""


@atexit.register
def _finish_giving_back() -> None:
    """At the end of the program: a thread must not be in ONNX Runtime while that is taken down."""
    _ending.acquire()
    for done in list(_giving_back):
        done.acquire()


os.register_at_fork(after_in_child=_giving_back.clear)  # those threads are not here


class Internals:
    """The parts of a session."""

    bank: Bank
    store: Store
    graphs: Graphs
    replanner: Replanner
    passes: Passes
    log: EventLog
    publisher: Publisher
    monitor: Monitor | None
    """The controller's thread; None without a controller."""
    runner: PolicyRunner | None
    """Steers runs by a policy; None without one."""

    def __init__(
        self,
        options: SessionOptions,
        ledger: MemoryLedger,
        on_switch: Callable[[Event], None],
        tell_status: Callable[[], dict[str, Any] | None],
        *,
        ort_threads: int | None,
        settings: EngineSettings,
    ) -> None:
        """Open everything; on failure nothing stays open.

        `tell_status` gives the status of the session, None once it is closed. `ort_threads` and
        `settings` are what the caller set in ONNX Runtime's own options.

        Where the bank is replaced meanwhile, all of it is opened again, so that no two parts are of
        different banks.
        """
        self.ledger = ledger
        self.threads = int(options.threads or ort_threads or len(os.sched_getaffinity(0)))
        self._profile = find_profile() if options.profile is None else load_profile(options.profile)
        self.request = options.request
        self._settings = settings
        with contextlib.ExitStack() as undo:
            undo.callback(trim_heap)
            undo.enter_context(open_settled(options.bank, lambda: self._open_bank(options)))
            self._open_plans(options, on_switch, undo)
            if options.monitor:
                from .live.status_socket import StatusServer  # only such a session pays for it

                undo.callback(StatusServer(tell_status).close)
            self._open_parts = undo.pop_all()

    def start(self) -> None:
        """Follow the controller from now on, if there is one."""
        if self.monitor is not None:
            self.monitor.start()

    def close(self) -> None:
        """Give everything back, each part once."""
        self._open_parts.close()

    def status(self, stats: SessionStats) -> dict[str, Any]:
        """What the session is doing, ready for JSON."""
        from .live.status import to_status  # only a session that is asked pays for it

        return to_status(
            self.bank,
            self.replanner.plans.main_plan,
            stats,
            self.log.events(),
            time_s=time.monotonic() - self.log.opened_s,
            budget_bytes=self.replanner.budget_bytes,
            threads=self.threads,
            readings=None if self.monitor is None else self.monitor.readings,
        )

    def give_back_later(self) -> Callable[[], None]:
        """A function that does as `close` without waiting for anybody, and holds no callback.

        It is for a finalizer, which may run on any thread, in the middle of anything: what may wait
        is left to a thread of its own.
        """
        parts, bank, process = self._open_parts, str(self.bank.path), os.getpid()

        def give_back(done: _thread.LockType) -> None:
            try:
                parts.close()
            except Exception:
                logger.exception("%s: a dropped session could not be closed", bank)
            finally:
                _giving_back.discard(done)
                done.release()

        def start() -> None:
            if os.getpid() != process:
                return  # forked: the memory and the threads are another process's
            if _ending.locked():
                return  # the system takes it all back
            done = _thread.allocate_lock()
            done.acquire()
            _giving_back.add(done)
            _thread.start_new_thread(give_back, (done,))  # Thread.start would wait for it
            warnings.warn(
                f"a session of {bank} was dropped while it was open: close it, or open it in a "
                "with statement",
                ResourceWarning,
                stacklevel=2,
            )

        return start

    def budget_of(self, budget: int | Literal["auto"] | None) -> tuple[int | None, str | None]:
        """The budget in bytes; for "auto" a share of what is free, and how it was found."""
        if budget != "auto":
            return budget, None
        from .control.controller import automatic_budget_bytes  # only such a session pays for them
        from .sensors import open_sensors

        with contextlib.closing(open_sensors()) as sensors:
            held_bytes = self.ledger.held_bytes() if self.replanner.is_open else 0
            size_bytes, reason = automatic_budget_bytes(sensors.read(), held_bytes=held_bytes)
        return size_bytes, f"{format_size(size_bytes)}: {reason}"

    # ---- opening ----

    def _open_bank(self, options: SessionOptions) -> contextlib.ExitStack:
        """Everything that reads the bank's files."""
        with contextlib.ExitStack() as undo:
            budget = options.memory_budget
            self.bank = Bank.open(
                options.bank, memory_bytes=budget if isinstance(budget, int) else None
            )
            if options.trusted_key is not None:
                self._check_trusted(options.trusted_key)
            self.log = EventLog(Path(self.bank.path).name)
            self.runner = self._open_runner(options)
            self.store = Store(self.bank, direct=options.direct_io)
            undo.callback(self.store.close)
            splits = self.runner is not None and self.runner.splits
            self.graphs = Graphs(
                self.bank, self.store, self.threads, split=splits, settings=self._settings
            )
            undo.callback(self.graphs.close)
            self.publisher = Publisher(self.store)
            self.replanner = Replanner(
                self.bank,
                self.store,
                self.publisher,
                self.ledger,
                self.log,
                request=self.request,
                shares=None if self.runner is None else self.runner.shares,
                threads=self.threads,
                storage_bytes_s=self._storage_bytes_s(options),
                weight_budget_bytes=options.weight_budget,
            )
            return undo.pop_all()

    def _check_trusted(self, trusted_key: str | os.PathLike[str]) -> None:
        from .bank.signature import check_signature, load_key  # only such a session pays for it

        check_signature(self.bank, load_key(trusted_key))
        self.bank.check_digests()

    def _open_plans(
        self,
        options: SessionOptions,
        on_switch: Callable[[Event], None],
        undo: contextlib.ExitStack,
    ) -> None:
        replanner = self.replanner
        replanner.on_switch = on_switch
        undo.callback(replanner.close)
        self.passes = Passes(
            self.store,
            self.graphs,
            self.publisher,
            replanner,
            self.ledger,
            max_shapes=options.max_shapes,
        )
        budget_bytes, reason = self.budget_of(options.memory_budget)
        if reason is not None:
            replanner.record("budget", reason)
        self.monitor = None
        if options.controller is not None:
            self.monitor = self._make_monitor(budget_bytes)
            undo.callback(self.monitor.stop)
        envelope = None if self.monitor is None else self.monitor.envelope
        replanner.open(budget_bytes, envelope, self.passes.warm_up)
        replanner.record("open", f"kernels {kernels_name()}, {counted(self.threads, 'thread')}")
        undo.callback(replanner.record, "close", "closed")

    def _open_runner(self, options: SessionOptions) -> PolicyRunner | None:
        if not options.steered:
            return None
        from .adaptive.batches import BatchTaker  # only such a session pays for them
        from .adaptive.policies import open_policy
        from .adaptive.policy_runner import PolicyRunner

        policy = open_policy(
            self.bank,
            options.policy,
            target_agreement=options.target_agreement,
            bits=options.bits,
        )
        default = options.default_precision(self.bank.levels)
        return PolicyRunner(
            policy,
            default,
            lambda *event: self.replanner.record(*event),
            batches=BatchTaker(self.bank.manifest.batched),
            latency_s=options.latency_s,
        )

    def _storage_bytes_s(self, options: SessionOptions) -> float | None:
        """What the board's profile states."""
        return self._profile.read_mb_s(options.bank) * 1e6 if self._profile else None

    def _make_monitor(self, budget_bytes: int | None) -> Monitor:
        from .control.monitor import Monitor  # only such a session pays for them
        from .sensors import open_sensors

        return Monitor(
            open_sensors(),
            self._profile,
            levels=self.bank.levels,
            threads=self.threads,
            budget_bytes=budget_bytes,
            minimum_bytes=self.replanner.smallest_limit(),
            follow=self.replanner.follow,
        )
