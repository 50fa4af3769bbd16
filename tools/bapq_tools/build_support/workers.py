"""Spreads independent work over processes of this machine, or over a Dask cluster."""

from __future__ import annotations

import collections
import contextlib
import functools
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import joblib
from joblib.externals.loky import get_reusable_executor
from joblib.externals.loky.process_executor import BrokenProcessPool
from threadpoolctl import threadpool_limits

from bapq_edge import __version__
from bapq_edge.bank.staging import storage_errors
from bapq_edge.errors import BapqError, ClusterError, MissingExtraError, WorkerError

__all__ = ["Workers"]

T = TypeVar("T")

_WORTH_PROCESSES_S = 0.3
"""Work below which starting processes and moving data costs more than it saves."""

_ANSWER_S = 10
"""How long a Dask scheduler, and its first worker, may take to answer."""


class Workers:
    """Context manager of processes; `map` calls a function on many arguments, results in order.

    BLAS has one thread everywhere, so that a result does not depend on where it is computed.
    """

    def __init__(self, count: int, dask: str | None = None, folder: Path | None = None) -> None:
        """`folder` is where large arrays lie while processes share them."""
        self.count = max(1, count)
        self._dask = dask
        self._folder = folder
        self._client: Any = None
        self._has_processes = False
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Workers:
        """Raises ClusterError when the Dask cluster cannot be used, MissingExtraError."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(threadpool_limits(1))
            if self._dask is not None:
                self._client = stack.enter_context(_dask_client(self._dask))
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def map(
        self, function: Callable[..., T], arguments: Sequence[tuple[Any, ...]], guess_s: float
    ) -> Iterator[T]:
        """The results, in the order of the arguments; `guess_s` is a guess of the time on one core.

        Raises ClusterError or WorkerError when a worker is lost, StorageError.
        """
        here = min(self.count, len(arguments)) == 1 and self._client is None
        if here or guess_s < _WORTH_PROCESSES_S:
            yield from (function(*each) for each in arguments)
        elif self._client is not None:
            yield from self._on_cluster(function, arguments)
        else:
            yield from self._in_processes(function, arguments)

    def _in_processes(
        self, function: Callable[..., T], arguments: Sequence[tuple[Any, ...]]
    ) -> Iterator[T]:
        if self._folder is None:
            raise ValueError("processes need a folder to share arrays in")
        if not self._has_processes:
            self._has_processes = True
            self._stack.callback(_end_processes)
            # loky ends a worker that has grown, and starts another one: nothing is lost.
            warnings.filterwarnings("ignore", "A worker stopped while some jobs", UserWarning)
        jobs = (joblib.delayed(_in_own_process)(function, *each) for each in arguments)
        parallel = joblib.Parallel(
            self.count, return_as="generator", temp_folder=self._folder, backend="loky"
        )
        try:
            with storage_errors(self._folder):
                yield from parallel(jobs)
        except BrokenProcessPool as error:
            raise WorkerError(
                f"one of {self.count} worker processes was killed, most often for lack of memory; "
                "build again with fewer --workers: finished layers are kept"
            ) from error

    def _on_cluster(
        self, function: Callable[..., T], arguments: Sequence[tuple[Any, ...]]
    ) -> Iterator[T]:
        client = self._client
        waiting: collections.deque[Any] = collections.deque()
        with _cluster_errors(self._dask):
            # Two tasks per core: one to compute, one to arrive meanwhile.
            most = 2 * sum(client.ncores().values())
            for each in arguments:
                if len(waiting) == most:
                    yield waiting.popleft().result()
                # Large arguments go to a worker ahead of their task: tasks pass the scheduler.
                held = client.scatter(each, hash=False)
                waiting.append(client.submit(_with_one_thread, function, *held, pure=False))
            while waiting:
                yield waiting.popleft().result()


def _in_own_process(function: Callable[..., T], *arguments: Any) -> T:
    _end_with_parent()
    return _with_one_thread(function, *arguments)


@functools.cache
def _end_with_parent() -> None:
    """Have this process end soon after the build is killed: joblib's would wait for minutes."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _with_one_thread(function: Callable[..., T], *arguments: Any) -> T:
    with threadpool_limits(1):
        return function(*arguments)


def _end_processes() -> None:
    """End joblib's processes, which would otherwise wait for more work for five minutes."""
    get_reusable_executor().shutdown(wait=True)


@contextlib.contextmanager
def _dask_client(address: str) -> Iterator[Any]:
    try:
        from distributed import Client
    except ImportError:
        raise MissingExtraError(
            "package distributed is not installed; install it with: pip install 'bapq-edge[dask]'"
        ) from None
    with _cluster_errors(address, ValueError):
        client = Client(address, timeout=_ANSWER_S, set_as_default=False)
    with client:
        with _cluster_errors(address, ModuleNotFoundError):
            client.wait_for_workers(1, timeout=_ANSWER_S)
            versions = client.run(_version)
        for worker, version in versions.items():
            if version != __version__:
                raise ClusterError(
                    f"worker {worker} has bapq-edge {version}, this machine {__version__}: install "
                    "the same there, or build without --dask"
                )
        yield client


def _version() -> str:
    return __version__


@contextlib.contextmanager
def _cluster_errors(address: str | None, *others: type[Exception]) -> Iterator[None]:
    """Turn what the cluster itself, not the work, raises into a ClusterError."""
    from distributed import CancelledError, KilledWorker

    step = "check the cluster, or build without --dask: finished layers are kept"
    try:
        yield
    except BapqError:  # some of which are OSErrors too
        raise
    except (OSError, CancelledError, KilledWorker, *others) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ClusterError(f"the Dask cluster at {address} failed: {reason}; {step}") from error
