"""`bapq unpack` and `bapq pack`: a bank as a tree of .npy files, and back."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from ..bank.exchange import pack, unpack
from ..bank.manifest import MANIFEST_FILE
from ..errors import RequestError
from .options import add_bank, add_json
from .paths import check_outside

__all__ = ["add_exchange"]


def add_exchange(commands: Any) -> None:
    """Add `unpack` and `pack`."""
    command = commands.add_parser("unpack", help="write a bank as a tree of .npy files")
    add_bank(command)
    command.add_argument("directory", type=Path, help="where the tree is written")
    add_json(command, "the tree's path")
    command.set_defaults(command=_unpack)
    command = commands.add_parser("pack", help="make a bank of a tree that unpack wrote")
    command.add_argument("directory", type=Path, help="the tree")
    command.add_argument("bank", type=Path, help="the bank to write")
    add_json(command, "the bank's path")
    command.set_defaults(command=_pack)


def _unpack(arguments: argparse.Namespace) -> None:
    bank, directory = arguments.bank, arguments.directory
    check_outside(bank, directory)
    if (directory / MANIFEST_FILE).exists():
        raise RequestError(f"{directory} is a bank: name another directory for the tree")
    _print_path(unpack(bank, directory), arguments.json)


def _pack(arguments: argparse.Namespace) -> None:
    directory, bank = arguments.directory, arguments.bank
    is_model = (directory / MANIFEST_FILE).exists()  # else models are in data/bank below it
    check_outside(directory if is_model else directory / "data", bank)
    _print_path(pack(directory, bank), arguments.json)


def _print_path(path: Path, as_json: bool) -> None:
    print(json.dumps({"path": str(path)}) if as_json else path)
