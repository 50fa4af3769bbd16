"""Errors, memory, speed and build time of the zoo's models at every level: `make bench`.

    PYTHONPATH=tools python -m benchmarks.models [NAME ...] [--format table|md|json]

Each measurement is a process of its own; docs/explanation/measuring.md says how each is
made. Models and banks go to .cache/bench.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnxruntime

from bapq_edge.engine.library import kernels_name
from bapq_tools.build_support.progress import Progress
from benchmarks.zoo import MODELS

from .measure import runtimes_of
from .tables import add_format, add_names, format_mib, print_table

WORK = Path(__file__).resolve().parents[2] / ".cache" / "bench"

BUILD_HEADS = ("model", "weights", "model file", "bank", "without `f32`", "build")
RUN_HEADS = ("model", "runtime", "reads", "error", "answers", "memory", "time")


def main() -> int:
    """Measure and print; 0, or 1 when a measurement failed."""
    parser = argparse.ArgumentParser(prog="benchmarks.models", description=__doc__)
    add_names(parser, MODELS)
    add_format(parser, "json")
    arguments = parser.parse_args()
    try:
        results = [measure_model(name) for name in arguments.names or MODELS]
    except subprocess.CalledProcessError as error:
        print(f"benchmarks.models: failed: {' '.join(error.cmd)}", file=sys.stderr)
        return 1
    setting = {"onnxruntime": onnxruntime.__version__, "kernels": kernels_name()}
    if arguments.format == "json":
        print(json.dumps({**setting, "models": results}, indent=1))
        return 0
    note = f"onnxruntime {setting['onnxruntime']}, kernels {setting['kernels']}"
    build_rows = [_build_row(result) for result in results]
    run_rows = [row for result in results for row in _run_rows(result)]
    print_table(
        f"Builds, levels 32, 8, 4, 2 and 1 ({note})", BUILD_HEADS, build_rows, arguments.format
    )
    print_table(f"Runs, one thread on one core ({note})", RUN_HEADS, run_rows, arguments.format)
    return 0


def measure_model(name: str) -> dict[str, Any]:
    """All figures of one model of the zoo."""
    folder = WORK / name
    runtimes = ["fp32"]
    with Progress(True).stage(name, 9 + (name == "minilm")) as advance:

        def measure(kind: str, *arguments: str) -> Any:
            module = "benchmarks.measure"
            command = [sys.executable, "-m", module, kind, str(folder), *arguments]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            advance()
            return json.loads(output)

        build = measure("build")
        runtimes = runtimes_of(folder)
        errors = measure("errors")
        peaks = {runtime: measure("memory", runtime) for runtime in runtimes}
        ratios = measure("latency")
    sizes = build.pop("bytes")
    runs = [
        {
            "runtime": runtime,
            "bytes": sizes[runtime],
            **errors[runtime],
            "peak_growth_bytes": peaks[runtime],
            "time_over_fp32": ratios.get(runtime, 1.0),
        }
        for runtime in runtimes
    ]
    return {"model": name, **build, "runs": runs}


def _build_row(result: dict[str, Any]) -> list[str]:
    return [
        result["model"],
        f"{result['weights'] / 1e6:.2f} M",
        format_mib(result["runs"][0]["bytes"]),
        format_mib(result["bank_bytes"]),
        format_mib(result["bank_bytes"] - result["f32_plane_bytes"]),
        f"{result['build_s']:.1f} s",
    ]


def _run_rows(result: dict[str, Any]) -> list[list[str]]:
    return [
        [
            result["model"],
            _runtime(run["runtime"]),
            format_mib(run["bytes"]),
            "" if run["runtime"] == "fp32" else f"{run['relative_error']:.2g}",
            _answers(run),
            format_mib(run["peak_growth_bytes"]),
            f"{run['time_over_fp32']:.2f}",
        ]
        for run in result["runs"]
    ]


def _runtime(name: str) -> str:
    return f"level {name}" if name.isdecimal() else f"ORT {name.replace('_', ' ')}"


def _answers(run: dict[str, Any]) -> str:
    if "cosine" in run:
        return f"cosine {run['cosine']:.4f}"
    if "right" in run:
        return f"{run['right']}/{run['samples']}, {run['lost']} lost"
    return ""


if __name__ == "__main__":
    sys.exit(main())
