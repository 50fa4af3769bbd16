"""Peak memory of commands, Python callables, banks and models, in one table.

    python tools/profile_memory.py --bank model.bank@8 --onnx model.onnx --input input.npz
    python tools/profile_memory.py --command "mine=python infer.py" --callable mymodule:infer

`peak_bytes` is the largest resident memory of the process (VmHWM, proc(5)); of a command with
children, of the largest one. `growth_bytes` is what opening and running added to a process that had
imported its libraries; a command has none. Where a command needs less than the small process that
starts it, `peak_bytes` is that one's, and `bound` is 1.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import time
from typing import Any

from profile_subjects import Subject, in_own_process, parser_for, ready, run_script

from bapq_edge.errors import ExecutionError
from bapq_edge.profiling import Meter
from bapq_edge.telemetry import peak_rss_bytes

# A process's ru_maxrss begins with that of the one that started it: so that one is small.
_LAUNCHER = """
import json, os, sys, time
with open("/proc/self/status") as status:
    floor = next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) * 1024
started_s = time.monotonic()
child = os.posix_spawnp(sys.argv[2], sys.argv[2:], os.environ)
_, status, usage = os.wait4(child, 0)
took_s = time.monotonic() - started_s
found = [usage.ru_maxrss * 1024, floor, took_s, os.waitstatus_to_exitcode(status)]
os.write(int(sys.argv[1]), json.dumps(found).encode())
"""


def measure(subjects: list[Subject], runs: int) -> list[dict[str, Any]]:
    """A row per subject."""
    return [
        _command(subject, runs)
        if subject.kind == "command"
        else in_own_process(measure_callable, subject, runs)
        for subject in subjects
    ]


def _command(subject: Subject, runs: int) -> dict[str, Any]:
    peaks, floors, times_s = [], [], []
    for _ in range(runs):
        reads, writes = os.pipe()
        launcher = [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(writes), *subject.command]
        ended = subprocess.run(
            launcher, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, pass_fds=[writes]
        )
        os.close(writes)
        with os.fdopen(reads, "rb") as report:
            told = report.read()
        last = ended.stderr.decode(errors="replace").strip().splitlines()[-1:]
        if not told:
            raise ExecutionError(f"{subject.what!r} cannot be started: {''.join(last)}")
        peak, floor, took_s, code = json.loads(told)
        if code:
            raise ExecutionError(f"{subject.what!r} ended with {code}: {''.join(last)}")
        peaks.append(peak)
        floors.append(floor)
        times_s.append(took_s)
    peak = max(peaks)
    return _row(subject, runs, peak, None, sum(times_s) / runs, int(peak <= max(floors)))


def measure_callable(subject: Subject, runs: int) -> dict[str, Any]:
    """The row of what is no command, of this process: call it in one of its own."""
    if subject.kind in ("bank", "onnx"):
        import onnxruntime  # noqa: F401  (a program that uses it has it in memory already)
    gc.collect()
    with Meter() as meter:
        with meter.window("all"):
            run = ready(subject)
            started_s = time.perf_counter()
            for _ in range(runs):
                run()
            run_s = (time.perf_counter() - started_s) / runs
        (window,) = meter.windows
    return _row(subject, runs, peak_rss_bytes(), window.peak_growth_bytes, run_s, 0)


def _row(
    subject: Subject, runs: int, peak: int, growth: int | None, run_s: float, bound: int
) -> dict[str, Any]:
    return {
        "name": subject.name,
        "kind": subject.kind,
        "runs": runs,
        "peak_bytes": peak,
        "growth_bytes": growth,
        "run_ms": run_s * 1e3,
        "bound": bound,
    }


if __name__ == "__main__":
    sys.exit(run_script(parser_for(__doc__), measure))
