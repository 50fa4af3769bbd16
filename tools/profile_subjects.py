"""What profile_memory.py and profile_energy.py profile, and the one table that both write.

A subject is a command, a Python callable, a bank, or a model in ONNX Runtime or LiteRT; each runs
in a process of its own.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import io
import json
import multiprocessing
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bapq_edge.array_files import read_arrays
from bapq_edge.commands.feeds import FeedSource
from bapq_edge.errors import BapqError, MissingExtraError, RequestError, StorageError
from bapq_edge.input_files import check_input_file

__all__ = ["Subject", "in_own_process", "parser_for", "ready", "run_script", "subjects_of"]

KINDS = ("command", "callable", "bank", "onnx", "litert")


@dataclass(frozen=True)
class Subject:
    """One row of the table."""

    name: str
    kind: str
    what: str
    input_path: Path | None
    threads: int | None

    @property
    def command(self) -> list[str]:
        """The words of a command."""
        return shlex.split(self.what)


def parser_for(description: str | None) -> argparse.ArgumentParser:
    """Options of both scripts."""
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=style)
    helps = {
        "command": "a command line, in quotes",
        "callable": "module:function, a function without arguments",
        "bank": "a bank; with @LEVEL at a level",
        "onnx": "a model in ONNX Runtime",
        "litert": "a .tflite model in LiteRT",
    }
    for kind in KINDS:
        parser.add_argument(
            f"--{kind}", action="append", default=[], metavar="[NAME=]X", help=helps[kind]
        )
    parser.add_argument("--input", type=Path, help=".npz for banks and models (default: zeros)")
    parser.add_argument("--threads", type=int, metavar="N", help="threads of banks and models")
    parser.add_argument(
        "-r", "--runs", type=int, default=10, metavar="N", help="runs of each (default: 10)"
    )
    parser.add_argument(
        "-o", "--output", type=Path, help="file for the table: .md, .csv or .json (default: stdout)"
    )
    return parser


def subjects_of(arguments: argparse.Namespace) -> list[Subject]:
    """What was asked for, commands first. Raises RequestError or InputFileError."""
    if arguments.runs < 1:
        raise RequestError(f"--runs is {arguments.runs}, it must be at least 1")
    suffix = None if arguments.output is None else arguments.output.suffix
    if suffix not in (None, ".md", ".csv", ".json"):
        raise RequestError(f"--output {arguments.output} must end in .md, .csv or .json")
    if arguments.input is not None:
        check_input_file(arguments.input)
    found = []
    for kind in KINDS:
        for text in getattr(arguments, kind):
            name, equals, what = text.partition("=")
            if not equals or not name.replace("_", "").replace("-", "").replace(" ", "").isalnum():
                name, what = Path(text).name if kind not in ("command", "callable") else text, text
            if kind in ("onnx", "litert"):
                check_input_file(what)
            found.append(Subject(name, kind, what, arguments.input, arguments.threads))
    if not found:
        raise RequestError(f"nothing to profile: give one of --{', --'.join(KINDS)}")
    return found


def ready(subject: Subject) -> Callable[[], object]:
    """Load what a subject other than a command needs; a function that runs it once."""
    if subject.kind == "callable":
        module, _, name = subject.what.partition(":")
        sys.path.insert(0, os.getcwd())
        try:
            function: Any = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError, ValueError) as error:
            raise RequestError(
                f"{subject.what!r} cannot be found ({error}): write module:function"
            ) from error
        return function
    if subject.kind == "litert":
        return _ready_litert(subject)
    source = FeedSource(subject.input_path)
    session: Any
    if subject.kind == "bank":
        from bapq_edge import Session

        path, _, level = subject.what.partition("@")
        session = Session(path, level=level or "auto", threads=subject.threads)
    else:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        if subject.threads is not None:
            options.intra_op_num_threads = subject.threads
        session = onnxruntime.InferenceSession(
            subject.what, options, providers=["CPUExecutionProvider"]
        )
    feed = source.feed(session.get_inputs())
    return lambda: session.run(None, feed)


def _ready_litert(subject: Subject) -> Callable[[], object]:
    for name in ("ai_edge_litert.interpreter", "tflite_runtime.interpreter"):
        try:
            interpreter = importlib.import_module(name).Interpreter(
                subject.what, num_threads=subject.threads
            )
            break
        except ImportError:
            continue
    else:
        raise MissingExtraError(
            "LiteRT is not installed: install it with 'pip install ai-edge-litert'"
        )
    interpreter.allocate_tensors()
    arrays = {} if subject.input_path is None else read_arrays(subject.input_path)
    for value in interpreter.get_input_details():
        array = arrays.get(value["name"]) if isinstance(arrays, dict) else arrays
        if array is not None:
            interpreter.set_tensor(value["index"], array)
    return interpreter.invoke


def in_own_process(work: Callable[..., Any], *arguments: Any) -> Any:
    """What `work` returns in a fresh interpreter, whose memory is its own."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(work, *arguments).result()


def run_script(
    parser: argparse.ArgumentParser,
    measure: Callable[[list[Subject], int], Sequence[Mapping[str, Any]]],
) -> int:
    """Parse, measure and write the table; an error is one line. The exit code."""
    arguments = parser.parse_args()
    try:
        rows = measure(subjects_of(arguments), arguments.runs)
        style = "md" if arguments.output is None else arguments.output.suffix[1:]
        text = _table(rows, style)
        if arguments.output is None:
            print(text, end="")
        else:
            try:
                arguments.output.write_text(text, encoding="utf-8")
            except OSError as error:
                reason = error.strerror
                raise StorageError(f"{arguments.output} cannot be written: {reason}") from error
    except BapqError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _table(rows: Sequence[Mapping[str, Any]], style: str) -> str:
    if style == "json":
        return json.dumps(list(rows), indent=1) + "\n"
    if style == "csv":
        text = io.StringIO()
        writer = csv.DictWriter(text, [*rows[0]], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()
    lines = [[*rows[0]], ["---"] * len(rows[0])]
    lines += [[_cell(value) for value in row.values()] for row in rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)
