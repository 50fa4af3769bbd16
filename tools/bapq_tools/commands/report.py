"""The command `bapq report`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bapq_edge.bank.reader import Bank
from bapq_edge.commands.feeds import add_feed, parse_shapes
from bapq_edge.commands.options import add_bank
from bapq_edge.commands.paths import check_output, put_text
from bapq_edge.errors import BapqError, RequestError

if TYPE_CHECKING:
    from ..report.run_costs import RunCosts

__all__ = ["add_report_command"]


def add_report_command(commands: Any) -> None:
    """Add `report` to the subparsers of the `bapq` command."""
    report = commands.add_parser("report", help="write a page about a bank, for the browser")
    add_bank(report)
    report.add_argument(
        "-o", "--output", type=Path, required=True, metavar="REPORT.html", help="page to write"
    )
    report.add_argument(
        "--trace", type=Path, metavar="TRACE.json", help="trace of bapq profile, to be drawn"
    )
    report.add_argument(
        "--eval", type=Path, metavar="EVAL.json", help="result of bapq eval --json, to be drawn"
    )
    add_feed(report)
    report.add_argument(
        "--profile",
        action="append",
        default=[],
        metavar="NAME|FILE",
        help="a board to show first, such as what bapq doctor --calibrate wrote of yours",
    )
    report.set_defaults(command=_report)


def _report(arguments: argparse.Namespace) -> None:
    from ..report.bank_sections import bank_sections
    from ..report.page import page
    from ..report.trace_sections import read_trace, trace_sections

    output: Path = arguments.output
    if output.suffix != ".html":
        raise RequestError(f"--output {output} must end in .html")
    check_output(output, arguments.bank, arguments.trace, arguments.eval, arguments.input)
    events = read_trace(arguments.trace) if arguments.trace else []
    bank = Bank.open(arguments.bank)
    answers = [_answers(arguments.eval, bank)] if arguments.eval else []
    title = f"{bank.manifest.model.name}: {Path(bank.path).name}"
    run = _run_costs(bank, arguments)
    text = page(
        title, [*answers, *trace_sections(events), *bank_sections(bank, run, arguments.profile)]
    )
    put_text(text, output)
    print(f"{output}: {len(text) / 1e3:.0f} kB, open it in a browser")


def _run_costs(bank: Bank, arguments: argparse.Namespace) -> RunCosts | str:
    """What a run costs; where no input was given and zeros do not do, why not."""
    from ..report.run_costs import measure_costs

    try:
        return measure_costs(bank, arguments.input, parse_shapes(arguments.shape))
    except BapqError as error:
        if arguments.input is not None or arguments.shape:
            raise
        return str(error)


def _answers(path: Path, bank: Bank) -> str:
    from ..evaluation.result_table import answers_section, read_result

    found = read_result(path)
    if found.digest != bank.manifest.digest:
        raise RequestError(
            f"{path} is of a bank with digest {found.digest:.16}..., {bank.path} has "
            f"{bank.manifest.digest:.16}...: evaluate this bank"
        )
    return answers_section(found)
