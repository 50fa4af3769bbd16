"""`bapq bench`: speed and memory of a bank's levels, beside the model in ONNX Runtime or LiteRT.

Each row of the table is a process of its own, so that its memory is its own; this process has them
run in turns, so that whatever else the machine does hits all of them alike.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..answers import AnswerJudge
from ..errors import BapqError, RequestError
from ..input_files import check_input_file
from ..profiling import EnergyPerRun, Meter
from .bench_row import Row, Subject
from .bench_table import FIELDS, FORMATS, to_text
from .energy import add_energy, chosen_profile, energy_of, estimate_of
from .feeds import add_feed, parse_shapes
from .options import add_bank, add_session, chosen_levels, session_options
from .paths import check_output, put_text

__all__ = ["add_bench"]

_COLUMNS = (
    "load is the time of one opening, run the median of the runs with their standard deviation, "
    "peak growth that of the row's process. The first model of --against runs between a row's "
    "runs, too: reference ms is the median of these, ratio is run over reference, and agreement "
    "compares the outputs of one run. weights are those in memory, with what stays in float."
)

_WARM_UP_RUNS = 2
_PAUSE_S = 0.005
"""Before every run: ONNX Runtime's threads spin for a while after theirs, on the next's cores."""


def add_bench(commands: Any) -> None:
    """Add `bench`."""
    command = commands.add_parser(
        "bench", help="measure speed and memory, level by level", epilog=_COLUMNS
    )
    add_bank(command)
    command.add_argument(
        "--against",
        nargs="+",
        action="extend",
        default=[],
        type=Path,
        metavar="MODEL",
        help=".onnx files to run in ONNX Runtime as it comes, .tflite files in LiteRT; the ratio "
        "is to the first one",
    )
    command.add_argument(
        "--levels", "--level", help="a row for each, such as 8,4 or auto (default: all but 32)"
    )
    command.add_argument(
        "--bits", type=float, metavar="B", help="a row at so many bits per weight, such as 3.5"
    )
    command.add_argument(
        "-r", "--runs", type=int, default=20, metavar="N", help="runs of each row (default: 20)"
    )
    command.add_argument("-o", "--output", type=Path, metavar="FILE", help="file for the table")
    command.add_argument(
        "--format", choices=FORMATS, help="format of the table (default: as FILE ends, or else md)"
    )
    command.add_argument(
        "--json", action="store_const", const="json", dest="format", help="short for --format json"
    )
    add_feed(command)
    add_session(command)
    add_energy(command)
    command.set_defaults(command=_bench)


def _bench(arguments: argparse.Namespace) -> None:
    if arguments.runs < 1:
        raise RequestError(f"--runs is {arguments.runs}, it must be at least 1")
    if arguments.output:
        check_output(arguments.output, arguments.bank, arguments.input, *arguments.against)
    style = _format(arguments)
    for path in (arguments.input, *arguments.against):
        if path is not None:
            check_input_file(path)
    common: dict[str, Any] = {
        "threads": arguments.threads,
        "input_path": arguments.input,
        "shapes": parse_shapes(arguments.shape),
    }
    subjects = [
        *(Subject(path=path, session=None, **common) for path in arguments.against),
        *(
            Subject(path=arguments.bank, session=options, **common)
            for options in _rows_of_bank(arguments)
        ),
    ]
    profile = chosen_profile(arguments)
    failures: list[BapqError] = []
    with Meter() as meter:
        meter.measure_idle()
        results = _measure(subjects, arguments.runs, failures, meter)
    for result in results:
        if result["energy_j"] is None and result["run_ms"] is not None:
            _put_energy(result, estimate_of(profile, arguments.threads, result["run_ms"]))
    put_text(to_text(results, style), arguments.output)
    if failures:
        raise failures[0]


def _format(arguments: argparse.Namespace) -> str:
    if arguments.format is not None:
        return str(arguments.format)
    if arguments.output is None:
        return "md"
    suffix: str = arguments.output.suffix[1:]
    if suffix not in FORMATS:
        raise RequestError(
            f"--output {arguments.output} must end in one of {', '.join(FORMATS)}, or give --format"
        )
    return suffix


def _rows_of_bank(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """What the session of each row is opened with."""
    options = session_options(arguments)
    if arguments.policy not in (None, "static") or arguments.target_agreement is not None:
        if arguments.levels is not None:
            raise RequestError("--levels and a policy are both asked for: choose one")
        return [options]
    bits = options.pop("bits")
    rows = [] if bits is None else [{**options, "bits": bits}]
    if bits is None or arguments.levels is not None:
        levels = chosen_levels(arguments.bank, arguments.levels)
        rows = [*({**options, "level": level} for level in levels), *rows]
    return rows


def _put_energy(result: dict[str, Any], energy: EnergyPerRun | None) -> None:
    if energy is not None:
        result["energy_j"] = energy.energy_j
        result["energy_error_j"] = energy.error_j
        result["energy_estimated"] = energy.estimated
        for name in ("idle_w", "power_source", "power_scope", "power_hz"):
            result[name] = getattr(energy, name)


def _put_agreement(
    result: dict[str, Any], found: Mapping[str, Any], wanted: Mapping[str, Any]
) -> None:
    """Compare outputs of floats, where it is sure which of them belong together."""
    if len(found) == len(wanted) == 1:
        found = dict(zip(wanted, found.values(), strict=True))  # whatever each calls it
    floats = {
        name: value
        for name, value in wanted.items()
        if isinstance(value, np.ndarray) and value.dtype.kind == "f"
    }
    if not floats or not set(floats) <= set(found):
        return
    if all(np.shape(found[name]) == value.shape for name, value in floats.items()):
        # Not by class: of one input, most often zeros, that would tell next to nothing.
        result["agreement"] = AnswerJudge(scores=None).answer(found, floats)


def _measure(
    subjects: list[Subject], runs: int, failures: list[BapqError], meter: Meter
) -> list[dict[str, Any]]:
    """One result per subject; the first model also runs between the others' runs."""
    results: list[dict[str, Any]] = []
    reference: Row | None = None
    wanted: dict[str, Any] = {}
    told: set[object] = set()
    for subject in subjects:
        times_ms: list[float] = []
        reference_ms: list[float] = []
        result: dict[str, Any] = dict.fromkeys(FIELDS)
        result["name"] = subject.name
        results.append(result)
        row = Row(subject, partial(_warn_once, told, subject.name))
        try:
            result["load_ms"] = row.open()
            for _ in range(_WARM_UP_RUNS):
                row.run()
            row.forget_reads()
            for _ in range(runs):
                time.sleep(_PAUSE_S)
                times_ms.append(row.run())
                if reference is not None:
                    time.sleep(_PAUSE_S)
                    reference_ms.append(reference.run())
            result.update(row.report())
            if meter.power_source is not None:
                with meter.window(subject.name):
                    again = row.run_on()
                _put_energy(result, energy_of(meter.windows[-1], again))
            if reference is not None:
                _put_agreement(result, row.answers(), wanted)
            elif subject.session is None and len(results) == 1:
                wanted = row.answers()
        except BapqError as error:
            failures.append(error)
            result["error"] = str(error)
            row.close()
            continue
        result["run_ms"] = statistics.median(times_ms)
        result["run_sd_ms"] = statistics.stdev(times_ms) if runs > 1 else 0.0
        if subject.session is None and len(results) == 1:
            reference = row
            result["reference_ms"], result["ratio"] = result["run_ms"], 1.0
            continue
        if reference is not None:
            result["reference_ms"] = statistics.median(reference_ms)
            result["ratio"] = result["run_ms"] / result["reference_ms"]
        row.close()
    if reference is not None:
        reference.close()
    return results


def _warn_once(told: set[object], name: str, warning: Warning) -> None:
    """Give a row's warning, unless this row has given one of its kind or another the same."""
    keys = {str(warning), (name, type(warning))}
    if not keys & told:
        warnings.warn(type(warning)(f"{name}: {warning}"), stacklevel=2)
    told |= keys
