"""The planner's multiple-choice knapsack: a level for every chunk, the least error for a cost."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["GreedyKnapsack"]


class GreedyKnapsack:
    """All steps from the lowest level up, best first, of a multiple-choice knapsack.

    The steps of a chunk are the edges of the convex hull of its (cost, error) points; so each saves
    less error per cost than the one before.
    """

    def __init__(self, cost: NDArray[np.int64], error: NDArray[np.float32]) -> None:
        """Both (chunks, levels); costs never rise from left to right."""
        self._base = int(cost[:, -1].sum())
        # Bytes and bits are exact in float64, and rows of one type and order are quick.
        price_of, error_of = (a.T.astype(np.float64, order="C") for a in (cost, error))
        levels, chunks = price_of.shape
        rows = np.arange(chunks)
        column = np.full(chunks, levels - 1)
        ratio = np.full(chunks, np.inf)
        path = [column]
        steps = [(rows[:0], price_of[0, :0], column[:0], ratio[:0])]
        for _ in range(levels - 1):
            price = price_of - price_of[column, rows]
            saved = error_of[column, rows] - error_of
            # A step that costs nothing comes first, one that saves nothing last: what calibration
            # never saw may matter all the same.
            ratios = np.divide(saved, price, out=np.full(price.shape, np.inf), where=price > 0)
            ratios[(saved < 0) | (np.arange(levels)[:, None] >= column)] = -1
            best = ratios.argmax(0)  # the highest level of equals
            # Rounding must not put a step before the one that it builds on.
            ratio = np.minimum(ratio, ratios[best, rows])
            moved = np.flatnonzero(ratio >= 0)
            steps.append((moved, price[best[moved], moved], best[moved], ratio[moved]))
            column = np.where(ratio >= 0, best, column)
            path.append(column)
        self._path = np.stack(path)
        """(steps + 1, chunks): column after so many steps."""
        chunk, price, column, ratio = (np.concatenate(parts) for parts in zip(*steps, strict=True))
        # Stable: equal steps stay in the order of a chunk's path, then of execution.
        order = _descending(ratio)
        self._chunk, self._column = chunk[order], column[order]
        self._price = price[order].astype(np.int64)

    def climb(self, most: int) -> NDArray[np.intp]:
        """Columns whose total cost is at most `most` if any is; (chunks,).

        Takes every step that still fits; the total error never rises with `most`.
        """
        taken = np.zeros(self._path.shape[1], np.intp)
        left = most - self._base
        steps = np.arange(len(self._column))
        while left >= 0 and len(steps):
            spent = np.cumsum(self._price[steps])
            count = int(np.searchsorted(spent, left, side="right"))
            if count:
                taken += np.bincount(self._chunk[steps[:count]], minlength=len(taken))
                left -= int(spent[count - 1])
            steps = steps[count:]
            # A step that does not fit now never will, nor will those that build on it.
            large = steps[self._price[steps] > left]
            reach = np.full(len(taken), -1)
            np.maximum.at(reach, self._chunk[large], self._column[large])
            steps = steps[self._column[steps] > reach[self._chunk[steps]]]
        return self._path[taken, np.arange(len(taken))]


def _descending(values: NDArray[np.float64]) -> NDArray[np.intp]:
    """`argsort(-values, kind="stable")` of values from 0 up, three times as fast.

    Such floats are ordered as their bits are, and NumPy sorts 16-bit numbers by radix.
    """
    bits = ~np.ascontiguousarray(values).view(np.uint64)
    order = np.arange(len(bits))
    for shift in (0, 16, 32, 48):
        part = (bits >> np.uint64(shift)).astype(np.uint16)
        order = order[np.argsort(part[order], kind="stable")]
    return order
