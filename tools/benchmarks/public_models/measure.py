"""All figures of one model: coverage, bytes, answers at every level and plan, memory and time."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from bapq_edge.bank.coverage import Coverage
from bapq_edge.bank.layout import LEVELS
from bapq_edge.bank.reader import Bank
from bapq_edge.errors import BapqError, CalibrationWarning
from bapq_tools import build_bank
from bapq_tools.evaluation.evaluate import Row, Subject, evaluate
from bapq_tools.onnx_graph.importers.tflite_file import convert_tflite, is_tflite

from .registry import PublicModel

__all__ = ["BITS", "SHOWN_LEVELS", "figures_of", "plan_rows", "sensitive"]

SHOWN_LEVELS = (8, 4, 2)
BITS = (2.5, 3.0, 3.5, 4.0, 5.0, 6.0)
_SCORES = Path(__file__).with_name("scores.py")


class MeasureError(RuntimeError):
    """A measurement in a process of its own ended badly."""


def figures_of(model: PublicModel, folder: Path, *, quick: bool = False) -> dict[str, Any]:
    """Build a bank of the model and measure it; `quick` leaves memory and time out.

    What is missing or refused is in the key `failed`, in a line.
    """
    about = {"model": model.name, "task": model.task, "package": model.package}
    folder.mkdir(parents=True, exist_ok=True)
    try:
        return {**about, **_measured(model, folder, quick)}
    except (BapqError, FileNotFoundError, MeasureError) as error:
        return {**about, "failed": f"{type(error).__name__}: {error}"}


def _measured(model: PublicModel, folder: Path, quick: bool) -> dict[str, Any]:
    source = model.source(folder)
    feeds = model.feeds(model.calibrate + model.judge, source)
    path, bank = folder / "model.onnx", folder / "model.bank"
    onnx.save(convert_tflite(source).model if is_tflite(source) else onnx.load(source), path)
    np.savez(folder / "single.npz", **feeds[-1])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CalibrationWarning)
        started_s = time.perf_counter()
        build_bank(
            path,
            bank,
            calibration=_parts(feeds[: model.calibrate], path),
            levels=LEVELS,
            progress=False,
        )
        build_s = time.perf_counter() - started_s
    subjects = [
        *(Subject(f"level {level}", {"level": level}) for level in LEVELS if level != 32),
        *(Subject(f"{bits:g} bits", {"bits": bits}) for bits in BITS),
    ]
    found = evaluate(
        bank,
        _parts(feeds[model.calibrate :], path),
        subjects,
        model=path,
        metric=f"{_SCORES}:{model.score}",
    )
    opened = Bank.open(bank)
    coverage = Coverage.of(opened.weights, opened.manifest.kept_in_float)
    figures: dict[str, Any] = {
        "measure": model.measure,
        "samples": found.samples,
        "weights": opened.weights,
        "coverage": coverage.share,
        "kept": coverage.in_float,
        "sensitive": sensitive(opened),
        "fp32_bytes": path.stat().st_size,
        "bytes": {
            str(level): opened.manifest.graph.bytes + opened.weight_bytes(level)
            for level in SHOWN_LEVELS
        },
        "build_s": build_s,
        "scores": {row.name: _score(row) for row in found.rows if row.scores},
    }
    if not quick:
        figures["memory_ratio"], figures["time_ratio"] = _costs(folder)
    return figures


def sensitive(bank: Bank) -> dict[str, dict[str, Any]]:
    """By level, the layer that costs most, and its share of the error that the bank expects."""
    table = bank.sensitivity()
    worst: dict[str, dict[str, Any]] = {}
    for column, level in enumerate(bank.manifest.levels):
        errors = {
            layer.name: float(table[layer.chunk_range, column].sum())
            for layer in bank.manifest.layers
        }
        name, total = max(errors, key=lambda each: errors[each]), sum(errors.values())
        if total > 0:
            worst[str(level)] = {"layer": name, "share": errors[name] / total}
    return worst


def _score(row: Row) -> dict[str, float | None]:
    (score,) = row.scores.values()
    return {
        "bits": row.bits_per_weight,
        "mean": score.mean,
        "low": score.low,
        "high": score.high,
    }


def _parts(feeds: list[dict[str, Any]], path: Path) -> list[dict[str, Any]]:
    """One part per sample, as they differ in size: arrays with the samples on the first axis."""
    model = onnx.load(path, load_external_data=False)
    fixed = {
        item.name
        for item in model.graph.input
        if not item.type.tensor_type.shape.dim or item.type.tensor_type.shape.dim[0].dim_value > 1
    }
    return [
        {name: value[None] if name in fixed else value for name, value in feed.items()}
        for feed in feeds
    ]


def _costs(folder: Path) -> tuple[dict[str, float], dict[str, float]]:
    """Peak memory and time of a run over those of ONNX Runtime in float32, by level."""

    def measured(kind: str, *more: str) -> Any:
        command = [sys.executable, "-m", "benchmarks.measure", kind, str(folder), *more]
        ended = subprocess.run(command, capture_output=True, text=True, env=os.environ)
        if ended.returncode:
            raise MeasureError(f"{' '.join(command)} failed: {ended.stderr.strip()[-300:]}")
        return json.loads(ended.stdout)

    floats = measured("memory", "fp32")
    memory = {str(level): measured("memory", str(level)) / floats for level in SHOWN_LEVELS}
    times = measured("latency", *map(str, SHOWN_LEVELS))
    return memory, {str(level): times[str(level)] for level in SHOWN_LEVELS}


def plan_rows(figures: dict[str, Any]) -> list[dict[str, Any]]:
    """Every plan beside the best level of no more bits, and whether it is worse beyond doubt.

    `lost` is what the level answers better, `lost_low` the lower bound of it at 95 %, out of the
    intervals of both (Newcombe, 1998, method 10): a plan is worse where that is above zero.
    """
    scores = figures["scores"]
    rows = []
    for bits in BITS:
        plan = scores[f"{bits:g} bits"]
        levels = {
            name: score
            for name, score in scores.items()
            if name.startswith("level ") and score["bits"] <= plan["bits"] + 1e-6
        }
        name = max(levels, key=lambda each: levels[each]["mean"])
        level = levels[name]
        lost = level["mean"] - plan["mean"]
        doubt = math.hypot(_half(level, "low"), _half(plan, "high"))
        rows.append(
            {
                "model": figures["model"],
                "asked": bits,
                "used": plan["bits"],
                "plan": plan["mean"],
                "level": name,
                "level_mean": level["mean"],
                "lost": lost,
                "lost_low": lost - doubt,
                "worse": lost - doubt > 1e-9,
            }
        )
    return rows


def _half(score: dict[str, Any], end: str) -> float:
    """Distance of the mean from an end of its interval; of one sample, none is known."""
    return math.inf if score[end] is None else abs(score["mean"] - score[end])
