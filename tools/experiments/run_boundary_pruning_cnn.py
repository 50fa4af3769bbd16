"""Boundary pruning of a CNN on real images.

    python tools/experiments/run_boundary_pruning_cnn.py --dataset cifar10 --data-dir FOLDER \\
        --threshold 0.2 --batch-size 64 --runs 5 --output real_pruning_results.csv
    python tools/experiments/run_boundary_pruning_cnn.py --dataset digits

Each run trains a CNN with a seed of its own, unless --model names one, and prunes it in a process
of its own. `accuracy` is that of the pruned network on the test images, `accuracy_float` that
before; nothing is trained again after the pruning. FOLDER is the unpacked archive of CIFAR-10,
whose checksums are verified; the digits come with scikit-learn.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments.images_option import add_dataset, cnn_of, images_of
from experiments.pruning import prune_once, pruned_accuracy
from experiments.results import Parser, in_own_process, plot_means, run_script, write_results


def main(arguments: argparse.Namespace) -> None:
    """Train, prune, judge, write and draw."""
    images = images_of(arguments)
    rows = []
    for run in range(1, arguments.runs + 1):
        model = cnn_of(arguments, images, seed=run)
        for threshold in arguments.threshold:
            found = in_own_process(prune_once, model.SerializeToString(), threshold)
            before, after = pruned_accuracy(
                model, threshold, images.x_test, images.y_test, arguments.batch_size
            )
            scores = {"accuracy": after, "accuracy_float": before}
            rows.append({"run": run, **found, **scores, "threshold": threshold})
    summary = write_results(rows, ["threshold"], arguments.output)
    labels = {"param_ratio": "weights kept", "accuracy": "accuracy", "time_s": "seconds"}
    plot_means(summary, "threshold", labels, [], arguments.output.with_suffix(".svg"))


if __name__ == "__main__":
    parser = Parser(__doc__, "real_pruning_results.csv")
    parser.add_argument("--threshold", type=float, nargs="+", default=[0.2], help="default: 0.2")
    add_dataset(parser)
    sys.exit(run_script(main, parser))
