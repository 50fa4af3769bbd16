"""Second moments of a matrix's input: panel by panel on all cores, summed up on disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from bapq_edge.bank.layout import Level

from ..build_support.spill import OnDisk

PANEL = 384
"""Columns of a panel. Blocks of columns are multiples of it; results depend on it, and not on the
number of workers."""


@dataclass(frozen=True)
class Sums:
    """What `LevelStats` calls grams and drift, weighted means over the chains."""

    blocks: tuple[slice, ...]
    """runs of columns; correlations between them are not counted"""
    grams: dict[Level, list[np.ndarray]]
    """per block (c, c) float32; `add` leaves the lower triangle to `mirror`"""
    drifts: dict[tuple[Level, str], np.ndarray]
    """by level and name of the weight, (rows, columns) float32"""

    @classmethod
    def zeros(
        cls,
        blocks: tuple[slice, ...],
        levels: Sequence[Level],
        rows: Mapping[str, int],
        disk: OnDisk,
    ) -> Sums:
        """Nothing summed up yet; `rows` by name of the weight."""
        sizes = [block.stop - block.start for block in blocks]
        grams = {level: [disk.zeros((size, size)) for size in sizes] for level in levels}
        columns = blocks[-1].stop
        drifts = {(k, name): disk.zeros((n, columns)) for k in levels for name, n in rows.items()}
        return cls(blocks, grams, drifts)

    def add(
        self,
        exact: np.ndarray,
        x: np.ndarray,
        weights: Mapping[str, np.ndarray],
        shares: Mapping[Level, float],
        workers: int,
    ) -> None:
        """Add a chain's input, by its share in every level; exact is the float chain's.

        exact, x: (n, columns), centred; weights: (rows, columns) by name.
        """
        count, columns = x.shape
        scales = {level: np.float32(share / count) for level, share in shares.items() if share}
        panels = [slice(b, min(b + PANEL, columns)) for b in range(0, columns, PANEL)]
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
                for begin in range(0, len(gram), PANEL):
                    end = min(begin + PANEL, len(gram))
                    gram[end:, begin:end] = gram[begin:end, end:].T


def _missed_outputs(
    exact: np.ndarray, x: np.ndarray, weight: np.ndarray, panels: Sequence[slice]
) -> np.ndarray:
    """(n, rows): what the weight's output lacks for the input x."""
    missed = np.zeros((len(x), len(weight)), np.float32)
    for panel in panels:
        missed += (exact[:, panel] - x[:, panel]) @ weight[:, panel].T
    return missed
