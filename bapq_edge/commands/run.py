"""`bapq run`: answer inputs from a file."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import RequestError, StorageError
from ..profiling import EnergyPerRun, Meter
from ..session import Session
from ..telemetry import SessionStats
from ..units import counted, format_size
from .energy import add_energy, as_json, chosen_profile, energy_of, estimate_of
from .feeds import FeedSource, add_input
from .options import add_bank, add_json, add_precision, add_session, session_options
from .paths import check_output

__all__ = ["add_run"]


def add_run(commands: Any) -> None:
    """Add `run`."""
    run = commands.add_parser("run", help="run a bank on inputs from a file")
    add_bank(run)
    add_input(run)
    run.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="FILE",
        help=".npz to write, an array per model output, or .npy where there is one output",
    )
    run.add_argument(
        "--repeat",
        type=int,
        default=1,
        metavar="N",
        help="run N times, and tell the first, cold run from the others, and with a power meter "
        "the energy of these (default: 1)",
    )
    run.add_argument(
        "--deadline-ms",
        type=float,
        metavar="MS",
        help="with a policy that answers again: give up a second answer at this time of a run",
    )
    add_precision(run)
    add_session(run)
    add_energy(run)
    add_json(run, "the report")
    run.set_defaults(command=_run)


def _run(arguments: argparse.Namespace) -> None:
    if arguments.repeat < 1:
        raise RequestError(f"--repeat is {arguments.repeat}, it must be at least 1")
    _check_output(arguments)
    options = session_options(arguments)
    profile = chosen_profile(arguments)
    source = FeedSource(arguments.input)
    times_ms = []
    with contextlib.ExitStack() as stack:
        # What the meter takes is there before the session's memory begins to count.
        meter = stack.enter_context(Meter()) if arguments.repeat > 1 else None
        if meter is not None:
            meter.measure_idle()
        started_s = time.perf_counter()
        session = stack.enter_context(Session(arguments.bank, **options))
        load_ms = (time.perf_counter() - started_s) * 1e3
        names = [value.name for value in session.get_outputs()]
        _check_output(arguments, names)
        feed = source.feed(session.get_inputs())
        outputs: list[Any] = []

        def run() -> None:
            nonlocal outputs
            started_s = time.perf_counter()
            outputs = session.run(None, feed, deadline_ms=arguments.deadline_ms)
            times_ms.append((time.perf_counter() - started_s) * 1e3)

        run()
        energy = None if meter is None else _run_again(run, arguments.repeat - 1, meter)
        stats = session.stats()
    answers = dict(zip(names, outputs, strict=True))
    if arguments.output:
        _write(arguments.output, answers)
    cold_ms = times_ms[0]
    warm_ms = statistics.median(times_ms[1:]) if arguments.repeat > 1 else None
    energy = energy or estimate_of(profile, arguments.threads, warm_ms or cold_ms)
    if arguments.json:
        report = {"load_ms": load_ms, "run_ms": cold_ms, "warm_run_ms": warm_ms}
        print(json.dumps({**report, "energy": as_json(energy), **dataclasses.asdict(stats)}))
    else:
        _print_times(load_ms, cold_ms, warm_ms, stats)
        if energy is not None:
            print(energy)
        _print_stats(stats)
        for name, value in answers.items():
            array = np.asarray(value)
            print(f"{name}: {array.dtype} {list(array.shape)}")


def _run_again(run: Callable[[], None], times: int, meter: Meter) -> EnergyPerRun | None:
    """Energy of the warm runs, each beyond that of the idle board; None without a meter."""
    with meter.window("runs"):
        for _ in range(times):
            run()
    return energy_of(meter.windows[0], times)


def _check_output(arguments: argparse.Namespace, names: list[str] | None = None) -> None:
    """Refuse early a file that the outputs, once their names are known, cannot be written to."""
    path: Path | None = arguments.output
    if path is None:
        return
    if path.suffix not in (".npz", ".npy"):
        raise RequestError(f"--output {path} must end in .npz, or in .npy for a single output")
    if path.suffix == ".npy" and names is not None and len(names) != 1:
        raise RequestError(
            f"--output {path} has room for one array, the model has {len(names)} outputs, "
            f"{', '.join(names)}: name an .npz"
        )
    check_output(path, arguments.bank, arguments.input)


def _write(path: Path, outputs: dict[str, Any]) -> None:
    try:
        if path.suffix == ".npy":
            (output,) = outputs.values()
            np.save(path, output)
        else:
            np.savez(path, **outputs)
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {error}") from error


def _print_times(
    load_ms: float, cold_ms: float, warm_ms: float | None, stats: SessionStats
) -> None:
    run = f"run {cold_ms:.1f} ms"
    if warm_ms is not None:
        run = f"first run {cold_ms:.1f} ms, then {warm_ms:.1f} ms (median of {stats.runs - 1})"
    print(f"load {load_ms:.1f} ms, {run} at {stats.bits_per_weight:.2f} bits per weight")


def _print_stats(stats: SessionStats) -> None:
    print(
        f"weights in memory {format_size(stats.resident_bytes)}, "
        f"read {format_size(stats.streamed_bytes)}, "
        f"process grew by {format_size(stats.peak_bytes)} at its peak"
    )
    if stats.degraded:
        runs = counted(stats.degraded, "run")
        print(f"{runs} degraded: chunks that could not be read ran at a lower level")
    if stats.region is not None:
        again = ", answered again" if stats.escalated else ""
        if stats.samples > stats.runs:
            again = f", {stats.escalated_samples} of {counted(stats.samples, 'sample')} again"
        print(f"region {stats.region} of the boundary model{again}")
