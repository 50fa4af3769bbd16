"""Speed of the kernels on this machine beside ONNX Runtime's, and the inner loops of those for ARM.

    make bench-kernels
    make bench-kernels ARGS="native --isa avx2 avx512vnni"    # or: loops; also --format json

A pass is timed on one pinned core, both sides in turns, each figure the median of a few passes.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bapq_edge.engine.library import kernels_name

from .mca import CORES, bound_cycles, estimate_cycles, llvm_version, loops_of
from .native import SHAPES, measure
from .table import loops_table, native_table

ROOT = Path(__file__).resolve().parents[3]
ARM_BUILD = ROOT / "build" / "bench_arm" / "cmake"
"""where the aarch64 wheel's objects are"""
ARM_FAMILIES = ("neon", "neondot")


def main() -> int:
    """Measure and print; 0, or 1 when a tool is missing."""
    parser = argparse.ArgumentParser(prog="benchmarks.kernels", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help="native, loops; all by default")
    parser.add_argument("--isa", nargs="+", metavar="FAMILY", default=[kernels_name()])
    parser.add_argument("--format", choices=("md", "json"), default="md")
    arguments = parser.parse_args()
    parts = arguments.parts or ["native", "loops"]
    unknown = set(parts) - {"native", "loops"}
    if unknown:
        parser.error(f"no part {min(unknown)!r}; choose of native, loops")
    result: dict[str, Any] = {}
    try:
        if "native" in parts:
            result["machine"], result["native"] = _native(arguments.isa)
        if "loops" in parts:
            result["llvm"], result["loops"] = _loops()
    except (FileNotFoundError, ValueError) as error:
        print(f"benchmarks.kernels: {error}", file=sys.stderr)
        return 1
    if arguments.format == "json":
        print(json.dumps(result, indent=1))
        return 0
    if "native" in result:
        print(native_table(result["machine"], result["native"]))
    if "loops" in result:
        print(loops_table(result["llvm"], result["loops"]))
    return 0


def _native(families: list[str]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    machine, records = measure(families, list(SHAPES))
    found: list[dict[str, Any]] = []
    for record in records:
        if not found or record["shape"] != found[-1]["shape"]:
            print("{}×{}, {} rows".format(*record["shape"]), file=sys.stderr)
        found.append(record)
    return asdict(machine), found


def _loops() -> tuple[int, list[dict[str, Any]]]:
    """Each loop with its cycles on the cores that can run it."""
    llvm = llvm_version()
    found: list[dict[str, Any]] = []
    for family in ARM_FAMILIES:
        (compiled,) = ARM_BUILD.rglob(f"{family}.c.o")
        for loop in loops_of(compiled, llvm):
            able = {name: core for name, core in CORES.items() if family == "neon" or core.has_dot}
            found.append(
                {
                    "family": family,
                    "function": loop.symbol,
                    "instructions": len(loop.body),
                    "loads": loop.loads,
                    "spills": loop.spills,
                    "products": loop.products,
                    "cycles": {name: estimate_cycles(loop, name, llvm) for name in able},
                    "bound": {name: bound_cycles(loop, core) for name, core in able.items()},
                }
            )
    return llvm, found


if __name__ == "__main__":
    sys.exit(main())
