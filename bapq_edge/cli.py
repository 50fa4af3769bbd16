"""The `bapq` command. Every command is one function; errors leave through `main` alone."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
import traceback
from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import numpy as np

from . import __version__
from .bank.exchange import pack, unpack
from .bank.reader import Bank
from .bank.verify import verify
from .engine.native import library_path
from .errors import BankIntegrityError, BapqError, RunInputError, StorageError
from .session import Session
from .units import format_size

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code, that of the error's class when it failed."""
    try:
        library_path()  # a 32-bit Python or a broken install says so before anything else
        parsed = _parser().parse_args(arguments)
        parsed.command(parsed)
        return 0
    except BapqError as error:
        if os.environ.get("BAPQ_DEBUG") == "1":
            traceback.print_exc()
        print(f"bapq: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("bapq: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bapq", description="Models in nested precisions, for boards they do not fit."
    )
    parser.add_argument("--version", action="version", version=f"bapq {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    # The host tools bring `build`; on a device they may be absent.
    for entry in sorted(entry_points(group="bapq.commands"), key=lambda entry: entry.name):
        entry.load()(commands)
    _add_run(commands)
    _add_inspect(commands)
    _add_verify(commands)
    _add_exchange(commands)
    return parser


# ---- run ----


def _add_run(commands: Any) -> None:
    run = commands.add_parser("run", help="run a bank on inputs from a file")
    run.add_argument("bank", type=Path)
    run.add_argument("--input", required=True, type=Path, help=".npz, one array per model input")
    run.add_argument("--output", type=Path, help=".npz to write, one array per model output")
    run.add_argument(
        "--budget", metavar="SIZE", help="what the process may grow by, such as 64MiB, or auto"
    )
    precision = run.add_mutually_exclusive_group()
    precision.add_argument("--level", default="auto", help="auto, 32, 8, 4, 2 or 1 (default: auto)")
    precision.add_argument("--bits", type=float, help="bits per weight on average, such as 3.5")
    run.add_argument("--threads", type=int)
    run.add_argument("--json", action="store_true", help="print the report as JSON")
    run.set_defaults(command=_run)


def _run(arguments: argparse.Namespace) -> None:
    feed = _load_feed(arguments.input)
    started_s = time.perf_counter()
    with Session(
        arguments.bank,
        memory_budget=arguments.budget,
        level=arguments.level,
        bits=arguments.bits,
        threads=arguments.threads,
    ) as session:
        load_s = time.perf_counter() - started_s
        started_s = time.perf_counter()
        outputs = session.run(None, feed)
        run_s = time.perf_counter() - started_s
        names = [value.name for value in session.get_outputs()]
        stats = session.stats()
    if arguments.output:
        try:
            np.savez(arguments.output, **dict(zip(names, outputs, strict=True)))
        except OSError as error:
            raise StorageError(f"{arguments.output} cannot be written: {error}") from error
    report = {"load_ms": load_s * 1e3, "run_ms": run_s * 1e3, **dataclasses.asdict(stats)}
    if arguments.json:
        print(json.dumps(report))
        return
    precision = f"{stats.bits_per_weight:.2f} bits per weight"
    print(f"load {load_s * 1e3:.1f} ms, run {run_s * 1e3:.1f} ms at {precision}")
    print(
        f"weights in memory {format_size(stats.resident_bytes)}, "
        f"read {format_size(stats.streamed_bytes)}, "
        f"process grew by {format_size(stats.peak_bytes)} at its peak"
    )
    for name, value in zip(names, outputs, strict=True):
        array = np.asarray(value)
        print(f"{name}: {array.dtype} {list(array.shape)}")


def _load_feed(path: Path) -> dict[str, Any]:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except OSError as error:
        raise RunInputError(f"{path} cannot be read: {error}") from error
    except (ValueError, AttributeError) as error:
        raise RunInputError(
            f"{path} is not an .npz of plain arrays: write it with numpy.savez"
        ) from error


# ---- inspect, verify ----


def _add_inspect(commands: Any) -> None:
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
    errors = "".join(f"  error@{level}" for level in levels)
    width = max(len(layer.name) for layer in manifest.layers)
    print(f"\n{'layer':{width}}  {'operator':14}  {'rows x columns':>15}  chunks{errors}")
    for layer in manifest.layers:
        shape = f"{layer.rows} x {layer.columns}"
        values = "".join(
            f"  {layer.relative_error.get(level, float('nan')):{len(f'error@{level}')}.4f}"
            for level in levels
        )
        operators = "+".join(layer.operators)
        print(f"{layer.name:{width}}  {operators:14}  {shape:>15}  {layer.chunk_count:6}{values}")
    if manifest.kept_in_float:
        print("\nkept in float by the graph engine:")
        width = max(len(node.name) for node in manifest.kept_in_float)
        for node in manifest.kept_in_float:
            print(f"  {node.name:{width}}  {node.operator:14} {node.weights:>10,}  {node.reason}")


def _add_verify(commands: Any) -> None:
    command = commands.add_parser("verify", help="check every byte of a bank")
    command.add_argument("bank", type=Path)
    command.set_defaults(command=_verify)


def _verify(arguments: argparse.Namespace) -> None:
    report = verify(arguments.bank)
    if not report.ok:
        raise BankIntegrityError(str(report))
    print(report)


# ---- unpack, pack ----


def _add_exchange(commands: Any) -> None:
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


if __name__ == "__main__":
    sys.exit(main())
