"""Boundary models made by hand, and banks that have them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bapq_edge import Session
from bapq_edge.bank.boundary import Boundary, BoundaryArrays, Precision
from bapq_edge.bank.reader import Bank
from bapq_edge.policy import Choice, PolicyContext
from bapq_tools.boundary.rewrite import rewrite
from support.streaming import run

LOW, HIGH = Precision(level=2), Precision(level=8)
PLUS = np.abs(np.random.default_rng(1).standard_normal((1, 96))).astype(np.float32)
"""An input of the chain of products; `MINUS` another one."""
MINUS = -PLUS


def model(bank: Path, **changes: Any) -> tuple[Boundary, BoundaryArrays]:
    """A tree on the first of two values: region 0 where it is above 0, else region 1.

    Region 0 is run at HIGH in the second point, and region 1 at LOW in both.
    """
    fields: dict[str, Any] = {
        "name": "model",
        "stage": "start",
        "tap": "x",
        "base": LOW,
        "pool": (2,),
        "scores": "none",
        "features": 2,
        "kind": "tree",
        "regions": 2,
        "nodes": 3,
        "precisions": (LOW, HIGH),
        "points": 2,
        "samples": 100,
        "confidence": 0.9,
    }
    arrays = {key: changes.pop(key) for key in list(changes) if key not in fields}
    description = Boundary(**{**fields, **changes})
    values = description.values
    made: BoundaryArrays = {
        "center": np.zeros(values),
        "projection": np.eye(values, description.features),
        "offset": np.zeros(description.features),
        "mix": np.array([0.25, 0.75]),
        "loss": np.array([[0.2, 0.0], [0.01, 0.0]]),
        "loss_bound": np.array([[0.3, 0.02], [0.03, 0.02]]),
        "assignment": np.array([[0, 0], [1, 0]]),
        "outlook": np.array([[2.0, 0.94, 0.9], [3.5, 0.99, 0.97]]),
        "node_feature": np.array([0, -1, -1]),
        "node_threshold": np.zeros(3),
        "node_children": np.array([[1, 2], [0, 0], [0, 0]]),
        "node_region": np.array([0, 1, 0]),
        **arrays,
    }
    shapes = description.shapes(Bank.open(bank).manifest.layers)
    return description, {
        name: np.ascontiguousarray(array, shapes[name][0])
        for name, array in made.items()
        if name in shapes
    }


def with_boundary(
    bank: Path,
    out: Path,
    *models: tuple[Boundary, BoundaryArrays],
    split: Any = None,
    batched: Any = None,
) -> Path:
    """The bank again, with boundary models."""
    return rewrite(bank, out, boundary=models, split=split, batched=batched)


def escalating(bank: Path, path: Path, threshold: float, batched: Any = None) -> Path:
    """Region 0, to be answered again, where the mean of the first half of y is above threshold."""
    answer = model(bank, stage="answer", tap="y", node_threshold=np.full(3, threshold))
    return with_boundary(bank, path, answer, batched=batched)


def answers_of(
    bank: Path, precisions: Sequence[Precision]
) -> dict[Precision, dict[int, np.ndarray]]:
    """By precision and sign of the input, what a session that knows nothing else answers."""
    answers = {}
    for precision in precisions:
        choice: dict[str, Any] = (
            {"bits": precision.bits} if precision.level is None else {"level": precision.level}
        )
        with Session(bank, threads=1, **choice) as session:
            answers[precision] = {sign: run(session, sign * PLUS) for sign in (1, -1)}
    return answers


class Script:
    """Each tuple is one run: what it starts at, then what it is answered at again."""

    def __init__(
        self, *runs: Sequence[Precision], shares: Mapping[Precision, float] | None = None
    ) -> None:
        self.runs = list(runs)
        if shares is not None:
            self.shares = shares
        self.left: list[Precision] = []

    def choose(self, context: PolicyContext) -> Choice | None:
        if context.stage == "start":
            self.left = list(self.runs.pop(0))
        return Choice(self.left.pop(0)) if self.left else None
