"""The command `bapq build`. Its heavy imports wait until it runs."""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bapq_edge.bank.coverage import Coverage
from bapq_edge.bank.reader import Bank
from bapq_edge.commands.options import add_json, parse_levels
from bapq_edge.units import counted, format_size

from ..build_support.extras import host_packages

if TYPE_CHECKING:
    from ..build import BuildReport

__all__ = ["add_build_command", "run_build"]


def add_build_command(commands: Any) -> None:
    """Add `build` to the subparsers of the `bapq` command."""
    build = commands.add_parser("build", help="compile an ONNX or TFLite model into a bank")
    build.add_argument(
        "model", type=Path, metavar="MODEL", help="model to compile: an .onnx or .tflite file"
    )
    build.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="OUT.bank",
        help="bank to write (default: beside MODEL, with its name)",
    )
    build.add_argument(
        "--calibration",
        type=Path,
        action="append",
        metavar="DATA.npz",
        help="one array per model input, samples on the first axis; .npy where there is one input; "
        "samples of other sizes: a folder of such files, or the option again",
    )
    build.add_argument(
        "--levels",
        help="levels to store, of 32, 8, 4, 2, 1 (default: the recipe's, or else 8,4,2,1)",
    )
    build.add_argument(
        "--recipe",
        type=Path,
        metavar="FILE.yaml",
        help="settings per layer, by name or pattern: levels, scale_columns, keep_in_float, "
        "prune_tau",
    )
    build.add_argument(
        "--prune-tau",
        type=float,
        metavar="T",
        help="make weights zero that are below T times the largest of their layer",
    )
    build.add_argument(
        "--external-data",
        type=Path,
        metavar="FOLDER",
        help="where the model's external data may lie besides the model's own folder",
    )
    build.add_argument(
        "--min-coverage",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="fail where less than this share of the weights, such as 0.9, goes into planes",
    )
    build.add_argument(
        "--fast",
        action="store_true",
        help="for a first look: round to nearest, without compensating errors",
    )
    build.add_argument(
        "--analyze",
        action="store_true",
        help="print the sensitive layers as a recipe; without -o no bank is left",
    )
    build.add_argument(
        "--workers",
        type=_positive,
        metavar="N",
        help="number of processes (default: one per core)",
    )
    build.add_argument(
        "--dask",
        metavar="ADDRESS",
        help="spread the work over the Dask cluster of this scheduler, such as tcp://host:8786",
    )
    build.add_argument("--quiet", action="store_true", help="show no progress and no summary")
    add_json(build, "the summary, or the analysis,")
    build.set_defaults(command=run_build)


def run_build(arguments: argparse.Namespace) -> None:
    """Build a bank and print the summary, or the analysis."""
    with tempfile.TemporaryDirectory(prefix="bapq-analyze-") as folder:
        beside = Path(folder) if arguments.analyze else arguments.model.parent
        out = arguments.output or beside / f"{arguments.model.stem}.bank"
        report = _build(arguments, out)
        if arguments.analyze:
            _print_analysis(arguments, out)
        elif arguments.json:
            print(json.dumps(dataclasses.asdict(report)))
        elif not arguments.quiet:
            print(_summary(report))


def _build(arguments: argparse.Namespace, out: Path) -> BuildReport:
    with host_packages():
        from ..build import build_bank
    levels = None if arguments.levels is None else parse_levels(arguments.levels, "8,4,2,1")
    return build_bank(
        arguments.model,
        out,
        calibration=arguments.calibration,
        levels=levels,
        recipe=arguments.recipe,
        prune_tau=arguments.prune_tau,
        external_data=arguments.external_data,
        min_coverage=arguments.min_coverage,
        fast=arguments.fast,
        workers=arguments.workers,
        dask=arguments.dask,
        progress=not arguments.quiet,
    )


def _print_analysis(arguments: argparse.Namespace, bank: Path) -> None:
    from ..analyze import analyze, to_yaml

    analysis = analyze(Bank.open(bank))
    if arguments.json:
        print(json.dumps(dataclasses.asdict(analysis)))
    else:
        print(to_yaml(analysis, arguments.model.name), end="")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 on")
    return int(text)


def _summary(report: BuildReport) -> str:
    seen = counted(report.calibration_samples, "calibration sample")
    lines = [
        f"{report.bank}: {counted(report.weights, 'weight')} in {counted(report.layers, 'layer')}, "
        f"{seen if report.calibration_samples else 'no calibration'}, "
        f"{counted(report.kept_in_float, 'node')} with weights kept in float",
        "planes: "
        + ", ".join(f"{plane} {format_size(size)}" for plane, size in report.plane_bytes.items()),
        "mean relative error: "
        + ", ".join(
            f"{error:.4f} at level {level}"
            for level, error in report.relative_error.items()
            if level != 32
        ),
        _pruning(report),
        "seconds: "
        + ", ".join(f"{name} {value:.1f}" for name, value in report.stage_seconds.items()),
        f"coverage: {Coverage(report.weights, report.weights_in_float)}",
    ]
    lines = [line for line in lines if line and not line.endswith(": ")]
    return "\n".join([*lines, *_expectation(report)])


def _expectation(report: BuildReport) -> list[str]:
    """What the plans of the bank do, as a table."""
    if not report.expected:
        return []
    kind = "held-out sample" if report.calibration_samples > 1 else "calibration sample"
    lines = [
        "",
        f"what you can expect, measured on {counted(report.measured_samples, kind)}:",
        f"{'plan':8}  {'bits':>5}  {report.measure:>9}  {'error':>7}  {'bytes':>10}",
    ]
    for row in report.expected:
        lines.append(
            f"{row.plan:8}  {row.bits:5.2f}  {row.answers:9.4f}  {row.error:7.4f}  "
            f"{format_size(row.weight_bytes):>10}"
        )
    what = "share of answers" if report.measure == "agreement" else "cosine of outputs"
    return [*lines, f"{report.measure}: {what} as the float model's; error: of the outputs"]


def _pruning(report: BuildReport) -> str:
    if not report.remaining_ratio:
        return ""
    layers = ", ".join(f"{name} {ratio:.3f}" for name, ratio in report.remaining_ratio.items())
    return (
        f"weights left by pruning: {report.remaining_ratio_in_all:.3f} of all, "
        f"{report.pruned_rows} rows are zero, {report.dropped_rows} of them not stored; "
        f"per layer: {layers}"
    )
