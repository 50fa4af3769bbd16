"""`bapq run`: one run on inputs from a file."""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import StorageError
from ..session import Session
from ..units import format_size
from .feeds import load_feed

__all__ = ["add_precision", "add_run"]


def add_run(commands: Any) -> None:
    """Add `run`."""
    run = commands.add_parser("run", help="run a bank on inputs from a file")
    run.add_argument("bank", type=Path)
    run.add_argument("--input", required=True, type=Path, help=".npz, one array per model input")
    run.add_argument("--output", type=Path, help=".npz to write, one array per model output")
    run.add_argument(
        "--budget", metavar="SIZE", help="what the process may grow by, such as 64MiB, or auto"
    )
    add_precision(run)
    run.add_argument("--policy", choices=("static", "gate", "escalate"), help="who chooses bits")
    run.add_argument(
        "--target-agreement",
        type=float,
        metavar="A",
        help="share of inputs, 0 to 1, to be answered as the float model does",
    )
    run.add_argument("--threads", type=int)
    run.add_argument("--json", action="store_true", help="print the report as JSON")
    run.set_defaults(command=_run)


def _run(arguments: argparse.Namespace) -> None:
    feed = load_feed(arguments.input)
    started_s = time.perf_counter()
    with Session(
        arguments.bank,
        memory_budget=arguments.budget,
        level=arguments.level,
        bits=arguments.bits,
        policy=arguments.policy,
        target_agreement=arguments.target_agreement,
        threads=arguments.threads,
    ) as session:
        load_s = time.perf_counter() - started_s
        started_s = time.perf_counter()
        outputs = session.run(None, feed)
        run_s = time.perf_counter() - started_s
        names = [value.name for value in session.get_outputs()]
        stats = session.stats()
    if arguments.output:
        try:
            np.savez(arguments.output, **dict(zip(names, outputs, strict=True)))
        except OSError as error:
            raise StorageError(f"{arguments.output} cannot be written: {error}") from error
    report = {"load_ms": load_s * 1e3, "run_ms": run_s * 1e3, **dataclasses.asdict(stats)}
    if arguments.json:
        print(json.dumps(report))
        return
    precision = f"{stats.bits_per_weight:.2f} bits per weight"
    print(f"load {load_s * 1e3:.1f} ms, run {run_s * 1e3:.1f} ms at {precision}")
    print(
        f"weights in memory {format_size(stats.resident_bytes)}, "
        f"read {format_size(stats.streamed_bytes)}, "
        f"process grew by {format_size(stats.peak_bytes)} at its peak"
    )
    if stats.region is not None:
        again = ", answered again" if stats.escalated else ""
        print(f"region {stats.region} of the boundary model{again}")
    for name, value in zip(names, outputs, strict=True):
        array = np.asarray(value)
        print(f"{name}: {array.dtype} {list(array.shape)}")


def add_precision(command: Any) -> None:
    """The options --level and --bits."""
    precision = command.add_mutually_exclusive_group()
    precision.add_argument("--level", default="auto", help="auto, 32, 8, 4, 2 or 1 (default: auto)")
    precision.add_argument("--bits", type=float, help="bits per weight on average, such as 3.5")
