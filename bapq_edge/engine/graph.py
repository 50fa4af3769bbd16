"""ONNX Runtime's sessions of a bank's graphs, with libbapq's operators in them."""

from __future__ import annotations

import ctypes
import functools
import importlib
import os
import weakref
from collections.abc import Mapping, Sequence
from types import MappingProxyType, ModuleType
from typing import Any, Literal

from ..bank.manifest import FileEntry
from ..bank.reader import Bank
from ..errors import (
    BankFormatError,
    ExecutionError,
    PlatformError,
    RequestError,
    RunInputError,
)
from .code_pages import release_code
from .feeds import in_native_order
from .library import library_path
from .store import Store

__all__ = [
    "RUN_INPUT",
    "Graph",
    "Graphs",
    "Part",
    "check_run_options",
    "import_onnxruntime",
    "open_graph",
]

Part = Literal["whole", "head", "body"]
"""The whole graph, or one of the two halves that a gate looks between."""

RUN_INPUT = "bapq.run"
"""Graph input that carries the ticket of a run (int64, no axes) to every operator of ours."""


def _imported() -> ModuleType | ImportError:
    # 1.31 reports its use over the network, from a database that it keeps on the board's storage,
    # with a thread of its own and 2 MiB. Who wants that sets the variable to 0.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        return importlib.import_module("onnxruntime")
    except ImportError as error:  # such as on a 32-bit system: whoever opens a session is told
        return error


# With the package, not with the first session: its code is no part of a model's memory budget.
_onnxruntime = _imported()


def import_onnxruntime() -> ModuleType:
    """The module. Raises PlatformError when it is not there."""
    if isinstance(_onnxruntime, ImportError):
        raise PlatformError(
            f"onnxruntime cannot be imported ({_onnxruntime}): "
            "install it with 'pip install onnxruntime'"
        ) from _onnxruntime
    return _onnxruntime


_open_sessions: weakref.WeakSet[Any] = weakref.WeakSet()


def _leave_to_parent() -> None:
    """In a forked process: never destroy an onnxruntime.InferenceSession of the one before.

    It would wait for its threads, which are not here, as late as at the end of the process.
    """
    for session in _open_sessions:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(session))


os.register_at_fork(after_in_child=_leave_to_parent)


class Graph:
    """One graph of a bank, open in ONNX Runtime. Safe to use from several threads."""

    def __init__(self, session: Any, where: str) -> None:
        """Take an onnxruntime.InferenceSession; `where`, the bank's path, begins its errors."""
        self.session = session
        """ONNX Runtime's own, for what only it can tell."""
        self._where = where
        inputs = list(session.get_inputs())
        self.inputs: list[Any] = [value for value in inputs if value.name != RUN_INPUT]
        """The graph's inputs but the ticket, as onnxruntime.NodeArg."""
        self.outputs: list[Any] = list(session.get_outputs())
        """The graph's outputs, as onnxruntime.NodeArg."""
        self.takes_ticket = len(self.inputs) < len(inputs)
        """Whether operators of ours are in the graph."""
        self._input_names = [value.name for value in inputs]
        self._output_names = [value.name for value in self.outputs]

    def call(
        self, names: Sequence[str] | None, feed: Mapping[str, Any], run_options: Any = None
    ) -> dict[str, Any]:
        """Run the graph once; its outputs by name, all or those of `names`.

        The feed may hold more than the graph takes. Raises RunInputError or ExecutionError.
        """
        names = self._output_names if names is None else list(names)
        own = {name: in_native_order(feed[name]) for name in self._input_names if name in feed}
        try:
            outputs = self.session.run(names, own, run_options)
        except Exception as error:  # ONNX Runtime raises classes of its own, without a common base
            kind = RunInputError if _is_input_error(error) else ExecutionError
            raise kind(f"{self._where}: ONNX Runtime: {_one_line(error)}") from error
        return dict(zip(names, outputs, strict=True))


