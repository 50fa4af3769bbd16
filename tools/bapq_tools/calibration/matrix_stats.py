"""Statistics of the inputs that a weight matrix meets, as error-compensated rounding needs them.

Where inputs are so large or small that their squares leave float32's range, all but the means are
those of the inputs times one power of two.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bapq_edge.bank.layout import Level


@dataclass(frozen=True)
class LevelStats:
    """The inputs of a layer where the layers before it run at a level; they are centred."""

    grams: tuple[np.ndarray, ...]
    """Mean of x xᵀ, (c, c) float32 per block of columns; in a fast build its diagonal, (c,)."""
    drift: np.ndarray
    """Mean of W (x_float - x) xᵀ, (rows, columns) float32: earlier errors, seen in the output."""
    mean: np.ndarray
    """Mean of x before centring, (columns,) float32."""
    held_out: np.ndarray
    """Inputs that nothing is fitted to, (samples, columns) float32."""


@dataclass(frozen=True)
class MatrixStats:
    """The inputs of a matrix, which is a layer or one group of a grouped Conv."""

    blocks: tuple[slice, ...]
    """Runs of columns. Correlations between them are not known."""
    mean: np.ndarray
    """Mean of the float model's input, (columns,) float32."""
    held_out: np.ndarray
    """The float model's inputs where `LevelStats.held_out` are taken, centred."""
    levels: dict[Level, LevelStats]
    """The statistics of levels 4, 2 and 1, as far as the bank has them."""

    @property
    def correlated(self) -> bool:
        """Whether correlations of columns are known: compensated rounding needs them."""
        return all(gram.ndim == 2 for seen in self.levels.values() for gram in seen.grams)

    def part(self, rows: slice, block: int) -> MatrixStats:
        """The statistics of some rows of the matrix and one block of its columns."""
        columns = self.blocks[block]
        levels = {
            level: LevelStats(
                (seen.grams[block],),
                seen.drift[rows, columns],
                seen.mean[columns],
                seen.held_out[:, columns],
            )
            for level, seen in self.levels.items()
        }
        whole = slice(0, columns.stop - columns.start)
        return MatrixStats((whole,), self.mean[columns], self.held_out[:, columns], levels)
