"""Gram matrices of a layer's input: summed up panel by panel on all cores, on disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from bapq_edge.bank.layout import Level

from ..build_support.spill import Spill

PANEL_COLUMNS = 384
"""Blocks of columns are multiples of it. Results depend on it, and not on the number of workers."""


@dataclass(frozen=True)
class GramMatrices:
    """The grams and drifts of `LevelStats`, while they are summed up over the forward passes."""

    blocks: tuple[slice, ...]
    """Runs of columns. Correlations between them are not counted."""
    grams: dict[Level, list[np.ndarray]]
    """Per block (c, c) float32. `add` leaves the lower triangle to `mirror`."""
    drifts: dict[tuple[Level, str], np.ndarray]
    """One matrix per level and name of the weight, (rows, columns) float32."""

    @classmethod
    def zeros(
        cls,
        blocks: tuple[slice, ...],
        levels: Sequence[Level],
        rows: Mapping[str, int],
        spill: Spill,
    ) -> GramMatrices:
        """Start with zeros. `rows` is by name of the weight."""
        sizes = [block.stop - block.start for block in blocks]
        grams = {level: [spill.zeros((size, size)) for size in sizes] for level in levels}
        columns = blocks[-1].stop
        drifts = {(k, name): spill.zeros((n, columns)) for k in levels for name, n in rows.items()}
        return cls(blocks, grams, drifts)

    def add(
        self,
        exact: np.ndarray,
        x: np.ndarray,
        weights: Mapping[str, np.ndarray],
        shares: Mapping[Level, float],
        workers: int,
    ) -> None:
        """Add the input `x` that a pass has, by the share of the pass in every level.

        `exact` is the float pass's input. exact, x: (n, columns), centred; weights: (rows, columns)
        by name.
        """
        count, columns = x.shape
        scales = {level: np.float32(share / count) for level, share in shares.items() if share}
        panels = [
            slice(b, min(b + PANEL_COLUMNS, columns)) for b in range(0, columns, PANEL_COLUMNS)
        ]
        # W (x_float - x) xᵀ, by whichever product of two is the smaller first.
        outputs_first = 2 * sum(map(len, weights.values())) < columns
        missed = {
            name: _missed_outputs(exact, x, weight, panels)
            for name, weight in weights.items()
            if outputs_first
        }

        def add_panel(panel: slice) -> None:
            number, block = next(
                each for each in enumerate(self.blocks) if panel.start < each[1].stop
            )
            x_panel = x[:, panel]
            own = slice(panel.start - block.start, panel.stop - block.start)
            gram = x_panel.T @ x[:, panel.start : block.stop]
            for level, scale in scales.items():
                self.grams[level][number][own, own.start :] += scale * gram
            if not outputs_first:
                parts = [(exact[:, p] - x[:, p]).T @ x_panel for p in panels]
                cross = np.concatenate(parts)  # (columns, width of the panel)
            for name, weight in weights.items():
                drift = missed[name].T @ x_panel if outputs_first else weight @ cross
                for level, scale in scales.items():
                    self.drifts[level, name][:, panel] += scale * drift

        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(add_panel, panels))

    def mirror(self) -> None:
        """Fill the lower triangles."""
        for grams in self.grams.values():
            for gram in grams:
                for begin in range(0, len(gram), PANEL_COLUMNS):
                    end = min(begin + PANEL_COLUMNS, len(gram))
                    gram[end:, begin:end] = gram[begin:end, end:].T


def _missed_outputs(
    exact: np.ndarray, x: np.ndarray, weight: np.ndarray, panels: Sequence[slice]
) -> np.ndarray:
    """The output that the weight misses with the input x, (n, rows)."""
    missed = np.zeros((len(x), len(weight)), np.float32)
    for panel in panels:
        missed += (exact[:, panel] - x[:, panel]) @ weight[:, panel].T
    return missed
