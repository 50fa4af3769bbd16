"""`bapq doctor`: what works on this board, and the fix for what does not."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from ..doctor import examine
from ..errors import PlatformError
from .options import add_json

__all__ = ["add_doctor"]


def add_doctor(commands: Any) -> None:
    """Add `doctor`."""
    command = commands.add_parser("doctor", help="say what works on this board, and how to fix it")
    command.add_argument(
        "bank", type=Path, nargs="?", help="a bank to examine as well, and the storage it is on"
    )
    add_json(command, "the findings")
    command.set_defaults(command=_doctor)


def _doctor(arguments: argparse.Namespace) -> None:
    findings = examine(arguments.bank)
    if arguments.json:
        print(json.dumps([dataclasses.asdict(finding) for finding in findings], indent=1))
    else:
        width = max(len(finding.item) for finding in findings)
        for finding in findings:
            fix = f" -> {finding.fix}" if finding.fix else ""
            print(f"{finding.state:4}  {finding.item:{width}}  {finding.found}{fix}")
    broken = [finding.item for finding in findings if finding.state == "BAD"]
    if broken:
        raise PlatformError(f"{', '.join(broken)} must be fixed first: see what is marked BAD")
