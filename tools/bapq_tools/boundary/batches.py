"""Finds out whether the samples of a batch touch each other, by running them in both ways."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bapq_edge.bank.boundary import Precision
from bapq_edge.bank.manifest import Batched
from bapq_edge.errors import ExecutionError, RunInputError

from .runner import Feed
from .study import Study

__all__ = ["find_batched"]

_TOGETHER = 3
_TOLERANCE = 1e-3
"""Of the norm of an answer: products of other sizes are added up in another order, and a value
that lies between two codes may take the other one."""


def find_batched(study: Study) -> Batched | None:
    """The inputs and outputs whose first axis holds samples that do not touch each other.

    Three samples are answered one by one, and as a batch, at the bank's highest level. An output
    that is the same in both ways is told; None where there is none, or no batch can be run.
    """
    inputs = {
        item.name
        for item in study.inputs
        if len(item.type.tensor_type.shape.dim)
        and not item.type.tensor_type.shape.dim[0].dim_value > 0
    }
    feeds = _alike(study.feeds, inputs)
    if len(feeds) < _TOGETHER:
        return None
    batch = {
        name: np.concatenate([feed[name] for feed in feeds]) if name in inputs else value
        for name, value in feeds[0].items()
    }
    names = [item.name for item in study.graph.model.graph.output]
    try:
        *alone, together = study.runner.run(
            study.bank.graph_bytes(),
            Precision(level=study.bank.levels[0]),
            names,
            [*feeds, batch],
            lambda found: dict(zip(names, found, strict=True)),
        )
    except (ExecutionError, RunInputError):  # such as a Reshape to one sample
        return None
    outputs = tuple(
        name for name in names if _are_apart([each[name] for each in alone], together[name])
    )
    return Batched(tuple(sorted(inputs)), outputs) if outputs else None


def _alike(feeds: list[Feed], inputs: set[str]) -> list[Feed]:
    """The last few samples that can stand in one batch: of one shape, and alike in all else."""
    if not inputs or not feeds:
        return []
    last = feeds[-1]
    found = [feed for feed in feeds if _fits(feed, last, inputs)]
    return found[-_TOGETHER:]


def _fits(feed: Mapping[str, NDArray[Any]], last: Feed, inputs: set[str]) -> bool:
    return all(
        feed[name].shape == value.shape and len(value) == 1
        if name in inputs
        else np.array_equal(feed[name], value)
        for name, value in last.items()
    )


def _are_apart(alone: list[Any], together: Any) -> bool:
    if not all(isinstance(each, np.ndarray) and each.ndim for each in (*alone, together)):
        return False
    if any(len(each) != 1 for each in alone):
        return False
    rows = np.concatenate(alone)
    if rows.shape != together.shape or rows.dtype != together.dtype:
        return False
    if rows.dtype.kind != "f":
        return bool(np.array_equal(rows, together))
    norms = np.linalg.norm(rows.reshape(len(rows), -1).astype(np.float64), axis=1)
    errors = np.linalg.norm((rows - together).reshape(len(rows), -1).astype(np.float64), axis=1)
    return bool((errors <= _TOLERANCE * norms).all())
