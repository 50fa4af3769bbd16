"""`bapq install`: a bank copied to its place, with its progress on the terminal."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

from ..bank.install import install
from ..units import format_size
from .options import add_json, add_key, parse_levels
from .paths import check_outside

__all__ = ["add_install"]


def add_install(commands: Any) -> None:
    """Add `install`."""
    command = commands.add_parser(
        "install", help="copy a bank to its place, or update it; safe against power cuts"
    )
    command.add_argument("new", type=Path, help="the bank to copy, such as on a USB stick")
    command.add_argument("bank", type=Path, help="its place; a bank that stands there is replaced")
    command.add_argument("--levels", help="install only the planes of these, such as 4,2,1")
    add_key(command)
    add_json(command, "the result")
    command.set_defaults(command=_install)


def _install(arguments: argparse.Namespace) -> None:
    levels = None
    if arguments.levels is not None:
        levels = parse_levels(arguments.levels, "4,2,1")  # in its own place a bank gives up planes
    if levels is None or os.path.realpath(arguments.new) != os.path.realpath(arguments.bank):
        check_outside(arguments.new, arguments.bank)
    progress = _Progress(sys.stderr.isatty())
    try:
        report = install(
            arguments.new,
            arguments.bank,
            levels=levels,
            trusted_key=arguments.trusted_key,
            progress=progress.show,
        )
    finally:
        progress.clear()
    if arguments.json:
        print(json.dumps(dataclasses.asdict(report), default=str))
    else:
        print(report)


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
