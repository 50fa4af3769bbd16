"""`bapq inspect`, `verify`, `install`, `unpack` and `pack`: what looks at a bank or copies it."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from ..adaptive.boundary_model import BoundaryModel
from ..bank.exchange import pack, unpack
from ..bank.install import install
from ..bank.layer import Layer
from ..bank.layout import Level
from ..bank.reader import Bank
from ..bank.verify import verify
from ..errors import BankIntegrityError, UnknownLevelError
from ..units import format_size

__all__ = ["add_exchange", "add_inspect", "add_install", "add_verify"]


def add_inspect(commands: Any) -> None:
    """Add `inspect`."""
    inspect = commands.add_parser("inspect", help="show what a bank holds")
    inspect.add_argument("bank", type=Path)
    inspect.add_argument("--json", action="store_true", help="print the manifest as JSON")
    inspect.set_defaults(command=_inspect)


def _inspect(arguments: argparse.Namespace) -> None:
    bank = Bank.open(arguments.bank)
    manifest = bank.manifest
    if arguments.json:
        print(manifest.to_json().decode(), end="")
        return
    print(f"{bank.path}: {manifest.model.name}, made by {manifest.model.producer}")
    calibration = manifest.calibration
    seen = f"{calibration.samples} calibration samples" if calibration else "no calibration"
    print(f"{bank.weights:,} weights in {len(manifest.layers)} layers, {seen}\n")
    print("level  bits/weight  bytes in memory")
    for level in bank.levels:
        size = format_size(bank.weight_bytes(level))
        print(f"{level:5}  {bank.bits_per_weight(level):11.2f}  {size:>15}")
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
    for entry in manifest.boundary:
        _show_boundary(BoundaryModel.of(bank, entry.model))
    if manifest.kept_in_float:
        print("\nkept in float by the graph engine:")
        width = max(len(node.name) for node in manifest.kept_in_float)
        for node in manifest.kept_in_float:
            print(f"  {node.name:{width}}  {node.operator:14} {node.weights:>10,}  {node.reason}")


def _show_boundary(model: BoundaryModel) -> None:
    about = model.description
    kind = "gate" if about.stage != "answer" else "escalate"
    print(
        f"\nboundary model {about.name}: {kind} at {about.tap}, {about.kind} of {about.regions} "
        f"regions, held out {about.samples} samples"
    )
    print(f"    bits  agreement  at {about.confidence:.0%} confidence")
    for point in model.points:
        print(f"{point.bits:8.2f}  {point.agreement:9.4f}  {point.agreement_bound:.4f} or more")


def _error(layer: Layer, level: Level) -> str:
    if level not in layer.levels:
        return "-"
    return f"{layer.relative_error[level]:.4f} {layer.method[level][0]}"


def add_verify(commands: Any) -> None:
    """Add `verify`."""
    command = commands.add_parser("verify", help="check every byte of a bank")
    command.add_argument("bank", type=Path)
    command.set_defaults(command=_verify)


def _verify(arguments: argparse.Namespace) -> None:
    report = verify(arguments.bank)
    if not report.ok:
        raise BankIntegrityError(str(report))
    print(report)


# ---- install ----


def add_install(commands: Any) -> None:
    """Add `install`."""
    command = commands.add_parser(
        "install", help="copy a bank to its place, or update it; safe against power cuts"
    )
    command.add_argument("new", type=Path, help="the bank to copy, such as on a USB stick")
    command.add_argument("bank", type=Path, help="its place; a bank that stands there is replaced")
    command.add_argument("--levels", help="install only the planes of these, such as 4,2,1")
    command.add_argument("--json", action="store_true", help="print the result as JSON")
    command.set_defaults(command=_install)


def _install(arguments: argparse.Namespace) -> None:
    progress = _Progress(sys.stderr.isatty())
    try:
        report = install(
            arguments.new,
            arguments.bank,
            levels=None if arguments.levels is None else _levels(arguments.levels),
            progress=progress.show,
        )
    finally:
        progress.clear()
    if arguments.json:
        print(json.dumps(dataclasses.asdict(report), default=str))
    else:
        print(report)


def _levels(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UnknownLevelError(
            f"--levels {text!r} is not a list of levels; write it as 4,2,1"
        ) from None


class _Progress:
    """A line on the terminal that tells how far a copy is; nothing where there is none."""

    def __init__(self, enabled: bool) -> None:
        self._enabled = enabled
        self._shown = -1

    def show(self, done_bytes: int, total_bytes: int) -> None:
        """Tell how far it is."""
        percent = 100 * done_bytes // total_bytes
        if self._enabled and percent != self._shown:
            self._shown = percent
            line = f"installing: {percent:3} % of {format_size(total_bytes)}"
            print(f"\r{line}", end="", file=sys.stderr, flush=True)

    def clear(self) -> None:
        """Take the line away."""
        if self._shown >= 0:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


# ---- unpack, pack ----


def add_exchange(commands: Any) -> None:
    """Add `unpack` and `pack`."""
    command = commands.add_parser("unpack", help="write a bank as a tree of .npy files")
    command.add_argument("bank", type=Path)
    command.add_argument("directory", type=Path)
    command.set_defaults(command=_unpack)
    command = commands.add_parser("pack", help="make a bank of a tree that unpack wrote")
    command.add_argument("directory", type=Path)
    command.add_argument("bank", type=Path)
    command.set_defaults(command=_pack)


def _unpack(arguments: argparse.Namespace) -> None:
    print(unpack(arguments.bank, arguments.directory))


def _pack(arguments: argparse.Namespace) -> None:
    print(pack(arguments.directory, arguments.bank))
