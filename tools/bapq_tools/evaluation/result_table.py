"""The result of an evaluation for people, for programs, and drawn."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

from bapq_edge.commands.tables import markdown_table
from bapq_edge.errors import RequestError
from bapq_edge.input_files import input_file_errors
from bapq_edge.units import counted

from ..report.charts import line_chart
from ..report.page import page, section, table
from .evaluate import Evaluation, Row
from .intervals import Score
from .metrics import BUILT_IN

__all__ = ["FORMATS", "answers_section", "read_result", "to_page"]


def _markdown(found: Evaluation) -> str:
    rows = [_cells(row, found) for row in found.rows]
    return f"{markdown_table(_heads(found), rows)}\n{_explained(found)}\n"


def _json(found: Evaluation) -> str:
    return json.dumps(dataclasses.asdict(found), indent=1) + "\n"


FORMATS = {"md": _markdown, "json": _json}


def to_page(found: Evaluation) -> str:
    """A page with the table and, for each column, its scores over the bits per weight."""
    return page(f"{found.bank}: answers", [answers_section(found)])


def answers_section(found: Evaluation) -> str:
    """The part of a page that has them."""
    charts = [_chart(found, column) for column in found.columns]
    cells = table(_heads(found), [_cells(row, found) for row in found.rows])
    return section("Answers", _explained(found), cells, *charts)


def read_result(path: Path) -> Evaluation:
    """What `bapq eval --json` wrote. Raises InputFileError or RequestError."""
    with input_file_errors(path):
        data = path.read_bytes()
    try:
        found = json.loads(data)
        rows = [
            Row(**{**row, "scores": {key: Score(**each) for key, each in row["scores"].items()}})
            for row in found["rows"]
        ]
        result = Evaluation(**{**found, "rows": rows})
        _markdown(result)  # every number is one
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RequestError(f"{path} is no result of bapq eval: write one with --json") from error
    return result


def _chart(found: Evaluation, column: str) -> str:
    """Of what is 1 at best the chart shows what lacks, so that small losses can be seen."""
    lacking = found.metric in BUILT_IN
    rows = sorted(found.rows, key=lambda row: row.bits_per_weight)
    scored = [(row, row.scores[column]) for row in rows if column in row.scores]

    def points(value: Callable[[Score], float | None]) -> list[tuple[float, float]]:
        told = [(row.bits_per_weight, value(score)) for row, score in scored]
        return [(x, 1 - y if lacking else y) for x, y in told if y is not None]

    means = points(lambda score: score.mean)
    return line_chart(
        [
            ("mean", means),
            ("95 % interval", points(lambda score: score.low)),
            ("", points(lambda score: score.high)),
        ],
        x_label="bits per weight",
        y_label=f"1 - {found.metric}, {column}" if lacking else column,
        marked=[(row.name, x, y) for (row, _), (x, y) in zip(scored, means, strict=True)],
    )


def _heads(found: Evaluation) -> list[str]:
    return ["", "bits", *found.columns]


def _cells(row: Row, found: Evaluation) -> list[str]:
    scores = (row.scores.get(column) for column in found.columns)
    return [
        row.name,
        f"{row.bits_per_weight:.2f}",
        *("" if s is None else _told(s) for s in scores),
    ]


def _told(score: Score) -> str:
    if score.low is None:
        return f"{score.mean:.4f}"
    return f"{score.mean:.4f} ({score.low:.4f} to {score.high:.4f})"


def _explained(found: Evaluation) -> str:
    kinds = {score.interval for row in found.rows for score in row.scores.values()}
    names = {"wilson": "Wilson's for shares", "bootstrap": "of a bootstrap for other means"}
    how = " and ".join(names[kind] for kind in sorted(kinds, reverse=True))
    text = (
        f"{found.metric} on {counted(found.samples, 'sample')}; in brackets 95 % intervals, " + how
    )
    if found.reference is not None:
        text += f"; the float model is {found.reference}"
    degraded = sum(row.degraded for row in found.rows)
    if degraded:
        text += f"; {counted(degraded, 'run')} degraded: not all weights could be read"
    return text