class Graphs:
    """The graphs that a session of a bank runs: the whole one, or the two halves of it."""

    def __init__(
        self,
        bank: Bank,
        store: Store,
        threads: int,
        *,
        split: bool,
        settings: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        """Open them on the weights of a store; an operator runs on up to `threads` threads.

        `settings`: see `open_graph`.

        Raises RequestError when the bank has no halves, and what `open_graph` raises.
        """
        manifest = bank.manifest
        files: dict[Part, FileEntry] = {"whole": manifest.graph}
        if split and manifest.split is None:
            raise RequestError(
                f"{bank.path}: the policy looks between two halves of the graph, the bank has "
                "one whole: fit it with a tap"
            )
        if split and manifest.split is not None:
            files = {"head": manifest.split.head, "body": manifest.split.body}
        self._graphs = {
            part: Graph(
                open_graph(bank.graph_bytes(file), store, threads, settings), str(bank.path)
            )
            for part, file in files.items()
        }
        self.parts: tuple[Part, ...] = tuple(files)
        """The parts in the order in which they run."""
        if not any(graph.takes_ticket for graph in self._graphs.values()):
            raise BankFormatError(
                f"the bank's graph has no input {RUN_INPUT!r}: build the bank again"
            )
        made = {value.name for part in self.parts[:-1] for value in self._graphs[part].outputs}
        fed = {value.name: value for graph in self._graphs.values() for value in graph.inputs}
        self.inputs: list[Any] = [value for name, value in fed.items() if name not in made]
        """What a run is fed with, as onnxruntime.NodeArg."""
        self.outputs: list[Any] = self._graphs[self.parts[-1]].outputs
        """What a run gives, as onnxruntime.NodeArg."""
        self.input_names = frozenset(value.name for value in self.inputs)
        self.output_names = tuple(value.name for value in self.outputs)

    def __getitem__(self, part: Part) -> Graph:
        """The graph of that part."""
        return self._graphs[part]

    def close(self) -> None:
        """Let go of the memory."""
        self._graphs.clear()


def open_graph(
    model: bytes, store: Store, threads: int, settings: Mapping[str, Any] = MappingProxyType({})
) -> Any:
    """Make the onnxruntime.InferenceSession of a bank's graph, which is all of `model`.

    Its operators read the weights of `store`, and of no other. An operator runs on up to `threads`
    threads, and one operator runs at a time. `settings` are attributes of
    onnxruntime.SessionOptions; names with a dot are configuration entries. Raises BankFormatError
    when ONNX Runtime refuses the graph, PlatformError when it is not there.
    """
    onnxruntime = import_onnxruntime()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Measured (docs/decisions/0014-arena.md): tensors take least in the arena that our library
    # offers, next in ONNX Runtime's own without memory patterns.
    options.add_session_config_entry("session.use_env_allocators", "1")
    options.enable_mem_pattern = False
    options.log_severity_level = 4  # what fails is raised, with its own words, not logged as well
    # Idle threads that spin would take the core that a prefetch thread or another program needs.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    for name, value in settings.items():
        if "." in name:
            options.add_session_config_entry(name, value)
        else:
            setattr(options, name, value)
    # Else four bytes inside would make it a file of another format, which nobody has checked.
    options.add_session_config_entry("session.load_model_format", "ONNX")
    options.register_custom_ops_library(str(library_path()))
    library = onnxruntime.capi.onnxruntime_pybind11_state.__file__
    release_code(library)  # the importing of it is over
    try:
        with store.owning_operators():
            session = _session_class(onnxruntime)(
                model, sess_options=options, providers=["CPUExecutionProvider"]
            )
    except Exception as error:  # ONNX Runtime raises classes of its own, without a common base
        raise BankFormatError(
            f"ONNX Runtime refuses the bank's graph: {_one_line(error)}"
        ) from error
    finally:
        release_code(library)  # the loading, too: a run touches a third of it
    _open_sessions.add(session)
    return session


@functools.cache
def _session_class(onnxruntime: ModuleType) -> Any:
    """The onnxruntime.InferenceSession without its second attempt.

    That is for other processors, and it prints a banner of several lines.
    """
    attempts_once = property(lambda session: False, lambda session, value: None)
    own = {"_enable_fallback": attempts_once}
    return type("InferenceSession", (onnxruntime.InferenceSession,), own)


def check_run_options(run_options: Any) -> None:
    """Raise RequestError for what is neither an onnxruntime.RunOptions nor None."""
    if run_options is None or isinstance(_onnxruntime, ImportError):
        return
    if not isinstance(run_options, _onnxruntime.RunOptions):
        raise RequestError(
            f"run_options is of type {type(run_options).__name__}: give an "
            "onnxruntime.RunOptions, or None"
        )


def _is_input_error(error: Exception) -> bool:
    return type(error).__name__ == "InvalidArgument" or isinstance(error, ValueError | RuntimeError)


def _one_line(error: Exception) -> str:
    """All that ONNX Runtime says; which axis of a shape is wrong stands in its second line."""
    return " ".join(str(error).split())
