"""What boundary models give: escalation, gates and targets, on samples that no fit has seen.

    PYTHONPATH=tools python -m benchmarks.boundary [NAME ...] [--format F] [--pictures FOLDER]

Digits: the 600 test images and four distorted copies of each; a split takes 400 images, with their
copies, to fit and the others to test. MiniLM: the 600 held-out sentences, 300 to fit. Five splits;
figures are mean and standard deviation over them. Banks hold levels 8, 4, 2 and 1.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from bapq_tools.build_support.progress import Progress

from .boundary_experiment import NAMES, RESIDENT_SHARE, Experiment
from .boundary_pictures import draw
from .tables import add_format, add_names, print_table

TABLES = (
    (
        "Escalation, beside the best static plan of no more bits",
        ("from:to", "asked", "bits", "answered again", "agreement", "clean", "static", "its bits"),
        "escalate",
    ),
    (
        "Gate, beside the best static plan of no more bits",
        ("asked", "bits", "agreement", "static", "its bits", "gain", "won"),
        "gate",
    ),
    (
        "Targets, on samples not seen: chosen by the session",
        ("target", "policies", "bits", "agreement", "worst split"),
        "targets",
    ),
    (
        f"On the device, weights in memory at most {RESIDENT_SHARE:.0%} of level 8's",
        ("policy", "bits", "answered again", "agreement", "resident", "read", "run", "again"),
        "device",
    ),
)


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="benchmarks.boundary")
    add_names(parser, NAMES)
    add_format(parser, "json")
    parser.add_argument("--pictures", type=Path, help="folder that pictures are drawn into")
    arguments = parser.parse_args()
    names = arguments.names or NAMES
    results = []
    with Progress(True).stage("models", len(names)) as advance:
        for name in names:
            experiment = Experiment(name)
            splits, fits = experiment.fits()
            results.append(experiment.measure(splits, fits))
            if arguments.pictures is not None:
                draw(experiment, splits, fits, arguments.pictures)
            experiment.study.close()
            advance()
    if arguments.format == "json":
        print(json.dumps(results, indent=1))
        return 0
    for title, heads, key in TABLES:
        rows = [[each["model"], *row] for each in results for row in each[key]]
        if rows:
            print_table(title, ("model", *heads), rows, arguments.format)
    return 0


if __name__ == "__main__":
    sys.exit(main())
