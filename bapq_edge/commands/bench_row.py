"""One row of `bapq bench`: a process that opens a model and runs it whenever it is told to."""

from __future__ import annotations

import contextlib
import gc
import mmap
import multiprocessing
import signal
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from ..bank.graph_file import external_files
from ..bank.reader import Bank
from ..errors import BapqError, BapqWarning, ExecutionError, ModelFormatError, PlatformError
from ..telemetry import peak_rss_bytes, rss_bytes
from .feeds import FeedSource

__all__ = ["Row", "Subject"]

_RUN_ON_S = 1.0
"""Long enough for a meter of a few samples a second."""


@dataclass(frozen=True)
class Subject:
    """What a row measures: a bank, or a model in ONNX Runtime or LiteRT."""

    path: Path
    session: Mapping[str, Any] | None
    """What `Session` is opened with; None: the path is that of an .onnx or .tflite file"""
    threads: int | None
    input_path: Path | None
    shapes: Mapping[str, tuple[int, ...]]

    @property
    def name(self) -> str:
        """For the first column."""
        if self.session is None:
            return self.path.name
        budget = self.session["memory_budget"]
        return _precision(self.session) + ("" if budget is None else f" in {budget}")


def _precision(session: Mapping[str, Any]) -> str:
    level, bits = session.get("level"), session.get("bits")
    if level is not None:
        return "auto" if level == "auto" else f"level {level}"
    parts = [] if session["policy"] is None else [session["policy"]]
    if session["target_agreement"] is not None:
        parts.append(f"agreement {session['target_agreement']:g}")
    if bits is not None:
        parts.append(f"{bits:g} bits")
    return " ".join(parts)


class Row:
    """The parent's side of the process. Every method raises the BapqError that it failed with."""

    def __init__(self, subject: Subject, warn: Callable[[Warning], object]) -> None:
        """Start the process; it does nothing yet. `warn` is called with what it warns of."""
        self._warn = warn
        # A fresh interpreter: a fork would begin with this process's memory.
        context = multiprocessing.get_context("spawn")
        self._name = subject.name
        self._pipe, end = context.Pipe()
        self._process = context.Process(target=_serve, args=(end, subject), daemon=True)
        resource_tracker.ensure_running()  # `start` would, and take the mask away
        # Ctrl-C is for the parent, which hangs up; the mask is the child's from its first moment.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            self._process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        end.close()

    def open(self) -> float:
        """Open the model; how long it took, in milliseconds."""
        return float(self._ask("open"))

    def run(self) -> float:
        """Run it once; milliseconds."""
        return float(self._ask("run"))

    def run_on(self) -> int:
        """Run it again and again for a second; how often."""
        return int(self._ask("run_on"))

    def forget_reads(self) -> None:
        """Count the bytes that are read from here on."""
        self._ask("forget_reads")

    def report(self) -> dict[str, Any]:
        """Inputs, memory and precision after the runs so far."""
        report: dict[str, Any] = self._ask("report")
        return report

    def answers(self) -> dict[str, Any]:
        """Run it once more; the outputs by name. It comes last, as they count as memory."""
        outputs: dict[str, Any] = self._ask("answers")
        return outputs

    def _ask(self, question: str) -> Any:
        try:
            self._pipe.send(question)
            answer, warned = self._pipe.recv()
        except (EOFError, OSError):
            self._process.join()
            code = self._process.exitcode or 0
            reason = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            raise ExecutionError(
                f"{self._name}: its process ended with {reason}"
                + (": the system ran out of memory, most likely" if code == -9 else "")
            ) from None
        for warning in warned:
            self._warn(warning)
        if isinstance(answer, BapqError):
            raise answer
        return answer

    def close(self) -> None:
        """End the process."""
        self._pipe.close()
        self._process.join()


def _serve(pipe: Connection, subject: Subject) -> None:
    """The process's side: answer questions until the parent hangs up."""
    runner = _Runner(subject)
    with contextlib.suppress(EOFError, OSError), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", BapqWarning)
        while True:
            answer: Any
            try:
                question: Callable[[], Any] = getattr(runner, pipe.recv())
                answer = question()
            except BapqError as error:
                answer = error
            pipe.send((answer, [warning.message for warning in caught]))
            caught.clear()


