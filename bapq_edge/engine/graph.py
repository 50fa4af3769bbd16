"""Assembles the ONNX Runtime session that runs a bank's graph with libbapq's operators."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any, Literal

from bapq_edge.bank.manifest import FileEntry
from bapq_edge.bank.reader import Bank
from bapq_edge.errors import (
    BankFormatError,
    ExecutionError,
    PlatformError,
    RequestError,
    RunInputError,
)

from .native import library_path

__all__ = ["RUN_INPUT", "Graphs", "Part", "open_graph"]

Part = Literal["whole", "head", "body"]

RUN_INPUT = "bapq.run"
"""Graph input that carries the ticket of a run (int64, no axes) to every operator of ours."""


def _import_onnxruntime() -> ModuleType | ImportError:
    # 1.31 reports its use over the network, from a database that it keeps on the board's storage,
    # with a thread of its own and 2 MiB. Who wants that sets the variable to 0.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        return importlib.import_module("onnxruntime")
    except ImportError as error:  # such as on a 32-bit system: whoever opens a session is told
        return error


# With the package, not with the first session: its code is no part of a model's memory budget.
_onnxruntime = _import_onnxruntime()


class Graphs:
    """ONNX Runtime's sessions of a bank: of its whole graph, or of the two halves of it."""

    def __init__(self, bank: Bank, threads: int, *, split: bool) -> None:
        """An operator runs on up to `threads` threads.

        Raises RequestError when the bank has no halves, and what `open_graph` raises.
        """
        manifest, self._path = bank.manifest, bank.path
        files: dict[Part, FileEntry] = {"whole": manifest.graph}
        if split and manifest.split is None:
            raise RequestError(
                f"{bank.path}: the policy looks between two halves of the graph, the bank has "
                "one whole: fit it with a tap"
            )
        if split and manifest.split is not None:
            files = {"head": manifest.split.head, "body": manifest.split.body}
        self.parts: tuple[Part, ...] = tuple(files)
        self._graphs = {
            part: open_graph(bank.file_bytes(file), threads) for part, file in files.items()
        }
        self._inputs = {part: graph.get_inputs() for part, graph in self._graphs.items()}
        self.outputs: list[Any] = list(self._graphs[self.parts[-1]].get_outputs())
        """as onnxruntime.NodeArg"""
        made = {value.name for part in self.parts[:-1] for value in self._outputs_of(part)}
        fed = {value.name: value for values in self._inputs.values() for value in values}
        if RUN_INPUT not in fed:
            raise BankFormatError(
                f"the bank's graph has no input {RUN_INPUT!r}: build the bank again"
            )
        self.inputs: list[Any] = [
            value for name, value in fed.items() if name not in made and name != RUN_INPUT
        ]
        """as onnxruntime.NodeArg, without our own"""

    def takes_ticket(self, part: Part) -> bool:
        """Whether operators of ours are in it."""
        return any(value.name == RUN_INPUT for value in self._inputs[part])

    def call(
        self,
        part: Part,
        names: Sequence[str] | None,
        feed: Mapping[str, Any],
        run_options: Any = None,
    ) -> dict[str, Any]:
        """Outputs of a part by name, all or those of `names`; of the feed it takes what it needs.

        Raises RunInputError or ExecutionError.
        """
        names = [value.name for value in self._outputs_of(part)] if names is None else list(names)
        own = {v.name: feed[v.name] for v in self._inputs[part] if v.name in feed}
        try:
            outputs = self._graphs[part].run(names, own, run_options)
        except Exception as error:  # ONNX Runtime raises classes of its own, without a common base
            reason = str(error).splitlines()[0]
            kind = RunInputError if _is_input_error(error) else ExecutionError
            raise kind(f"{self._path}: ONNX Runtime: {reason}") from error
        return dict(zip(names, outputs, strict=True))

    def close(self) -> None:
        """Let go of the memory."""
        self._graphs.clear()

    def _outputs_of(self, part: Part) -> list[Any]:
        return list(self._graphs[part].get_outputs())


def _is_input_error(error: Exception) -> bool:
    return type(error).__name__ == "InvalidArgument" or isinstance(error, ValueError | RuntimeError)


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
    # to run (docs/explanation/design.md).
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
    return session
