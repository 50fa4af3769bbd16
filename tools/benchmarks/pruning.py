"""What static pruning leaves of the bundled models, and what it saves where whole rows are zero.

PYTHONPATH=tools python -m benchmarks.pruning [--format table|md]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from bapq_edge import Session
from bapq_edge.bank.layout import LEVELS
from bapq_edge.bank.reader import Bank
from bapq_tools import build_bank
from benchmarks.zoo.digits import digits_cnn_path, digits_mlp_path

from .cases import Case, judge, load_case
from .tables import add_format, print_table

TAUS = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2)
SHARES = (0.0, 0.125, 0.25, 0.5)
"""Shares of the rows of every hidden layer that are zeroed, the weakest first."""
MODELS = {"digits_cnn": digits_cnn_path(), "digits_mlp": digits_mlp_path()}


def main() -> int:
    """Build, run and print."""
    parser = argparse.ArgumentParser(prog="benchmarks.pruning")
    add_format(parser)
    arguments = parser.parse_args()
    levels = [f"level {level}" for level in LEVELS]
    heads = ["tau", "weights left", "zero rows", "not stored", *levels]
    for name, path in MODELS.items():
        case = load_case(name, path)
        rows = []
        with tempfile.TemporaryDirectory() as folder:
            bank = Path(folder) / "pruned.bank"
            for tau in TAUS:
                report = build_bank(
                    path,
                    bank,
                    calibration=case.calibration,
                    levels=LEVELS,
                    progress=False,
                    prune_tau=tau,
                )
                left = f"{100 * report.remaining_ratio_in_all:.1f} %"
                zero, dropped = str(report.pruned_rows), str(report.dropped_rows)
                rows.append([f"{tau:g}", left, zero, dropped, *_right(bank, case)])
        print_table(f"{name}, right of 600", heads, rows, arguments.format)
    heads = ["hidden rows zeroed", "not stored", "bytes at level 4", *levels]
    print_table("digits_mlp, right of 600", heads, list(_whole_rows()), arguments.format)
    return 0


def _whole_rows() -> Iterator[list[str]]:
    """A row of the table per share."""
    case = load_case("digits_mlp", MODELS["digits_mlp"])
    with tempfile.TemporaryDirectory() as folder:
        bank = Path(folder) / "rows.bank"
        for share in SHARES:
            model = onnx.load(MODELS["digits_mlp"])
            zeroed = sum(_zero_rows(tensor, share) for tensor in model.graph.initializer)
            report = build_bank(
                model,
                bank,
                calibration=case.calibration,
                levels=LEVELS,
                progress=False,
                prune_tau=1e-6,
            )
            counts = f"{zeroed} of 192", str(report.dropped_rows)
            yield [*counts, str(Bank.open(bank).weight_bytes(4)), *_right(bank, case)]


def _zero_rows(tensor: onnx.TensorProto, share: float) -> int:
    """Zero a share of the rows of a hidden layer's weights; how many."""
    weight = numpy_helper.to_array(tensor).copy()  # (columns, rows): the right factor of a MatMul
    if weight.ndim != 2 or min(weight.shape) < 64:  # a bias, or the last layer
        return 0
    count = int(share * weight.shape[1])
    weight[:, np.argsort(np.linalg.norm(weight, axis=0))[:count]] = 0
    tensor.CopyFrom(numpy_helper.from_array(weight, tensor.name))
    return count


def _right(bank: Path, case: Case) -> list[str]:
    """Right answers at every level."""
    counts = []
    for level in LEVELS:
        with Session(bank, level=level, threads=1) as session:
            outputs = [session.run([case.judged_output], feed)[0] for feed in case.held_out]
        counts.append(str(int(judge(case, outputs, outputs)["right"])))
    return counts


if __name__ == "__main__":
    sys.exit(main())
