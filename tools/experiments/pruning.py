"""What static pruning leaves of the bundled models: right answers of 600, by tau and level.

python -m bapq_tools.experiments.pruning [-o table|md]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from bapq_edge import Session
from bapq_edge.bank.layout import LEVELS
from bapq_tools.build import build
from bapq_tools.zoo.digits import digits_cnn_path, digits_mlp_path

from .cases import Case, judge, load_case
from .tables import print_table

TAUS = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2)
MODELS = {"digits_cnn": digits_cnn_path(), "digits_mlp": digits_mlp_path()}


def main() -> int:
    """Build, run and print."""
    parser = argparse.ArgumentParser(prog="bapq_tools.experiments.pruning")
    style = "table" if sys.stdout.isatty() else "md"
    parser.add_argument("-o", dest="style", choices=("table", "md"), default=style)
    arguments = parser.parse_args()
    heads = ["tau", "weights left", "zero rows", *(f"level {level}" for level in LEVELS)]
    for name, path in MODELS.items():
        case = load_case(name, path)
        rows = []
        with tempfile.TemporaryDirectory() as folder:
            bank = Path(folder) / "pruned.bank"
            for tau in TAUS:
                report = build(path, bank, case.calibration, LEVELS, progress=False, prune_tau=tau)
                left = f"{100 * report.remaining_ratio_in_all:.1f} %"
                right = [str(_right(bank, level, case)) for level in LEVELS]
                rows.append([f"{tau:g}", left, str(report.pruned_rows), *right])
        print_table(f"{name}, right of 600", heads, rows, arguments.style)
    return 0


def _right(bank: Path, level: int, case: Case) -> int:
    with Session(bank, level=level, threads=1) as session:
        outputs = [session.run([case.judged_output], feed)[0] for feed in case.held_out]
    return int(judge(case, outputs, outputs)["right"])


if __name__ == "__main__":
    sys.exit(main())
