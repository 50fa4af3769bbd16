"""The smallest budget that works, and where each MiB of it goes.

    PYTHONPATH=tools python -m benchmarks.memory_floor [MODEL ...] [--format table|md|json]

Level 8 and one thread; inputs are zeros, those of MiniLM 1 x 64. Each measurement is a process of
its own, `measure_floor.py`. Banks stand in .cache/bench/floor; what is missing there is built,
without calibration: it changes no size.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnxruntime

from .models import WORK
from .tables import add_format, print_table
from .zoo import MODELS

DEFAULT = ("squeezenet", "resnet50", "minilm", "vgg19")
MIB = 1 << 20

FLOOR_HEADS = ("model", "smallest budget", "growth in it", "loading", "running", "anonymous")
PART_HEADS = (
    "model",
    "bank, tables, plans",
    "ONNX Runtime's objects",
    "its code",
    "weights",
    "our scratch",
    "activations alive",
    "rest of the arena",
    "all",
    "heap's free part",
)


def main() -> int:
    """Measure, print; 0, or 1 where a measurement failed."""
    parser = argparse.ArgumentParser(prog="benchmarks.memory_floor")
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"default: {' '.join(DEFAULT)}")
    add_format(parser, "json")
    arguments = parser.parse_args()
    if unknown := set(arguments.models) - set(MODELS):
        parser.error(f"no model {min(unknown)!r}; choose of {', '.join(MODELS)}")
    try:
        results = [measure_model(name) for name in arguments.models or DEFAULT]
    except subprocess.CalledProcessError as error:
        print(f"benchmarks.memory_floor: failed: {error.cmd}", file=sys.stderr)
        return 1
    if arguments.format == "json":
        print(json.dumps({"onnxruntime": onnxruntime.__version__, "models": results}, indent=1))
        return 0
    note = f"level 8, one thread, onnxruntime {onnxruntime.__version__}, MiB"
    floors, parts = [_floor_row(r) for r in results], [_part_row(r) for r in results]
    print_table(f"Smallest budget ({note})", FLOOR_HEADS, floors, arguments.format)
    print_table(f"Where it goes ({note})", PART_HEADS, parts, arguments.format)
    return 0


def measure_model(name: str) -> dict[str, Any]:
    """All figures of one model of the zoo, in bytes."""
    bank = _bank(name)
    smallest = _measure("smallest", bank)
    steps = _measure("steps", bank)
    activations = _measure("activations", bank)
    in_runs = steps["in_runs_bytes"]
    rest = in_runs - steps["weight_bytes"] - steps["scratch_bytes"] - activations
    return {
        "model": name,
        "smallest_budget_bytes": smallest,
        "growth_bytes": _measure("growth", bank, str(smallest)),
        **steps,
        "activation_bytes": activations,
        "rest_bytes": rest,
    }


def _bank(name: str) -> Path:
    from bapq_tools import build_bank

    from .zoo import make_model

    bank = WORK / "floor" / f"{name}.bank"
    if not bank.exists():
        bank.parent.mkdir(parents=True, exist_ok=True)
        model = bank.with_suffix(".onnx")
        make_model(name, model)
        build_bank(model, bank, levels=(8,), progress=False)
        model.unlink()
    return bank


def _measure(kind: str, bank: Path, *arguments: str) -> Any:
    command = [sys.executable, "-m", "benchmarks.measure_floor", kind, str(bank), *arguments]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output)


def _floor_row(result: dict[str, Any]) -> list[str]:
    keys = ("smallest_budget", "growth", "loading_peak", "all", "anonymous")
    return [result["model"], *(_mib(result[f"{key}_bytes"]) for key in keys)]


def _part_row(result: dict[str, Any]) -> list[str]:
    keys = ("bank", "objects", "code", "weight", "scratch", "activation", "rest", "all", "free")
    return [result["model"], *(_mib(result[f"{key}_bytes"]) for key in keys)]


def _mib(size_bytes: int) -> str:
    return f"{size_bytes / MIB:.1f}"


if __name__ == "__main__":
    sys.exit(main())
