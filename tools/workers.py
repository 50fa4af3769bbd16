"""Spreads independent work over processes of this machine, or over a Dask cluster."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import joblib
from threadpoolctl import threadpool_limits

from bapq_edge.errors import ClusterError, MissingExtraError

__all__ = ["Workers"]

T = TypeVar("T")

_WORTH_A_PROCESS = 1 << 32
"""Multiplications below which starting processes and moving data costs more than it saves."""


class Workers:
    """Context manager; `map` calls a function on many arguments, results in order.

    BLAS has one thread everywhere, so that a result does not depend on where it is computed.
    """

    def __init__(self, count: int, dask: str | None = None, folder: Path | None = None) -> None:
        self.count = max(1, count)
        self._dask = dask
        self._folder = folder
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Workers:
        """Raises ClusterError when the Dask scheduler cannot be reached."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(threadpool_limits(1))
            if self._dask is not None:
                client = stack.enter_context(_dask_client(self._dask))
                stack.enter_context(joblib.parallel_config("dask", client=client))
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
        self, function: Callable[..., T], arguments: Sequence[tuple[Any, ...]], work: float
    ) -> Iterator[T]:
        """Results in order of the arguments; `work` is about how many multiplications it takes."""
        if self._dask is None and (
            self.count == 1 or len(arguments) == 1 or work < _WORTH_A_PROCESS
        ):
            yield from (function(*each) for each in arguments)
            return
        jobs = (joblib.delayed(_with_one_thread)(function, *each) for each in arguments)
        count = -1 if self._dask is not None else min(self.count, len(arguments))
        yield from joblib.Parallel(n_jobs=count, temp_folder=self._folder)(jobs)


def _with_one_thread(function: Callable[..., T], *arguments: Any) -> T:
    with threadpool_limits(1):
        return function(*arguments)


@contextlib.contextmanager
def _dask_client(address: str) -> Iterator[Any]:
    try:
        from distributed import Client
    except ImportError:
        raise MissingExtraError(
            "package distributed is not installed; install it with: pip install 'bapq-edge[dask]'"
        ) from None
    try:
        client = Client(address, timeout=10)
    except (OSError, ValueError) as error:
        raise ClusterError(
            f"the Dask scheduler at {address!r} does not answer: {error}; check the address, or "
            "build without --dask"
        ) from error
    with client:
        yield client
