"""Predicted against measured error of plans, on samples that the build has not seen.

    PYTHONPATH=tools python -m benchmarks.plan_errors [NAME ...] [--format table|md|json]

Plans are the levels and mixtures of other bits than those that the build has measured. An error is
the squared relative error of the outputs (of a Softmax: of what goes into it), mean over outputs
and samples: what the planner predicts. Banks are those of `accuracy.py`, in .cache/bench; what is
missing there is built.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from bapq_edge import Session
from bapq_edge.bank.reader import Bank
from bapq_edge.planning.planner import Request, chunk_costs, plan
from bapq_tools import build_bank
from benchmarks.zoo import make_model

from .accuracy import LEVELS, NAMES
from .cases import Case, Feed, load_case
from .measure import open_runtime
from .models import WORK
from .tables import add_format, add_names, print_table

BITS = (1.3, 1.7, 2.2, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0, 6.0)
SAMPLES = 100


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="benchmarks.plan_errors", description=__doc__)
    add_names(parser, NAMES)
    add_format(parser, "json")
    arguments = parser.parse_args()
    results = [measure(name) for name in arguments.names or NAMES]
    if arguments.format == "json":
        print(json.dumps(results, indent=1))
        return 0
    heads = ("model", "plan", "bits", "predicted", "measured", "ratio")
    rows = [
        [
            each["model"],
            point["plan"],
            f"{point['bits']:.2f}",
            f"{point['predicted']:.3g}",
            f"{point['measured']:.3g}",
            f"{point['predicted'] / point['measured']:.2f}",
        ]
        for each in results
        for point in each["plans"]
    ]
    print_table("Squared relative error of plans", heads, rows, arguments.format)
    heads = ("model", "plans", "rank correlation", "median ratio")
    summary = [
        [
            each["model"],
            str(len(each["plans"])),
            f"{each['rank_correlation']:.3f}",
            f"{each['median_ratio']:.2f}",
        ]
        for each in results
    ]
    print_table("Predicted over measured", heads, summary, arguments.format)
    return 0


def measure(name: str) -> dict[str, Any]:
    """Predicted and measured errors of one model's plans, and how they go together."""
    folder = WORK / name
    bank = folder / "accuracy.bank"
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "model.onnx").exists():
        make_model(name, folder / "model.onnx")
    case = load_case(name, folder / "model.onnx")
    if not bank.exists():
        build_bank(
            folder / "model.onnx",
            bank,
            calibration=case.calibration,
            levels=LEVELS,
            progress=False,
        )
    plans = _errors(folder, bank, case)
    predicted, measured = (np.array([p[key] for p in plans]) for key in ("predicted", "measured"))
    ranks = (np.argsort(np.argsort(values)) for values in (predicted, measured))
    return {
        "model": name,
        "plans": plans,
        "rank_correlation": float(np.corrcoef(*ranks)[0, 1]),
        "median_ratio": float(np.median(predicted / measured)),
    }


def _errors(folder: Path, bank: Path, case: Case) -> list[dict[str, Any]]:
    """One entry per plan; plans that are the same at several bits count once."""
    feeds = _single_feeds(case)
    reference = open_runtime(folder, "fp32", threads=2)
    names = [value.name for value in reference.get_outputs() if value.type == "tensor(float)"]
    wanted = [reference.run(names, feed) for feed in feeds]
    costs = chunk_costs(Bank.open(bank))
    plans: dict[bytes, dict[str, Any]] = {}
    with Session(bank, threads=2) as session:
        for title, request in _requests():
            made = plan(costs, request)
            key = made.levels.tobytes()
            if key in plans:
                continue
            if request.bits is None:
                session.set_level(request.level)
            else:
                session.set_bits(request.bits)
            errors = [
                _relative_square_error(session.run(names, feed), expected)
                for feed, expected in zip(feeds, wanted, strict=True)
            ]
            plans[key] = {
                "plan": title,
                "bits": made.bits_per_weight,
                "predicted": made.predicted_error,
                "measured": float(np.mean(errors)),
            }
    return list(plans.values())


def _requests() -> list[tuple[str, Request]]:
    levels = [(f"level {level}", Request(level=level)) for level in LEVELS]
    return [*levels, *((f"{bits:g} bits", Request(bits=bits)) for bits in BITS)]


def _single_feeds(case: Case) -> list[Feed]:
    """Held-out inputs of one sample each."""
    feeds = [
        {name: array[i : i + 1] for name, array in feed.items()}
        for feed in case.held_out
        for i in range(len(next(iter(feed.values()))))
    ]
    return feeds[:: max(1, len(feeds) // SAMPLES)][:SAMPLES]


def _relative_square_error(found: list[np.ndarray], wanted: list[np.ndarray]) -> float:
    pairs = zip(map(_scores, found), map(_scores, wanted), strict=True)
    return float(np.mean([np.sum((a - b) ** 2) / np.sum(b**2) for a, b in pairs]))


def _scores(output: np.ndarray) -> np.ndarray:
    """The output in float64; of probabilities, the scores that a Softmax makes them from."""
    exact = output.astype(np.float64)
    sums_to_one = exact.ndim == 2 and exact.shape[1] > 1 and np.allclose(exact.sum(1), 1, atol=1e-4)
    if not sums_to_one or (exact < 0).any():
        return exact
    scores = np.log(np.maximum(exact, np.finfo(np.float32).smallest_subnormal))
    centred: np.ndarray = scores - scores.mean(axis=1, keepdims=True)
    return centred


if __name__ == "__main__":
    sys.exit(main())
