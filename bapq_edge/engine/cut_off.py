"""A pass that ends when its time is up: ONNX Runtime stops before its next node."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Any

from ..errors import ExecutionError, RunInputError
from .graph import import_onnxruntime

__all__ = ["TimeIsUpError", "cut_off"]


class TimeIsUpError(Exception):
    """The pass was ended before it had an answer; no caller of the package ever sees it."""


@contextlib.contextmanager
def cut_off(run_options: Any, until_s: float | None) -> Iterator[Any]:
    """Run options for a pass that ends at `until_s` of time.perf_counter(); None: when it is done.

    They are those of the caller, if there are any, and are given back as they were. Raises
    TimeIsUpError where the pass was ended.
    """
    if until_s is None:
        yield run_options
        return
    options = import_onnxruntime().RunOptions() if run_options is None else run_options
    is_up = threading.Event()

    def end() -> None:
        is_up.set()
        options.terminate = True

    timer = threading.Timer(max(until_s - time.perf_counter(), 0.0), end)
    timer.daemon = True
    timer.start()
    try:
        yield options
    except (ExecutionError, RunInputError):  # ONNX Runtime has no class of its own for it
        if not is_up.is_set():
            raise
        raise TimeIsUpError from None
    finally:
        timer.cancel()
        timer.join()
        if is_up.is_set():
            options.terminate = False
