"""Instructions per inference on emulated boards, as tables in Markdown or as JSON.

    make bench-arm                                            # all of it
    make bench-arm ARGS="--only cortex-a72 squeezenet 4"      # what has these words; also -o json

One thread, all weights in memory. QEMU counts what is executed between two marks, so neither the
start nor the first runs count; a table's figure is the median of a few runs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

from .counts import Symbols, by_part, median_run, spans
from .models import MODELS, prepare
from .table import ENGINES, to_markdown

ROOT = Path(__file__).resolve().parents[3]
ARM64 = ROOT / ".cache" / "arm64"
WORK = ROOT / "build" / "bench_arm"
PYTHON = ROOT / "tests" / "virtual_pi" / "arm_python.sh"
PNNX = ARM64 / "pnnx" / "pnnx" / "pnnx"
PACKAGES = ("bapq-symbols", "ort-newest", "ncnn")
"""folders of what the board imports; the first is our wheel with its symbols"""
CPUS = ("cortex-a72", "cortex-a76")
RUNS = 3


def main() -> int:
    """Measure and print; 0, or 1 when nothing that was asked for is there."""
    parser = argparse.ArgumentParser(prog="benchmarks.arm", description=__doc__)
    parser.add_argument("-o", dest="style", choices=("md", "json"), default="md")
    choices = ("cortex-a53", *CPUS, *MODELS, *ENGINES)
    parser.add_argument(
        "--only", nargs="+", choices=choices, default=[], metavar="WORD",
        help=f"CPUs, models and engines of {', '.join(choices)}; what is not named is all of it",
    )  # fmt: skip
    parser.add_argument("--runs", type=int, default=RUNS, help="measured runs of each model that is quick")
    arguments = parser.parse_args()
    cpus = _chosen(arguments.only, ("cortex-a53", *CPUS), CPUS)
    models = _chosen(arguments.only, MODELS, MODELS)
    engines = _chosen(arguments.only, ENGINES, [name for name in ENGINES if name != "32"])

    WORK.mkdir(parents=True, exist_ok=True)
    plugin = WORK / "blocks.so"
    source = Path(__file__).with_name("blocks.c")
    subprocess.run(["gcc", "-shared", "-fPIC", "-O2", "-o", plugin, source], check=True)
    symbols = Symbols(ARM64 / PACKAGES[0] / "bapq_edge" / "engine" / "libbapq.so")
    cells = []
    for name in models:
        _say(f"{name}: preparing")
        reasons = prepare(name, WORK / "models" / name, PNNX if PNNX.exists() else None)
        unable = {engine: reasons[engine] for engine in engines if engine in reasons}
        able = [engine for engine in engines if engine not in unable]
        for cpu in cpus:
            found = [{"engine": engine, "failed": reason} for engine, reason in unable.items()]
            measured = _measure(cpu, name, able, plugin, symbols, arguments.runs) if able else ()
            for record in chain(found, measured):
                figure = record.get("failed") or f"{sum(record['parts'].values()) / 1e6:.2f} M"
                _say(f"{name}, {cpu}, {record['engine']}: {figure}")
                cells.append({"cpu": cpu, "model": name, **record})
    as_json = arguments.style == "json"
    print(json.dumps({"cells": cells}, indent=1) if as_json else to_markdown(cells, MODELS))
    return 0 if cells else 1


def _chosen(words: list[str], names: Iterable[str], otherwise: Iterable[str]) -> list[str]:
    return [name for name in names if name in words] or list(otherwise)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _measure(
    cpu: str, name: str, engines: list[str], plugin: Path, symbols: Symbols, runs: int
) -> Iterator[dict[str, Any]]:
    """What each engine takes, in one process of the emulated board."""
    left = list(engines)
    counted = WORK / "blocks.txt"
    counted.write_text("")
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(str(ARM64 / package) for package in PACKAGES),
        "PYTHONDONTWRITEBYTECODE": "1",
        "BAPQ_ARM_CPU": cpu,
        "BAPQ_ARM_QEMU": f"qemu-aarch64 -plugin {plugin},out={counted}",
    }
    guest = Path(__file__).with_name("guest.py")
    command = [PYTHON, guest, WORK / "models" / name, str(runs), *engines]
    process = subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, text=True, cwd=WORK, env=environment
    )
    assert process.stdout is not None
    with counted.open() as lines:
        found = spans(lines)
        for line in process.stdout:  # the marks of an engine are written before its line
            if not line.startswith("{"):
                continue
            record = json.loads(line)
            left.remove(record["engine"])
            if "failed" not in record:
                next(found)  # up to the first mark of this engine
                measured = islice(found, record.pop("runs"))
                parts = [by_part(counts, symbols) for counts in measured]
                record["parts"] = median_run(parts)
            yield record
    for engine in left:
        yield {"engine": engine, "failed": f"the process ended with {process.wait()}"}


if __name__ == "__main__":
    sys.exit(main())