class _Runner:
    def __init__(self, subject: Subject) -> None:
        self._subject = subject
        self._runs = 0
        self._read_before_bytes = 0
        self._session: Any = None

    def open(self) -> float:
        try:
            import onnxruntime  # noqa: F401  (a program that uses it has it in memory already)
        except ImportError as error:
            raise PlatformError(
                f"onnxruntime cannot be imported ({error}): install it with "
                "'pip install onnxruntime'"
            ) from error
        subject = self._subject
        source = FeedSource(subject.input_path, subject.shapes)
        gc.collect()
        self._before_bytes = rss_bytes()
        started_s = time.perf_counter()
        self._session = _open_model(subject) if subject.session is None else _open_bank(subject)
        load_ms = (time.perf_counter() - started_s) * 1e3
        self._inputs = self._session.get_inputs()
        self._feed = source.feed(self._inputs)
        self._explained = source.explained
        return load_ms

    def run(self) -> float:
        started_s = time.perf_counter()
        self._run()
        self._runs += 1
        return (time.perf_counter() - started_s) * 1e3

    def _run(self) -> list[Any]:
        with self._explained(self._inputs):
            try:
                outputs: list[Any] = self._session.run(None, self._feed)
            except BapqError:
                raise
            except Exception as error:  # ONNX Runtime raises classes without a common base
                reason = str(error).splitlines()[0]
                raise ExecutionError(f"{self._subject.name}: ONNX Runtime: {reason}") from None
        return outputs

    def answers(self) -> dict[str, Any]:
        names = [value.name for value in self._session.get_outputs()]
        return dict(zip(names, self._run(), strict=True))

    def run_on(self) -> int:
        runs, end_s = 0, time.perf_counter() + _RUN_ON_S
        while time.perf_counter() < end_s:
            self.run()
            runs += 1
        return runs

    def forget_reads(self) -> None:
        self._runs = 0
        if self._subject.session is not None:
            self._read_before_bytes = self._session.stats().streamed_bytes

    def report(self) -> dict[str, Any]:
        growth_bytes = peak_rss_bytes() - self._before_bytes
        report = {
            "input_shapes": {name: list(np.shape(value)) for name, value in self._feed.items()},
            "zeros": self._subject.input_path is None,
            "peak_growth_bytes": growth_bytes,
        }
        if self._subject.session is None:
            return {**report, "weight_bytes": _model_bytes(self._subject.path)}
        stats = self._session.stats()
        graph_bytes = Bank.open(self._subject.path).manifest.graph.bytes
        return {
            **report,
            "weight_bytes": stats.resident_bytes + graph_bytes,
            "streamed_bytes_per_run": (stats.streamed_bytes - self._read_before_bytes) / self._runs,
            "bits_per_weight": stats.bits_per_weight,
        }


def _model_bytes(path: Path) -> int:
    """Bytes of a model's file, and of those that it keeps tensors in."""
    if path.suffix == ".tflite":
        return path.stat().st_size
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as data:
        others = external_files(data)
    return sum(each.stat().st_size for each in (path, *(path.parent / name for name in others)))


def _open_bank(subject: Subject) -> Any:
    from ..session import Session

    assert subject.session is not None
    return Session(subject.path, **subject.session)


def _open_model(subject: Subject) -> Any:
    if subject.path.suffix == ".tflite":
        from .litert import LiteRTModel

        return LiteRTModel(subject.path, subject.threads)
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what fails is raised, not logged as well
    if subject.threads is not None:
        options.intra_op_num_threads = subject.threads
    try:
        return onnxruntime.InferenceSession(
            str(subject.path), options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # ONNX Runtime raises classes of its own, without a common base
        reason = str(error).splitlines()[0]
        raise ModelFormatError(f"{subject.path}: ONNX Runtime refuses it: {reason}") from None
