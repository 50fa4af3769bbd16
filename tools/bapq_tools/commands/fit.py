"""The command `bapq fit`. Its heavy imports wait until it runs."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from bapq_edge.commands.options import add_json
from bapq_edge.commands.paths import check_outside
from bapq_edge.errors import RequestError

from ..build_support.extras import host_packages

__all__ = ["add_fit_command", "run_fit"]


def add_fit_command(commands: Any) -> None:
    """Add `fit` to the subparsers of the `bapq` command."""
    fit = commands.add_parser("fit", help="fit boundary models: which inputs need more bits")
    fit.add_argument("bank", type=Path, metavar="BANK", help="directory of the bank")
    fit.add_argument(
        "--calibration",
        type=Path,
        action="append",
        required=True,
        metavar="DATA.npz",
        help="one array per model input, samples on the first axis; .npy where there is one input; "
        "samples of other sizes: a folder of such files, or the option again; best not those of "
        "the build",
    )
    fit.add_argument(
        "--model",
        type=Path,
        metavar="MODEL.onnx",
        help="float model that answers are to agree with (default: level 32 of the bank)",
    )
    fit.add_argument(
        "--target-agreement",
        type=float,
        metavar="A",
        help="fail unless held-out samples show this agreement, such as 0.995",
    )
    fit.add_argument(
        "--tap",
        action="append",
        default=[],
        metavar="NAME",
        help="tensor that the gate looks at; several are tried (default: found in the graph)",
    )
    fit.add_argument(
        "--agreement",
        metavar="KIND",
        help="how answers are compared: argmax, cosine or tolerance:X (default: as the output "
        "looks)",
    )
    fit.add_argument("--judge", metavar="OUTPUT", help="output that is judged, of several")
    fit.add_argument(
        "--escalate",
        nargs="+",
        default=[],
        metavar="FROM:TO",
        help="precisions to go from and to, such as 2:8, or 4.6b:8 from a plan of 4.6 bits "
        "(default: every level to the highest)",
    )
    rows = fit.add_argument_group("rows that a region can do without, in place of precisions")
    rows.add_argument(
        "--skip-rows",
        type=int,
        metavar="LEVEL",
        help="fit a gate that skips rows at this level; for classifiers",
    )
    rows.add_argument(
        "--tolerance",
        type=float,
        metavar="T",
        help="share of its answers that a region may lose by it (default: 0.01)",
    )
    fit.add_argument(
        "--confidence",
        type=float,
        default=0.9,
        metavar="C",
        help="confidence of the bounds (default: 0.9)",
    )
    fit.add_argument(
        "--seed", type=int, default=0, metavar="N", help="seed of the splits (default: 0)"
    )
    fit.add_argument(
        "--keep-all",
        action="store_true",
        help="keep models that a plan for all inputs makes needless at the target",
    )
    fit.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="OUT.bank",
        help="bank to write (default: BANK is replaced)",
    )
    fit.add_argument("--quiet", action="store_true", help="show no progress and no summary")
    add_json(fit, "the report")
    fit.set_defaults(command=run_fit)


def run_fit(arguments: argparse.Namespace) -> None:
    """Fit, write the bank, and print what was found."""
    bank, out = arguments.bank, arguments.output
    if out is not None and os.path.realpath(out) != os.path.realpath(bank):
        check_outside(bank, out)
    _check_rows(arguments)
    with host_packages("fitting a boundary model"):
        from ..boundary.fit import fit
        from ..row_skipping.fit_rows import fit_rows
    if arguments.skip_rows is not None:
        _print(
            arguments,
            fit_rows(
                bank,
                arguments.calibration,
                arguments.model,
                level=arguments.skip_rows,
                tolerance=0.01 if arguments.tolerance is None else arguments.tolerance,
                judge=arguments.judge,
                out=out,
                confidence=arguments.confidence,
                seed=arguments.seed,
                progress=not arguments.quiet,
            ),
        )
        return
    report = fit(
        bank,
        arguments.calibration,
        arguments.model,
        target_agreement=arguments.target_agreement,
        tap=arguments.tap,
        agreement=arguments.agreement,
        judge=arguments.judge,
        escalate=arguments.escalate,
        out=out,
        confidence=arguments.confidence,
        seed=arguments.seed,
        keep_all=arguments.keep_all,
        progress=not arguments.quiet,
    )
    _print(arguments, report)


def _check_rows(arguments: argparse.Namespace) -> None:
    """Refuse options that mean nothing beside each other."""
    if arguments.skip_rows is None:
        if arguments.tolerance is not None:
            raise RequestError("--tolerance is for --skip-rows: name its level, or leave it out")
        return
    for name in ("target_agreement", "tap", "agreement", "escalate", "keep_all"):
        if getattr(arguments, name):
            option = "--" + name.replace("_", "-")
            raise RequestError(f"{option} is for precisions, not for --skip-rows: leave one out")


def _print(arguments: argparse.Namespace, report: Any) -> None:
    if arguments.json:
        print(json.dumps(dataclasses.asdict(report)))
    elif not arguments.quiet:
        print(report)
