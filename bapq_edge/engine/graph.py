"""Assembles the ONNX Runtime session that runs a bank's graph with libbapq's operators."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

from bapq_edge.errors import BankFormatError, PlatformError

from .native import library_path

__all__ = ["RUN_INPUT", "open_graph"]

RUN_INPUT = "bapq.run"
"""Graph input that carries the ticket of a run (int64, no axes) to every operator of ours."""


def _import_onnxruntime() -> ModuleType | ImportError:
    try:
        return importlib.import_module("onnxruntime")
    except ImportError as error:  # such as on a 32-bit system: whoever opens a session is told
        return error


# With the package, not with the first session: its code is no part of a model's memory budget.
_onnxruntime = _import_onnxruntime()


def open_graph(model: bytes, threads: int) -> Any:
    """Make the onnxruntime.InferenceSession of a bank's graph, which is all of `model`.

    An operator runs on up to `threads` threads, and one operator runs at a time. Raises
    BankFormatError when ONNX Runtime refuses the graph, PlatformError when it is not there.
    """
    onnxruntime = _onnxruntime
    if isinstance(onnxruntime, ImportError):
        raise PlatformError(
            f"onnxruntime cannot be imported ({onnxruntime}): "
            "install it with 'pip install onnxruntime'"
        ) from onnxruntime
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Measured: the arena without memory patterns has the lowest peak, and it does not grow from run
    # to run (docs/design.md).
    options.enable_mem_pattern = False
    options.log_severity_level = 4  # what fails is raised, with its own words, not logged as well
    # Idle threads that spin would take the core that a prefetch thread or another program needs.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.register_custom_ops_library(str(library_path()))
    try:
        session = onnxruntime.InferenceSession(
            model, sess_options=options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # ONNX Runtime raises classes of its own, without a common base
        reason = str(error).splitlines()[0]
        raise BankFormatError(f"ONNX Runtime refuses the bank's graph: {reason}") from error
    if RUN_INPUT not in (value.name for value in session.get_inputs()):
        raise BankFormatError(f"the bank's graph has no input {RUN_INPUT!r}: build the bank again")
    return session
