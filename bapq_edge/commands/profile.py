"""`bapq profile`: run a bank for some seconds, and write what it did as a trace."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

from ..errors import RequestError, StorageError
from ..profiling import Meter, Recorder, Summary
from ..session import Session
from ..units import counted, format_size
from .energy import add_energy, as_json, chosen_profile, energy_of, estimate_of
from .feeds import FeedSource, add_feed, parse_shapes
from .options import add_bank, add_json, add_precision, add_session, session_options
from .paths import check_output

__all__ = ["add_profile"]

_LAYERS_SHOWN = 5


def add_profile(commands: Any) -> None:
    """Add `profile`."""
    command = commands.add_parser("profile", help="write a trace of reads, waits and runs")
    add_bank(command)
    command.add_argument(
        "-o", "--output", required=True, type=Path, metavar="TRACE.json", help="trace to write"
    )
    command.add_argument(
        "--seconds", type=float, default=5.0, metavar="S", help="seconds to run for (default: 5)"
    )
    add_precision(command)
    add_session(command)
    add_energy(command)
    add_feed(command)
    add_json(command, "the summary")
    command.set_defaults(command=_profile)


def _profile(arguments: argparse.Namespace) -> None:
    if not arguments.seconds > 0:
        raise RequestError(f"--seconds is {arguments.seconds}, it must be more than 0")
    if arguments.output.suffix != ".json":
        raise RequestError(f"--output {arguments.output} must end in .json")
    check_output(arguments.output, arguments.bank, arguments.input)
    options = session_options(arguments)
    profile = chosen_profile(arguments)
    source = FeedSource(arguments.input, parse_shapes(arguments.shape))
    with Meter() as meter, contextlib.ExitStack() as stack:
        meter.measure_idle()
        session = stack.enter_context(Session(arguments.bank, **options))
        feed = source.feed(session.get_inputs())
        with source.explained(session.get_inputs()):
            session.run(None, feed)  # the first run brings in what is pinned
        with Recorder(session) as recorder, meter.window("runs"):
            end_s = time.monotonic() + arguments.seconds
            while time.monotonic() < end_s:
                recorder.run(feed)
        stats = session.stats()
    try:
        summary = recorder.write(arguments.output)
    except OSError as error:
        raise StorageError(f"{arguments.output} cannot be written: {error}") from error
    energy = energy_of(meter.windows[0], summary.runs) or estimate_of(
        profile, arguments.threads, summary.median_run_ms
    )
    if arguments.json:
        report = {
            **dataclasses.asdict(summary),
            "energy": as_json(energy),
            "session": dataclasses.asdict(stats),
        }
        print(json.dumps(report))
        return
    _print(summary)
    if energy is not None:
        print(energy)
    print(
        f"{stats.bits_per_weight:.2f} bits per weight, {format_size(stats.resident_bytes)} of "
        f"weights in memory, process grew by {format_size(stats.peak_bytes)} at its peak"
    )
    print(f"{arguments.output}: open it on https://ui.perfetto.dev (it stays on this machine)")


def _print(summary: Summary) -> None:
    print(
        f"{counted(summary.runs, 'run')}, median {summary.median_run_ms:.2f} ms, "
        f"{summary.wait_share:.1%} of that waiting for weights"
    )
    if summary.read_bytes:
        print(
            f"read {summary.read_bytes / 1e6:.1f} MB, {summary.read_bytes_per_run / 1e6:.2f} MB a "
            f"run: {summary.read_bytes_s / 1e6:.1f} MB/s over all, "
            f"{summary.read_bytes_s_while_reading / 1e6:.1f} MB/s while it was reading"
        )
    else:
        print("read nothing: all weights stayed in memory")
    for name, wait_ms in list(summary.waits_by_layer_ms.items())[:_LAYERS_SHOWN]:
        print(f"  waited {wait_ms / max(1, summary.runs):8.3f} ms a run for {name}")
    if summary.lost_events:
        print(f"{counted(summary.lost_events, 'event')} found no room: the trace has holes")
