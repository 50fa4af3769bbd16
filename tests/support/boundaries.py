"""Boundary models made by hand, and banks that have them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from bapq_edge.bank.boundary import Boundary, BoundaryArrays, Precision
from bapq_edge.bank.reader import Bank
from bapq_tools.boundary.rewrite import rewrite

LOW, HIGH = Precision(level=2), Precision(level=8)


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
    bank: Path, out: Path, *models: tuple[Boundary, BoundaryArrays], split: Any = None
) -> Path:
    """The bank again, with boundary models."""
    return rewrite(bank, out, boundary=models, split=split)
