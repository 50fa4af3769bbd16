"""`bapq inspect`: what a bank holds."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from typing import Any

from ..adaptive.boundary_model import BoundaryModel
from ..bank.boundary import StaticPoint
from ..bank.coverage import Coverage
from ..bank.layer import Layer
from ..bank.layout import Level
from ..bank.manifest import Expected
from ..bank.reader import Bank
from ..errors import RequestError
from ..units import counted, format_size
from .options import add_bank, add_json

__all__ = ["add_inspect"]

_BAR_LENGTH = 40


def add_inspect(commands: Any) -> None:
    """Add `inspect`."""
    command = commands.add_parser("inspect", help="show what a bank holds")
    add_bank(command)
    add_json(command, "the manifest")
    command.add_argument(
        "--plot", action="store_true", help="draw what plans lose, by bits per weight"
    )
    command.set_defaults(command=_inspect)


def _inspect(arguments: argparse.Namespace) -> None:
    bank = Bank.open(arguments.bank)
    manifest = bank.manifest
    if arguments.json:
        print(manifest.to_json().decode(), end="")
        return
    print(f"{bank.path}: {manifest.model.name}, made by {manifest.model.producer}")
    calibration = manifest.calibration
    seen = counted(calibration.samples, "calibration sample") if calibration else "no calibration"
    layers = counted(len(manifest.layers), "layer")
    print(f"{counted(bank.weights, 'weight')} in {layers}, {seen}")
    print(f"digest {manifest.digest}\n")
    print("level  bits/weight  bytes in memory")
    for level in bank.levels:
        size = format_size(bank.weight_bytes(level))
        print(f"{level:5}  {bank.bits_per_weight(level):11.2f}  {size:>15}")
    if manifest.expected is not None:
        _show_expected(manifest.expected, arguments.plot)
    elif arguments.plot:
        raise RequestError(
            f"{bank.path} tells nothing of its plans: build it with calibration data"
        )
    levels = [level for level in bank.levels if level != 32]
    errors = "".join(f"  {f'error@{level}':>8}" for level in levels)
    width = max(len(layer.name) for layer in manifest.layers)
    print(f"\n{'layer':{width}}  {'operator':14}  {'rows x columns':>15}  chunks{errors}")
    for layer in manifest.layers:
        whole = layer.stored_rows == layer.rows
        rows = str(layer.rows) if whole else f"{layer.stored_rows} of {layer.rows}"
        shape = f"{rows} x {layer.columns}"
        values = "".join(f"  {_error(layer, level):>8}" for level in levels)
        operators = "+".join(layer.operators)
        print(f"{layer.name:{width}}  {operators:14}  {shape:>15}  {layer.chunk_count:6}{values}")
    if levels:
        print("\nerror: relative, of the layer's output; codes: c compensated, n nearest")
    if manifest.static:
        _show_static(manifest.static)
    for entry in manifest.boundary:
        _show_boundary(BoundaryModel.of(bank, entry.model))
    if manifest.kept_in_float:
        print("\nkept in float by the graph engine:")
        width = max(len(node.name) for node in manifest.kept_in_float)
        for node in manifest.kept_in_float:
            print(f"  {node.name:{width}}  {node.operator:14} {node.weights:>10,}  {node.reason}")
    print(f"\ncoverage: {Coverage.of(bank.weights, manifest.kept_in_float)}")


def _show_expected(expected: Expected, plot: bool) -> None:
    """What plans lose; with bars, on a scale of decades, if it is to be drawn."""
    which = "held-out sample" if expected.held_out else "calibration sample"
    print(f"\nwhat plans lose, measured on {counted(expected.samples, which)}:")
    print(f"  bits  {'plan':8}  {expected.measure:>9}  {'error':>8}")
    errors = [point.error for point in expected.points]
    least = min((error for error in errors if error > 0), default=1.0)
    decades = math.log10(max(max(errors), least) / least) or 1.0
    for point in expected.points:
        plan = f"level {point.level}" if point.level else "mixed"
        line = f"{point.bits:6.2f}  {plan:8}  {point.answers:9.4f}  {math.sqrt(point.error):8.4f}"
        if plot:
            share = math.log10(max(point.error, least) / least) / decades
            line += "  " + "#" * (1 + round(share * (_BAR_LENGTH - 1)))
        print(line)
    if plot:
        print("bars: logarithm of the error; a level drops below the mixtures where it does better")


def _show_static(points: Sequence[StaticPoint]) -> None:
    print("\nplans for all inputs, as a fit has measured them:")
    print("    bits  agreement  bound   plan")
    for point in sorted(points, key=lambda point: point.bits):
        figures = f"{point.bits:8.2f}  {point.agreement:9.4f}  {point.agreement_bound:.4f}"
        print(f"{figures}  {point.precision}")


def _show_boundary(model: BoundaryModel) -> None:
    about = model.description
    kind = "gate" if about.stage != "answer" else "escalate"
    print(
        f"\nboundary model {about.name}: {kind} at {about.tap}, {about.kind} of "
        f"{counted(about.regions, 'region')}, held out {counted(about.samples, 'sample')}"
    )
    print(f"    bits  agreement  at {about.confidence:.0%} confidence")
    for point in model.points:
        print(f"{point.bits:8.2f}  {point.agreement:9.4f}  {point.agreement_bound:.4f} or more")


def _error(layer: Layer, level: Level) -> str:
    if level not in layer.levels:
        return "-"
    return f"{layer.relative_error[level]:.4f} {layer.method[level][0]}"
