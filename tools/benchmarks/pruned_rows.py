"""What reordered and skipped rows cost and save: single layers, one thread.

    PYTHONPATH=tools python -m benchmarks.pruned_rows [--format table|md]

Each layer runs as built, with its rows in a random order, and with every second chunk skipped; then
in turn on two plans that skip one half each: a switch of regions at every run.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from bapq_edge import Session
from bapq_edge.bank.layout import PLANES, PLANES_OF_LEVEL, Level
from bapq_edge.bank.reader import Bank
from bapq_edge.bank.writer import BankWriter
from bapq_edge.errors import UncalibratedWarning
from bapq_tools import build_bank

from .tables import add_format, print_table

LEVELS: tuple[Level, ...] = (8, 4)
ROUNDS = 5
ROUND_S = 0.2


@dataclass(frozen=True)
class _Case:
    operator: str
    weight: tuple[int, ...]
    x: tuple[int, ...]
    attributes: dict[str, Any] = field(default_factory=dict)


CASES = (  # of two or more chunks each
    _Case("MatMul", (384, 1536), (1, 384)),
    _Case("MatMul", (384, 1536), (64, 384)),
    _Case("MatMul", (1536, 384), (64, 1536)),
    _Case("MatMul", (128, 4096), (64, 128)),
    _Case("Conv", (1024, 512, 1, 1), (1, 512, 14, 14)),
    _Case("Conv", (256, 256, 3, 3), (1, 256, 14, 14), {"pads": [1, 1, 1, 1]}),
)


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="benchmarks.pruned_rows")
    add_format(parser)
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for number, case in enumerate(CASES):
            plain, reordered = (Path(folder) / f"{number}{name}.bank" for name in ("", "r"))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UncalibratedWarning)  # only times are looked at
                build_bank(_model(case), plain, levels=LEVELS, progress=False)
            _reorder(plain, reordered)
            rows += [_measure(case, plain, reordered, level) for level in LEVELS]
    heads = ("layer", "level", "in order", "reordered", "half skipped", "and switched")
    print_table("Time of a run, the best of many", heads, rows, arguments.format)
    return 0


def _model(case: _Case) -> onnx.ModelProto:
    """The layer between an input and an output."""
    weight = np.random.default_rng(0).standard_normal(case.weight).astype(np.float32)
    node = helper.make_node(case.operator, ["x", "w"], ["y"], **case.attributes)
    graph = helper.make_graph(
        [node],
        "layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, case.x)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(weight, "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def _reorder(source: Path, target: Path) -> None:
    """The same bank with its layer's rows stored in a random order."""
    bank = Bank.open(source)
    (layer,) = bank.manifest.layers
    order = np.random.default_rng(0).permutation(layer.rows).astype(np.uint32)
    stored = bank.layer_codes(layer).of_rows(order)
    with BankWriter(target, levels=bank.levels, source=bank.manifest.model) as writer:
        writer.add_layer(layer, stored, sensitivity=bank.sensitivity(), row_order=order)
        writer.finish(bank.graph_bytes())


def _measure(case: _Case, plain: Path, reordered: Path, level: Level) -> list[str]:
    """One row of the table."""
    feed = {"x": np.random.default_rng(0).standard_normal(case.x, np.float32)}
    with (
        Session(plain, level=level, threads=1) as session,
        Session(reordered, level=level, threads=1) as other,
    ):

        def run() -> None:
            session.run(None, feed)

        in_order, scattered = _best_s(run, lambda: other.run(None, feed))
        internals = session.internals
        published = internals.replanner.plans
        plan = published.main_plan
        chunks = len(plan.levels)
        region = internals.store.add_region(np.zeros(_rows(plain), np.float32))
        planes = sum(1 << list(PLANES).index(plane) for plane in PLANES_OF_LEVEL[level])
        plans = [
            replace(
                plan,
                levels=np.where(np.arange(chunks) % 2 == half, 0, plan.levels).astype(np.uint8),
                region=region,
                kept=np.full(chunks, planes, np.uint8),
            )
            for half in (0, 1)
        ]

        def switch_and_run() -> None:
            plans.reverse()
            internals.replanner.adopt(replace(published, by_precision={None: plans[0]}))
            run()

        switched, skipping = _best_s(switch_and_run, run)
    shape = " x ".join(map(str, case.weight))
    return [
        f"{case.operator} {shape} on {' x '.join(map(str, case.x))}, {chunks} chunks",
        str(level),
        f"{1e6 * in_order:.0f} µs",
        f"{1e6 * scattered:.0f} µs ({100 * (scattered / in_order - 1):+.0f} %)",
        f"{1e6 * skipping:.0f} µs",
        f"{1e6 * switched:.0f} µs",
    ]


def _rows(path: Path) -> int:
    return sum(layer.stored_rows for layer in Bank.open(path).manifest.layers)


def _best_s(*actions: Callable[[], object]) -> list[float]:
    """Shortest time of each, in seconds; they take turns, since the machine's mood changes."""
    best = [float("inf")] * len(actions)
    for _ in range(ROUNDS):
        for i, action in enumerate(actions):
            action()
            end = time.perf_counter() + ROUND_S
            while (begin := time.perf_counter()) < end:
                action()
                best[i] = min(best[i], time.perf_counter() - begin)
    return best


if __name__ == "__main__":
    sys.exit(main())
