"""The command `bapq eval`. Its heavy imports wait until it runs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from bapq_edge.commands.options import add_bank, chosen_levels
from bapq_edge.commands.paths import check_output, put_text
from bapq_edge.errors import RequestError

from ..build_support.extras import host_packages

__all__ = ["add_eval_command"]

_FORMATS = ("md", "json")


def add_eval_command(commands: Any) -> None:
    """Add `eval` to the subparsers of the `bapq` command."""
    command = commands.add_parser(
        "eval", help="judge a bank's answers by the float model's and by labels"
    )
    add_bank(command)
    command.add_argument(
        "--data",
        type=Path,
        action="append",
        required=True,
        metavar="X.npz",
        help="one array per model input, samples on the first axis; .npy where there is one input; "
        "more samples: a folder of such files, or the option again; best not those of the build",
    )
    command.add_argument(
        "--labels",
        metavar="Y",
        help="array in the data with one label per sample, or an .npy file of them",
    )
    command.add_argument(
        "--model",
        type=Path,
        metavar="MODEL.onnx",
        help="float model to compare with (default: level 32 of the bank)",
    )
    command.add_argument(
        "--metric",
        metavar="KIND",
        help="how answers are compared: top1, cosine, iou, or FILE.py:FUNCTION, which is called "
        "for each sample with outputs, wanted and label, and gives a number (default: as the "
        "outputs look)",
    )
    command.add_argument("--judge", metavar="OUTPUT", help="output that is judged, of several")
    command.add_argument(
        "--levels", "--level", help="a row for each, such as 8,4 or auto (default: all but 32)"
    )
    command.add_argument(
        "--bits",
        type=float,
        nargs="+",
        action="extend",
        default=[],
        metavar="B",
        help="a row for each plan of so many bits per weight, such as 3.5",
    )
    command.add_argument(
        "--policy",
        choices=("gate", "escalate"),
        action="append",
        default=[],
        help="a row for a policy that looks at inputs",
    )
    command.add_argument(
        "--target-agreement",
        type=float,
        metavar="A",
        help="share of inputs, 0 to 1, that a policy is to answer as the float model does",
    )
    command.add_argument(
        "--threads",
        type=int,
        metavar="N",
        help="most threads of one operator (default: one per core)",
    )
    command.add_argument("-o", "--output", type=Path, metavar="FILE", help="file for the table")
    command.add_argument(
        "--format", choices=_FORMATS, help="format of the table (default: as FILE ends, or else md)"
    )
    command.add_argument(
        "--json", action="store_const", const="json", dest="format", help="short for --format json"
    )
    command.add_argument(
        "--plot", type=Path, metavar="PAGE.html", help="page to write, with the scores drawn"
    )
    command.add_argument("--quiet", action="store_true", help="show no progress")
    command.set_defaults(command=_eval)


def _eval(arguments: argparse.Namespace) -> None:
    style = _format(arguments)
    for path in (arguments.output, arguments.plot):
        if path is not None:
            check_output(path, arguments.bank, arguments.model, *arguments.data)
    if arguments.plot is not None and arguments.plot.suffix != ".html":
        raise RequestError(f"--plot {arguments.plot} must end in .html")
    with host_packages("evaluating a bank"):
        from ..evaluation.evaluate import evaluate
        from ..evaluation.result_table import FORMATS, to_page
    found = evaluate(
        arguments.bank,
        arguments.data,
        _subjects(arguments),
        labels=arguments.labels,
        model=arguments.model,
        metric=arguments.metric,
        judged=arguments.judge,
        threads=arguments.threads,
        progress=not arguments.quiet,
    )
    put_text(FORMATS[style](found), arguments.output)
    if arguments.plot is not None:
        put_text(to_page(found), arguments.plot)


def _format(arguments: argparse.Namespace) -> str:
    if arguments.format is not None or arguments.output is None:
        return arguments.format or "md"
    suffix: str = arguments.output.suffix[1:]
    if suffix not in _FORMATS:
        raise RequestError(
            f"--output {arguments.output} must end in one of {', '.join(_FORMATS)}, or give "
            "--format"
        )
    return suffix


def _subjects(arguments: argparse.Namespace) -> list[Any]:
    """The rows that are asked for: levels, then plans, then policies."""
    from ..evaluation.evaluate import Subject

    common = {"threads": arguments.threads}
    policies: list[str | None] = list(dict.fromkeys(arguments.policy))
    if arguments.target_agreement is not None and not policies:
        policies = [None]
    rows = [
        Subject(_level_name(level), {**common, "level": level})
        for level in chosen_levels(arguments.bank, arguments.levels)
    ]
    for bits in dict.fromkeys(arguments.bits):
        rows.append(Subject(f"{bits:g} bits", {**common, "bits": bits}))
    for policy in policies:
        parts = [] if policy is None else [policy]
        target = arguments.target_agreement
        parts += [] if target is None else [f"agreement {target:g}"]
        options = {**common, "policy": policy, "target_agreement": target}
        rows.append(Subject(" ".join(parts), options))
    return list({row.name: row for row in rows}.values())


def _level_name(level: str) -> str:
    return level if level == "auto" else f"level {level}"
