"""What `import bapq_edge` adds to a program that uses NumPy and ONNX Runtime.

    PYTHONPATH=tools python -m benchmarks.import_cost [-r PAIRS] [--format table|md]

Every import is a process of its own, with and without the package in turns.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys

from .tables import add_format, print_table

_SCRIPT = """
import time
started_s = time.perf_counter()
import {}
elapsed_s = time.perf_counter() - started_s
with open("/proc/self/status") as status:
    rss_kib = next(int(line.split()[1]) for line in status if line.startswith("VmRSS:"))
print(elapsed_s, rss_kib * 1024)
"""
WITHOUT, WITH = "numpy, onnxruntime", "numpy, onnxruntime, bapq_edge"


def measure(modules: str) -> tuple[float, int]:
    """Seconds and resident bytes of a process that imports the modules."""
    command = [sys.executable, "-c", _SCRIPT.format(modules)]
    # A package that pip installed has its byte code on the disk.
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": ""}
    result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    seconds, rss_bytes = result.stdout.split()
    return float(seconds), int(rss_bytes)


def main() -> None:
    """Measure in turns, print the medians and their differences."""
    parser = argparse.ArgumentParser(prog="benchmarks.import_cost")
    parser.add_argument("-r", "--pairs", type=int, default=25, metavar="PAIRS")
    add_format(parser)
    arguments = parser.parse_args()
    measure(WITH)  # leaves the files in the page cache, and the byte code beside them
    samples: dict[str, list[tuple[float, int]]] = {WITHOUT: [], WITH: []}
    for _ in range(arguments.pairs):
        for modules, measured in samples.items():
            measured.append(measure(modules))
    medians = [
        [statistics.median(column) for column in zip(*samples[modules], strict=True)]
        for modules in (WITHOUT, WITH)
    ]
    rows = [*zip((WITHOUT, WITH), medians, strict=True)]
    rows.append(("difference", [b - a for a, b in zip(*medians, strict=True)]))
    print_table(
        f"median of {arguments.pairs} processes",
        ("import", "time", "resident memory"),
        [(name, f"{s * 1e3:.0f} ms", f"{size / 2**20:.1f} MiB") for name, (s, size) in rows],
        arguments.format,
    )


if __name__ == "__main__":
    main()
