"""Boundary pruning of an MLP with random weights, 784-512-256-10.

    python tools/experiments/run_boundary_pruning_synthetic.py --runs 5 --output pruning.csv
    python tools/experiments/run_boundary_pruning_synthetic.py \\
        --threshold 0.1 0.15 0.2 0.25 0.3 --weights uniform normal --output pruning_sweep.csv

A weight stays where its magnitude is at least the threshold times the largest of its layer. Of
uniform weights that is 1 - threshold of them: 80 % at 0.2. Of normal ones it is far fewer, and the
fewer the larger the layer, as the largest of more draws is larger. Each run has weights of its own
and a process of its own.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments.networks import synthetic_mlp
from experiments.pruning import prune_once
from experiments.results import Parser, in_own_process, plot_means, run_script, write_results


def main(arguments: argparse.Namespace) -> None:
    """Prune, write and draw."""
    rows = []
    for weights in arguments.weights:
        for threshold in arguments.threshold:
            for run in range(1, arguments.runs + 1):
                model = synthetic_mlp(weights, seed=run).SerializeToString()
                found = in_own_process(prune_once, model, threshold)
                rows.append({"run": run, **found, "threshold": threshold, "weights": weights})
    summary = write_results(rows, ["weights", "threshold"], arguments.output)
    labels = {"param_ratio": "weights kept", "time_s": "seconds", "peak_mem_mb": "peak memory, MB"}
    plot_means(summary, "threshold", labels, ["weights"], arguments.output.with_suffix(".svg"))


if __name__ == "__main__":
    parser = Parser(__doc__, "synthetic_pruning_results.csv")
    parser.add_argument("--threshold", type=float, nargs="+", default=[0.2], help="default: 0.2")
    choices = ("uniform", "normal")
    parser.add_argument(
        "--weights", nargs="+", choices=choices, default=["uniform"], help="default: uniform"
    )
    sys.exit(run_script(main, parser))
