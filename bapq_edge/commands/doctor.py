"""`bapq doctor`: what works on this board, and the fix for what does not."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from ..bank.reader import Bank
from ..control.device_profile import DeviceProfile, save_profile
from ..doctor import examine
from ..errors import PlatformError, RequestError, StorageError
from .options import add_json
from .paths import check_output

__all__ = ["add_doctor"]


def add_doctor(commands: Any) -> None:
    """Add `doctor`."""
    command = commands.add_parser("doctor", help="say what works on this board, and how to fix it")
    command.add_argument(
        "bank", type=Path, nargs="?", help="a bank to examine as well, and the storage it is on"
    )
    command.add_argument(
        "--calibrate",
        action="store_true",
        help="measure this board, for a minute under full load, and write a device profile",
    )
    command.add_argument(
        "-o", "--output", type=Path, metavar="BOARD.yaml", help="profile to write with --calibrate"
    )
    command.add_argument(
        "--load-seconds",
        type=float,
        default=60.0,
        metavar="S",
        help="seconds of full load of --calibrate (default: 60)",
    )
    add_json(command, "the findings")
    command.set_defaults(command=_doctor)


def _doctor(arguments: argparse.Namespace) -> None:
    if arguments.calibrate or arguments.output is not None:
        _calibrate(arguments)
        return
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


_FILE_BYTES = 32 << 20


def _calibrate(arguments: argparse.Namespace) -> None:
    output: Path | None = arguments.output
    if not arguments.calibrate:
        raise RequestError(f"--output {output} is for --calibrate: add it")
    if output is None or output.suffix != ".yaml":
        raise RequestError(f"--calibrate needs --output BOARD.yaml, and has {output}")
    if not arguments.load_seconds > 0:
        raise RequestError(f"--load-seconds is {arguments.load_seconds}, it must be more than 0")
    check_output(output, *([arguments.bank] if arguments.bank else []))
    try:
        if arguments.bank is None:
            with tempfile.NamedTemporaryFile(dir=output.parent or Path()) as file:
                file.write(bytes(_FILE_BYTES))
                file.flush()
                profile = _measured(Path(file.name), arguments)
        else:
            bank = Bank.open(arguments.bank)
            planes = [bank.plane_path(plane) for plane in bank.planes]
            profile = _measured(max(planes, key=lambda path: path.stat().st_size), arguments)
    except OSError as error:
        raise StorageError(f"storage cannot be measured: {error}") from error
    save_profile(profile, output)
    if arguments.json:
        print(json.dumps(dataclasses.asdict(profile), indent=1))
        return
    for name, value in profile.measured.items():
        print(f"{name:32} {value:g}")
    print(f"{output}: give it as --profile {output}, or Session(profile=...)")


def _measured(file: Path, arguments: argparse.Namespace) -> DeviceProfile:
    from ..profiling.calibration import calibrate  # only this needs it

    return calibrate(
        file,
        load_s=arguments.load_seconds,
        say=lambda text: print(f"bapq: {text}", file=sys.stderr),
    )
