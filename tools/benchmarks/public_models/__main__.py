"""Trained public models as banks: coverage, bytes, answers, memory and time beside float32.

    make bench-models
    PYTHONPATH=tools python -m benchmarks.public_models [NAME ...] [--format md|json] [--quick]
                                                        [--stored] [-o FOLDER]

Each is calibrated with some samples and judged on others, in the measure of its task: how far its
answers are those of the float model. A name is one of the table, or a part of it. Figures are kept
beside the banks in .cache/bench/public, one figures.json a model.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from bapq_tools.build_support.progress import Progress
from benchmarks.models import WORK
from benchmarks.tables import add_format

from .measure import figures_of
from .registry import MODELS, PublicModel
from .table import print_tables, write_files


def main() -> int:
    """Measure and print; 1 where a model is missing or refused."""
    parser = argparse.ArgumentParser(prog="benchmarks.public_models", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="models to try (default: all)")
    parser.add_argument("--quick", action="store_true", help="no memory, no time")
    parser.add_argument("--stored", action="store_true", help="take figures that were kept")
    parser.add_argument("-o", "--output", type=Path, help="a folder for a page and the figures")
    add_format(parser, "json")
    arguments = parser.parse_args()
    chosen = [
        model
        for model in MODELS
        if not arguments.names
        or any(name.lower() in model.name.lower() for name in arguments.names)
    ]
    if not chosen:
        parser.error(
            f"no model {arguments.names[0]!r}; there are {', '.join(m.name for m in MODELS)}"
        )
    results = []
    for model in chosen:
        with Progress(True).stage(model.name, 1) as advance:
            results.append(_figures(model, arguments.quick, arguments.stored))
            advance()
    if arguments.output is not None:
        write_files(results, arguments.output)
    if arguments.format == "json":
        print(json.dumps(results, indent=1))
    else:
        print_tables(results, arguments.format)
    return 1 if any("failed" in each for each in results) else 0


def _figures(model: PublicModel, quick: bool, stored: bool) -> dict[str, Any]:
    """Those that were kept, where they are wanted, or new ones."""
    folder = WORK / "public" / model.name.lower().replace(" ", "-")
    kept = folder / "figures.json"
    if stored and kept.exists():
        figures: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8"))
        return figures
    figures = figures_of(model, folder, quick=quick)
    if "failed" not in figures:
        kept.write_text(json.dumps(figures, indent=1), encoding="utf-8")
    return figures


if __name__ == "__main__":
    sys.exit(main())
