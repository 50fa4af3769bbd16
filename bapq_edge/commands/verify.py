"""`bapq verify`: every byte of a bank, checked."""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import Any

from ..bank.verify import verify
from ..errors import BankIntegrityError
from .options import add_bank, add_json, add_key

__all__ = ["add_verify"]


def add_verify(commands: Any) -> None:
    """Add `verify`."""
    command = commands.add_parser("verify", help="check every byte of a bank")
    add_bank(command)
    add_key(command)
    add_json(command, "what was found, file by file,")
    command.set_defaults(command=_verify)


def _verify(arguments: argparse.Namespace) -> None:
    report = verify(arguments.bank, trusted_key=arguments.trusted_key)
    if arguments.json:
        print(json.dumps({"ok": report.ok, **dataclasses.asdict(report)}, default=str))
    if not report.ok:
        raise BankIntegrityError(str(report))
    if not arguments.json:
        print(report)
