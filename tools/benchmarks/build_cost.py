"""Time and memory of calibrated builds, workers included.

    PYTHONPATH=tools python -m benchmarks.build_cost [NAME ...] [--workers N] [--format table|md]

Memory is the largest sum of anonymous memory (smaps_rollup) over the build and its workers, ten
times a second: what the kernel cannot take back. Pages of mapped files, which it can, do not count.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import tempfile
import time
from pathlib import Path

import psutil

from bapq_tools import build_bank
from bapq_tools.build_support.progress import Progress
from benchmarks.zoo import MODELS, make_model

from .cases import load_case
from .tables import add_format, print_table

NAMES = ("minilm", "resnet50", "vgg19")
_MIB = 1 << 20


def main() -> int:
    """Build and print."""
    parser = argparse.ArgumentParser(prog="benchmarks.build_cost")
    parser.add_argument("names", nargs="*", choices=[*MODELS, []], default=[], metavar="NAME")
    parser.add_argument("--workers", type=int, default=2)
    add_format(parser)
    arguments = parser.parse_args()
    names = arguments.names or NAMES
    rows = []
    with Progress(True).stage("builds", len(names)) as advance:
        for name in names:
            rows.append(measure(name, arguments.workers))
            advance()
    heads = ("model", "weights", "build", "peak memory", "twice float32 + 1 GB")
    print_table(f"Calibrated builds, {arguments.workers} workers", heads, rows, arguments.format)
    return 0


def measure(name: str, workers: int) -> list[str]:
    """One row of the table; the build has a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model.onnx"
        make_model(name, str(model))
        spawn = multiprocessing.get_context("spawn")
        queue = spawn.Queue()
        process = spawn.Process(target=_build, args=(name, model, workers, queue))
        process.start()
        peak = 0
        while process.is_alive():
            peak = max(peak, _anonymous_bytes(process.pid))
            time.sleep(0.1)
        process.join()
        if process.exitcode:
            raise SystemExit(f"the build of {name} failed")
        build_s, weights = queue.get()
        bound = 2 * 4 * weights + 1e9
        return [
            name,
            f"{weights / 1e6:.1f} M",
            f"{build_s:.0f} s",
            f"{peak / _MIB:.0f} MiB",
            f"{bound / _MIB:.0f} MiB",
        ]


def _build(name: str, model: Path, workers: int, queue: multiprocessing.Queue) -> None:
    case = load_case(name, model)
    bank = model.with_suffix(".bank")
    started_s = time.perf_counter()
    report = build_bank(
        model,
        bank,
        calibration=case.calibration,
        levels=(8, 4, 2, 1),
        workers=workers,
        progress=False,
    )
    queue.put((time.perf_counter() - started_s, report.weights))


def _anonymous_bytes(pid: int | None) -> int:
    """The anonymous bytes of a process and all its children."""
    total = 0
    try:
        root = psutil.Process(pid)
        for process in (root, *root.children(recursive=True)):
            text = Path(f"/proc/{process.pid}/smaps_rollup").read_text(encoding="ascii")
            for line in text.splitlines():
                if line.startswith("Anonymous:"):
                    total += int(line.split()[1]) << 10
    except (psutil.Error, OSError):  # it ended meanwhile
        pass
    return total


if __name__ == "__main__":
    sys.exit(main())
