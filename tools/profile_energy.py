"""Energy of commands, Python callables, banks and models, in one table.

    python tools/profile_energy.py --bank model.bank@8 --onnx model.onnx --input input.npz
    BAPQ_POWER=file:watts.txt python tools/profile_energy.py --command "mine=python infer.py"

`energy_j` is that of one run, beyond what the idle board draws (`idle_w`), which is measured for
two seconds before. Of callables, banks and models the runs count, not the loading; of a command all
counts. Without a power meter there is nothing to measure, and the script says so (bapq doctor tells
which meters there are).
"""

from __future__ import annotations

import subprocess
import sys
from typing import Any

from profile_subjects import Subject, in_own_process, parser_for, ready, run_script

from bapq_edge.errors import ExecutionError, SensorError
from bapq_edge.profiling import Meter


def measure(subjects: list[Subject], runs: int) -> list[dict[str, Any]]:
    """A row per subject. Raises SensorError without a power meter."""
    with Meter() as meter:
        if meter.power_source is None:
            raise SensorError(
                "no power meter: connect one, or name one with BAPQ_POWER=file:PATH (bapq doctor)"
            )
    return [in_own_process(measure_one, subject, runs) for subject in subjects]


def measure_one(subject: Subject, runs: int) -> dict[str, Any]:
    """The row of a subject."""
    run = (lambda: _command(subject)) if subject.kind == "command" else ready(subject)
    if subject.kind != "command":
        run()  # what is only done once
    with Meter() as meter:
        meter.measure_idle()
        with meter.window(subject.name):
            for _ in range(runs):
                run()
    (window,) = meter.windows
    energy = window.energy_per_run(runs)
    return {
        "name": subject.name,
        "kind": subject.kind,
        "runs": runs,
        "run_ms": window.wall_s / runs * 1e3,
        "energy_j": None if energy is None else energy.energy_j,
        "error_j": None if energy is None else energy.error_j,
        "idle_w": None if window.idle is None else window.idle.power_w,
        "meter": window.power_source,
        "scope": window.power_scope,
        "power_hz": window.power_hz,
        "void": window.void or (None if energy else "too short for this meter: give more runs"),
    }


def _command(subject: Subject) -> None:
    try:
        ended = subprocess.run(subject.command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    except OSError as error:
        raise ExecutionError(f"{subject.what!r} cannot be started: {error}") from error
    if ended.returncode:
        last = ended.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise ExecutionError(f"{subject.what!r} ended with {ended.returncode}: {''.join(last)}")


if __name__ == "__main__":
    sys.exit(run_script(parser_for(__doc__), measure))
