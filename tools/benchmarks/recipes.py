"""What the recipe of `bapq build --analyze` gives, against the planner on a bank without one.

PYTHONPATH=tools python -m benchmarks.recipes [MODEL] [--format table|md]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnxruntime as ort

from bapq_edge import Session
from bapq_edge.bank.reader import Bank
from bapq_tools import build_bank
from bapq_tools.analyze import analyze
from benchmarks.zoo import MODELS, make_model

from .cases import Case, judge, load_case
from .tables import add_format, print_table

RUN_AT = (4, 2)


def main() -> int:
    """Build, run and print."""
    parser = argparse.ArgumentParser(prog="benchmarks.recipes")
    parser.add_argument("model", nargs="?", choices=MODELS, default="minilm", metavar="MODEL")
    add_format(parser)
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        model, plain, spared = (Path(folder) / name for name in ("m.onnx", "a.bank", "b.bank"))
        make_model(arguments.model, str(model))
        case = load_case(arguments.model, model)
        reference = _reference(model, case)
        build_bank(model, plain, calibration=case.calibration, progress=False)
        recipe = analyze(Bank.open(plain)).recipe
        build_bank(model, spared, calibration=case.calibration, progress=False, recipe=recipe)
        for level in RUN_AT:
            for name, bank in (("no recipe", plain), ("recipe", spared)):
                precision = {"level": level}
                rows.append(
                    [f"level {level}, {name}", *_measured(bank, precision, case, reference)]
                )
            bits = float(rows[-1][1])
            rows.append(
                [f"{bits} bits, no recipe", *_measured(plain, {"bits": bits}, case, reference)]
            )
    title = f"{arguments.model}: {len(recipe['layers'])} layers in the recipe"
    print_table(title, ["run", "bits per weight", "answers"], rows, arguments.format)
    return 0


def _reference(model: Path, case: Case) -> list[np.ndarray]:
    session = ort.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    return [session.run([case.judged_output], feed)[0] for feed in case.held_out]


def _measured(
    bank: Path, precision: Mapping[str, float], case: Case, reference: list[np.ndarray]
) -> tuple[str, str]:
    """Nominal bits per weight, rounded up, and the quality of the answers."""
    with Session(bank, threads=1, **precision) as session:
        found = [session.run([case.judged_output], feed)[0] for feed in case.held_out]
        bits = np.ceil(1e3 * session.stats().bits_per_weight) / 1e3
    quality = judge(case, found, reference)
    return f"{bits:.3f}", ", ".join(f"{name} {value:.4g}" for name, value in quality.items())


if __name__ == "__main__":
    sys.exit(main())
