"""Instructions per inference on emulated boards, as tables in Markdown or as JSON.

    make bench-arm                                            # all of it
    make bench-arm ARGS="--only cortex-a72 squeezenet 4"      # some; also --format json

One thread, all weights in memory. QEMU counts what is executed between two marks, so neither the
start nor the first runs count; a table's figure is the median of a few runs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

from ..native_build import build_native
from .counts import Symbols, by_part, median_run, spans
from .models import MODELS, prepare
from .table import ENGINES, to_markdown

ROOT = Path(__file__).resolve().parents[3]
ARM64 = ROOT / ".cache" / "arm64"
WORK = ROOT / "build" / "bench_arm"
HERE = Path(__file__).parent
PYTHON = ROOT / "tests" / "virtual_pi" / "arm_python.sh"
PNNX = ARM64 / "pnnx" / "pnnx" / "pnnx"
PACKAGES = ("bapq-symbols", "ort-newest", "ncnn")
"""folders of what the board imports; the first is our wheel with its symbols"""
CPUS = ("cortex-a72", "cortex-a76")
RUNS = 5


def main() -> int:
    """Measure and print; 0, or 1 when nothing that was asked for is there."""
    parser = argparse.ArgumentParser(prog="benchmarks.arm", description=__doc__)
    parser.add_argument("--format", choices=("md", "json"), default="md")
    choices = ("cortex-a53", *CPUS, *MODELS, *ENGINES)
    parser.add_argument(
        "--only", nargs="+", choices=choices, default=[], metavar="WORD",
        help=f"CPUs, models and engines of {', '.join(choices)}; what is not named is all of it",
    )  # fmt: skip
    parser.add_argument("--runs", type=int, default=RUNS, help="of a model that is quick")
    arguments = parser.parse_args()
    cpus = _chosen(arguments.only, ("cortex-a53", *CPUS), CPUS)
    models = _chosen(arguments.only, MODELS, MODELS)
    engines = _chosen(arguments.only, ENGINES, [name for name in ENGINES if name != "32"])

    with tempfile.TemporaryDirectory() as scratch:
        board = _Board(Path(scratch), arguments.runs)
        cells = [
            {"cpu": cpu, "model": model, **record}
            for model in models
            for cpu, record in _measure_model(board, model, cpus, engines)
        ]
    as_json = arguments.format == "json"
    print(json.dumps({"cells": cells}, indent=1) if as_json else to_markdown(cells, MODELS))
    return 0 if cells else 1


def _chosen(words: list[str], names: Iterable[str], otherwise: Iterable[str]) -> list[str]:
    return [name for name in names if name in words] or list(otherwise)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _measure_model(
    board: _Board, model: str, cpus: list[str], engines: list[str]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """CPU, and what an engine takes there or why there is nothing."""
    _say(f"{model}: preparing")
    folder = WORK / "models" / model
    reasons = prepare(model, folder, PNNX if PNNX.exists() else None)
    unable = [{"engine": name, "failed": reasons[name]} for name in engines if name in reasons]
    able = [name for name in engines if name not in reasons]
    for cpu in cpus:
        for record in chain(unable, board.run(cpu, folder, able) if able else ()):
            figure = record.get("failed") or f"{sum(record['parts'].values()) / 1e6:.2f} M"
            _say(f"{model}, {cpu}, {record['engine']}: {figure}")
            yield cpu, record


class _Board:
    """QEMU with the plugin that counts, and the symbols of our library."""

    def __init__(self, scratch: Path, runs: int) -> None:
        self._runs = runs
        self._plugin, self._counted = build_native("blocks"), scratch / "blocks.txt"
        self._symbols = Symbols(ARM64 / PACKAGES[0] / "bapq_edge" / "engine" / "libbapq.so")

    def run(self, cpu: str, folder: Path, engines: list[str]) -> Iterator[dict[str, Any]]:
        """What each engine takes, all in one process."""
        self._counted.write_text("")
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(str(ARM64 / package) for package in PACKAGES),
            "PYTHONDONTWRITEBYTECODE": "1",
            "BAPQ_ARM_CPU": cpu,
            "BAPQ_ARM_QEMU": f"qemu-aarch64 -plugin {self._plugin},out={self._counted}",
        }
        process = subprocess.Popen(
            [PYTHON, HERE / "guest.py", folder, str(self._runs), *engines],
            stdout=subprocess.PIPE,
            text=True,
            cwd=self._counted.parent,  # keeps the project's sources out of sys.path
            env=environment,
        )
        assert process.stdout is not None
        left = list(engines)
        with self._counted.open() as lines:
            found = spans(lines)
            for line in process.stdout:  # the marks of an engine are written before its line
                if not line.startswith("{"):
                    continue
                record = json.loads(line)
                left.remove(record["engine"])
                if "failed" not in record:
                    next(found)  # up to the first mark of this engine
                    measured = islice(found, record.pop("runs"))
                    parts = [by_part(counts, self._symbols) for counts in measured]
                    record["parts"] = median_run(parts)
                yield record
        for engine in left:
            yield {"engine": engine, "failed": f"the process ended with {process.wait()}"}


if __name__ == "__main__":
    sys.exit(main())
