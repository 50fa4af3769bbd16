"""Nested levels of an MLP with random weights: answers, memory, time and switches.

    python tools/experiments/run_quantization_switching_synthetic.py --runs 5 --output switching.csv

The right answer to an input is float32's class; inputs are normal. Rows are levels 8, 4, 2, 1 and
float32 in ONNX Runtime, each run in a process of its own. Beside the file stand the summary, the
switches (down to a level, and up again) and a scripted trace of budgets for the weights.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import onnx

from bapq_tools import build_bank
from experiments.networks import MLP_SIZES, synthetic_mlp
from experiments.results import Parser, run_script
from experiments.switching import FLOAT, Task
from experiments.switching_report import report_switching

_SAMPLES = 1000


def main(arguments: argparse.Namespace) -> None:
    """Build, measure, write and draw."""
    random = np.random.default_rng(0)
    x, calibration = random.standard_normal((2, _SAMPLES, MLP_SIZES[0]), np.float32)
    with tempfile.TemporaryDirectory() as folder:
        model, bank = Path(folder) / "mlp.onnx", Path(folder) / "mlp.bank"
        onnx.save(synthetic_mlp(arguments.weights, seed=0), model)
        build_bank(model, bank, calibration={"x": calibration}, progress=False)
        task = Task(model, bank, {"x": x[:1]}, [{"x": x}], "scores")
        (answers,) = (found.argmax(1) for found in task.answers(task.open(FLOAT)))
        report_switching(
            dataclasses.replace(task, labels=answers), arguments.runs, arguments.output
        )


if __name__ == "__main__":
    parser = Parser(__doc__, "synthetic_switching_results.csv")
    choices = ("uniform", "normal")
    parser.add_argument("--weights", choices=choices, default="normal", help="default: normal")
    sys.exit(run_script(main, parser))
