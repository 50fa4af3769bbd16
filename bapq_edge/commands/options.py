"""Options that several commands have, under the names that `bapq_edge.Session` has for them."""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path
from typing import Any

from ..bank.reader import Bank
from ..control.device_profile import load_profile
from ..errors import BapqWarning, UnknownLevelError
from ..units import parse_size

__all__ = [
    "add_bank",
    "add_json",
    "add_key",
    "add_precision",
    "add_session",
    "chosen_levels",
    "parse_levels",
    "session_options",
]

_SIZES = ("memory_budget", "weight_budget")
_OPTIONS = (
    *_SIZES,
    "level",
    "bits",
    "policy",
    "target_agreement",
    "latency_ms",
    "max_slowdown",
    "threads",
    "controller",
    "profile",
    "direct_io",
    "trusted_key",
)


def add_bank(command: Any) -> None:
    """Add the bank that a command reads."""
    command.add_argument("bank", type=Path, help="directory of the bank")


def add_json(command: Any, what: str) -> None:
    """Add --json."""
    command.add_argument("--json", action="store_true", help=f"print {what} as JSON")


def add_key(command: Any) -> None:
    """Add --key."""
    command.add_argument(
        "--key",
        "--trusted-key",
        dest="trusted_key",
        metavar="KEY.pub",
        help="refuse a bank that is not signed with this key, of minisign or 'bapq keygen'",
    )


def add_precision(command: Any) -> None:
    """Add --level and --bits."""
    precision = command.add_mutually_exclusive_group()
    precision.add_argument(
        "--level",
        default="auto",
        help="level of all weights: auto, 32, 8, 4, 2 or 1 (default: auto)",
    )
    precision.add_argument(
        "--bits", type=float, metavar="B", help="bits per weight on average, such as 3.5"
    )


def add_session(command: Any) -> None:
    """Add what `Session` takes besides the precision."""
    session = command.add_argument_group("session")
    session.add_argument(
        "--memory-budget",
        "--budget",
        metavar="SIZE",
        help="what the process may grow by, such as 64MiB, or auto (default: no limit)",
    )
    session.add_argument(
        "--weight-budget", metavar="SIZE", help="most bytes of weights in memory, such as 16MiB"
    )
    session.add_argument(
        "--policy", choices=("static", "gate", "escalate"), help="who chooses every run's precision"
    )
    session.add_argument(
        "--target-agreement",
        type=float,
        metavar="A",
        help="share of inputs, 0 to 1, to be answered as the float model does",
    )
    session.add_argument(
        "--latency-ms", type=float, metavar="MS", help="time that a run may take, reading included"
    )
    session.add_argument(
        "--max-slowdown",
        type=float,
        metavar="X",
        help="what streaming may cost level auto, in times of a run from memory (default: 1.1)",
    )
    session.add_argument(
        "--threads",
        type=int,
        metavar="N",
        help="most threads of one operator (default: one per core)",
    )
    session.add_argument(
        "--controller",
        choices=("auto",),
        help="auto: let memory, power and temperature change the plan",
    )
    session.add_argument(
        "--profile",
        metavar="NAME",
        help="device profile, or its .yaml file (default: the board's own)",
    )
    session.add_argument(
        "--direct-io", "--direct", action="store_true", help="read around the page cache"
    )
    add_key(session)


def session_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments for `Session`; a slip is told before the bank is opened.

    Raises SizeError, ProfileError or InputFileError.
    """
    options = {name: getattr(arguments, name) for name in _OPTIONS if name in arguments}
    for name in _SIZES:
        if options[name] not in (None, "auto"):
            parse_size(options[name])
    if options["profile"] is not None:
        load_profile(options["profile"])
    return options


def parse_levels(text: str, example: str) -> list[int]:
    """Levels written as `8,4`. Raises UnknownLevelError, and shows `example`."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UnknownLevelError(
            f"--levels {text!r} is not a list of levels; write it as {example}"
        ) from None


def chosen_levels(bank: Path, wanted: str | None) -> list[str]:
    """Levels of a bank, and "auto", written as `8,auto`; by default all that are held but 32.

    Raises UnknownLevelError, BankError.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BapqWarning)  # the sessions will tell
        held = [str(level) for level in Bank.open(bank).levels]
    if wanted is None:
        return [level for level in held if level != "32"] or held
    levels = [level.strip() for level in wanted.split(",")]
    for level in levels:
        if level not in held and level != "auto":
            raise UnknownLevelError(
                f"level {level!r} is not in the bank, which holds {', '.join(held)}"
            )
    return levels
