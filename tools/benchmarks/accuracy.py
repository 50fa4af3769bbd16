"""Accuracy and size of the models with trained weights, at every level and by plan.

    PYTHONPATH=tools python -m benchmarks.accuracy [NAME ...] [--format table|md|json]

Banks hold levels 8, 4, 2 and 1 of all their weights, embeddings included, and are built anew. They
go to .cache/bench.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from bapq_edge import Session
from bapq_edge.bank.layout import Level
from bapq_edge.bank.reader import Bank
from bapq_edge.errors import UncalibratedWarning
from bapq_tools import build_bank
from bapq_tools.build_support.progress import Progress
from benchmarks.zoo import make_model

from .cases import Case, judge, load_case
from .measure import open_runtime
from .models import WORK
from .tables import add_format, add_names, print_table

NAMES = ("minilm", "digits_cnn", "digits_mlp", "digits_resnet")
LEVELS: tuple[Level, ...] = (8, 4, 2, 1)
BITS = (2.5, 3.0, 3.5, 4.0, 5.0, 6.0)
LEVEL_SETS: tuple[tuple[Level, ...], ...] = ((8,), (8, 4), (8, 4, 2), (8, 4, 2, 1))


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="benchmarks.accuracy", description=__doc__)
    add_names(parser, NAMES)
    add_format(parser, "json")
    arguments = parser.parse_args()
    names = arguments.names or NAMES
    results = []
    with Progress(True).stage("models", len(names)) as advance:
        for name in names:
            results.append(measure(name))
            advance()
    if arguments.format == "json":
        print(json.dumps(results, indent=1))
        return 0
    print_table("Levels", *_level_table(results), arguments.format)
    print_table(
        "Plans, beside the best level of no more bits", *_plan_table(results), arguments.format
    )
    print_table("Bytes", *_byte_table(results), arguments.format)
    return 0


def measure(name: str) -> dict[str, Any]:
    """All figures of one model."""
    folder = WORK / name
    folder.mkdir(parents=True, exist_ok=True)
    model, bank = folder / "model.onnx", folder / "accuracy.bank"
    make_model(name, model)
    case = load_case(name, model)
    started_s = time.perf_counter()
    report = build_bank(model, bank, calibration=case.calibration, levels=LEVELS, progress=False)
    build_s = time.perf_counter() - started_s
    reference = _answers(open_runtime(folder, "fp32", threads=2), case)
    result: dict[str, Any] = {"model": name, "weights": report.weights, "build_s": build_s}
    result["fp32"] = judge(case, reference, reference)
    result["levels"], result["plans"] = {}, {}
    with Session(bank, threads=2) as session:
        for level in LEVELS:
            session.set_level(level)
            result["levels"][level] = judge(case, _answers(session, case), reference)
        for bits in BITS:
            session.set_bits(bits)
            found = judge(case, _answers(session, case), reference)
            result["plans"][bits] = {**found, "used_bits": session.stats().bits_per_weight}
    result["bank_bytes"] = {
        str(levels): _bank_bytes(model, folder, levels) for levels in LEVEL_SETS
    }
    return result


def _answers(session: Any, case: Case) -> list[np.ndarray]:
    return [session.run([case.judged_output], feed)[0] for feed in case.held_out]


def _bank_bytes(model: Path, folder: Path, levels: tuple[Level, ...]) -> dict[str, int]:
    """Size of a bank of some levels: of all its files, its planes, and what each level reads.

    Codes do not matter for that, so it is built without calibration data: convolutions have a few
    more scales then.
    """
    path = folder / "size.bank"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UncalibratedWarning)
        build_bank(model, path, calibration=None, levels=levels, progress=False)
    opened = Bank.open(path)
    by_level = {str(level): opened.weight_bytes(level) for level in levels}
    files = {file: file.stat().st_size for file in path.rglob("*") if file.is_file()}
    shutil.rmtree(path)
    planes = sum(size for file, size in files.items() if file.parent.name == "planes")
    return {"all": sum(files.values()), "planes": planes, **by_level}


def _quality(found: dict[str, Any], fp32: dict[str, Any]) -> str:
    if "cosine" in found:
        return f"{found['cosine']:.4f}"
    change = 100 * (found["right"] - fp32["right"]) / found["samples"]
    return f"{found['right']}/{found['samples']} ({change:+.1f})"


def _level_table(results: list[dict[str, Any]]) -> tuple[tuple[str, ...], list[list[str]]]:
    heads = ("model", "weights", "fp32", *(f"level {level}" for level in LEVELS), "build")
    rows = [
        [
            each["model"],
            f"{each['weights'] / 1e6:.2f} M",
            _quality(each["fp32"], each["fp32"]),
            *(_quality(each["levels"][level], each["fp32"]) for level in LEVELS),
            f"{each['build_s']:.0f} s",
        ]
        for each in results
    ]
    return heads, rows


def _plan_table(results: list[dict[str, Any]]) -> tuple[tuple[str, ...], list[list[str]]]:
    heads = ("model", "asked", "used", "plan", "best level of no more bits")
    rows = []
    for each in results:
        for bits in BITS:
            found = each["plans"][bits]
            level = max(level for level in LEVELS if level <= bits)
            uniform = _quality(each["levels"][level], each["fp32"])
            rows.append(
                [
                    each["model"],
                    f"{bits:.1f} bits",
                    f"{found['used_bits']:.2f} bits",
                    _quality(found, each["fp32"]),
                    f"level {level}: {uniform}",
                ]
            )
    return heads, rows


def _byte_table(results: list[dict[str, Any]]) -> tuple[tuple[str, ...], list[list[str]]]:
    heads = (
        "model",
        "8 over fp32",
        *(_set(levels) for levels in LEVEL_SETS[1:]),
        "4 saves",
        "2 saves",
    )
    rows = []
    for each in results:
        only8 = each["bank_bytes"][str((8,))]
        read = each["bank_bytes"][str((8, 4, 2))]
        saved = {level: 1 - read[str(level)] / read["8"] for level in (4, 2)}
        rows.append(
            [
                each["model"],
                f"{only8['planes'] / (4 * each['weights']):.3f}",
                *(
                    f"{each['bank_bytes'][str(levels)]['all'] / only8['all']:.3f}"
                    for levels in LEVEL_SETS[1:]
                ),
                f"{100 * saved[4]:.1f} %",
                f"{100 * saved[2]:.1f} %",
            ]
        )
    return heads, rows


def _set(levels: tuple[Level, ...]) -> str:
    return "{" + ", ".join(map(str, levels)) + "} over {8}"


if __name__ == "__main__":
    sys.exit(main())
