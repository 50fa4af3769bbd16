"""The runs of a session that it must end before it closes: those in flight, and those queued."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from .errors import ForkedSessionError, RequestError, SessionClosedError

__all__ = ["RunQueue", "RunsInFlight"]

T = TypeVar("T")


class RunsInFlight:
    """Counts runs, with itself as the context of each, until it is closed.

    Safe to use from several threads.
    """

    def __init__(self, bank: str) -> None:
        """No run has begun yet; the bank's path is for messages."""
        self._bank = bank
        self._process = os.getpid()
        self._threads: list[int] = []  # of every run in flight
        self._closed = False
        self._lock = threading.Lock()
        self._idle = threading.Condition(self._lock)

    def __enter__(self) -> int:
        """Begin a run; how many are in flight now.

        Raises SessionClosedError or ForkedSessionError.
        """
        self.check_open()  # before the lock, too: a fork may have left it held
        with self._lock:
            self.check_open()
            self._threads.append(threading.get_ident())
            return len(self._threads)

    def __exit__(self, *raised: object) -> None:
        """End the run."""
        with self._lock:
            self._threads.remove(threading.get_ident())
            if self._closed:
                self._idle.notify_all()

    @property
    def is_closed(self) -> bool:
        """Whether no run begins any more."""
        return self._closed

    @property
    def is_forked(self) -> bool:
        """Whether this process is not the one that opened the session: it has no thread of it."""
        return os.getpid() != self._process

    def check_open(self) -> None:
        """Raise SessionClosedError once it is closed, ForkedSessionError in a forked process."""
        if self.is_forked:
            raise ForkedSessionError(
                f"the session of {self._bank} was opened in process {self._process}, and its "
                f"threads are there; this is process {os.getpid()}: open a session after the fork"
            )
        if self._closed:
            raise SessionClosedError(f"the session of {self._bank} is closed: open a new one")

    def check_may_close(self) -> None:
        """Raise RequestError on a thread that is in a run: it would wait for itself."""
        with self._lock:
            if threading.get_ident() in self._threads:
                raise RequestError(
                    "a run cannot close its own session, which waits for it: close it after the run"
                )

    def close(self) -> None:
        """Let no run begin from now on."""
        with self._lock:
            self._closed = True

    def wait(self) -> None:
        """Wait until no run is in flight."""
        with self._lock:
            self._idle.wait_for(lambda: not self._threads)


class RunQueue:
    """Makes runs one after the other, on a thread that starts with the first of them."""

    def __init__(self) -> None:
        """There is no thread yet."""
        self._pool: ThreadPoolExecutor | None = None
        self._futures: set[Future[Any]] = set()  # which are not done

    def submit(self, run: Callable[..., T], *arguments: object) -> Future[T]:
        """Queue a run. Only one thread at a time may call this, and none after `close`."""
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="bapq-run")
        future = self._pool.submit(run, *arguments)
        self._futures.add(future)
        future.add_done_callback(self._futures.discard)
        return future

    def close(self) -> None:
        """Cancel the runs that have not begun; the thread ends with the one that has.

        Nobody waits for the thread: it may be the one that calls this, in a future's callback.
        """
        for future in list(self._futures):
            future.cancel()  # the pool would do it under its lock, where a callback cannot close
        if self._pool is not None:
            self._pool.shutdown(wait=False)
