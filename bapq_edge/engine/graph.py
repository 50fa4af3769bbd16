"""Assembles the ONNX Runtime session that runs a bank's graph with libbapq's operators."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bapq_edge.errors import BankFormatError, PlatformError

from .native import library_path

if TYPE_CHECKING:
    import onnxruntime

__all__ = ["RUN_INPUT", "open_graph"]

RUN_INPUT = "bapq.run"
"""Graph input that carries the ticket of a run (int64, no axes) to every operator of ours."""


def open_graph(model: bytes, threads: int) -> onnxruntime.InferenceSession:
    """Session for the graph, with `threads` threads inside an operator and one operator at a time.

    Raises BankFormatError when ONNX Runtime refuses the graph.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise PlatformError(
            f"onnxruntime cannot be imported ({error}): install it with 'pip install onnxruntime'"
        ) from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Measured: the arena without memory patterns has the lowest peak, and it does not grow from run
    # to run (docs/design.md).
    options.enable_mem_pattern = False
    options.log_severity_level = 3
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
