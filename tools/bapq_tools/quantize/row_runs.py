"""Cuts matrices into runs of rows, which are worked on one at a time."""

from __future__ import annotations

RUN_WEIGHTS = 1 << 22
"""Weights whose compensated codes are chosen at a time. That takes about a dozen float32 arrays of
this size. All runs of a task share its factors."""

TASK_WEIGHTS = 1 << 25
"""Largest number of weights of one task."""


def row_runs(rows: int, columns: int, weights: int = RUN_WEIGHTS) -> list[slice]:
    """Runs of rows, each of at most so many weights, or of 16 rows."""
    step = max(16, weights // columns // 16 * 16)
    return [slice(begin, min(begin + step, rows)) for begin in range(0, rows, step)]
