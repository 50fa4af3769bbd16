"""The command `bapq report`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from bapq_edge.bank.reader import Bank
from bapq_edge.commands.options import add_bank
from bapq_edge.commands.paths import check_output, put_text
from bapq_edge.errors import RequestError

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
    report.set_defaults(command=_report)


def _report(arguments: argparse.Namespace) -> None:
    from ..report.bank_sections import bank_sections
    from ..report.page import page
    from ..report.trace_sections import read_trace, trace_sections

    output: Path = arguments.output
    if output.suffix != ".html":
        raise RequestError(f"--output {output} must end in .html")
    check_output(output, arguments.bank, arguments.trace, arguments.eval)
    events = read_trace(arguments.trace) if arguments.trace else []
    bank = Bank.open(arguments.bank)
    answers = [_answers(arguments.eval, bank)] if arguments.eval else []
    title = f"{bank.manifest.model.name}: {Path(bank.path).name}"
    text = page(title, [*answers, *trace_sections(events), *bank_sections(bank)])
    put_text(text, output)
    print(f"{output}: {len(text) / 1e3:.0f} kB, open it in a browser")


def _answers(path: Path, bank: Bank) -> str:
    from ..evaluation.result_table import answers_section, read_result

    found = read_result(path)
    if found.digest != bank.manifest.digest:
        raise RequestError(
            f"{path} is of a bank with digest {found.digest:.16}..., {bank.path} has "
            f"{bank.manifest.digest:.16}...: evaluate this bank"
        )
    return answers_section(found)
