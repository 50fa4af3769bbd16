"""The grids of the levels, and the codes that lie nearest to a weight."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bapq_edge.bank.codes import LayerCodes, dequantize
from bapq_edge.bank.layout import Level

from .scales import divided, fit_scale1, fit_scale2, fit_scale4, grouped, nearest

NEAREST_RESIDUAL_STEPS = 15
"""Residual steps of nearest codes: 8/15 of a step reach the half step that is between two codes of
level 4. As an odd number makes zero a code of level 8, kernels for ARM need no sums of
activations; 16 would make the grid 1/15 finer."""

COMPENSATED_RESIDUAL_STEPS = 13
"""Residual steps of compensated codes: with a residual that reaches 8/13 of a step, a level-4 code
may be the farther neighbour of a weight that is not near one. Odd, as above. On MiniLM, cosines of
levels 8 and 4 with float activations are 0.9996 and 0.9922 at 8 steps, 0.9997 and 0.9919 at 10,
0.9998 and 0.9908 at 12, 0.9999 and 0.9812 at 16."""


def can_compensate(levels: tuple[Level, ...], correlated: bool) -> bool:
    """Whether a layer's codes of levels 8 and 4 can make up for each other's errors.

    `correlated` tells whether correlations of its inputs are known. A bank without level 4 has no
    use for such codes.
    """
    return correlated and 4 in levels


def residual_steps(levels: tuple[Level, ...], correlated: bool) -> int:
    """Residual steps of a layer, by what `can_compensate` is told."""
    compensated = can_compensate(levels, correlated)
    return COMPENSATED_RESIDUAL_STEPS if compensated else NEAREST_RESIDUAL_STEPS


@dataclass(frozen=True)
class Grid:
    """The grids of one family of levels, and the codes that lie nearest on them."""

    lead: Level
    """The level that chooses the codes: 4 for levels 8 and 4, 2 for levels 2 and 1."""
    steps: int
    """Residual steps of level 8 in one step of level 4."""
    scale_columns: dict[Level, int]

    def spread(self, scale: np.ndarray, columns: int, level: Level) -> np.ndarray:
        """Give each column the scale of its group: (rows, groups) to (rows, columns)."""
        return np.repeat(scale, self.scale_columns[level], axis=1)[:, :columns]

    def dequantize(self, codes: LayerCodes, level: Level) -> np.ndarray:
        """The weights at a level, (rows, columns) float32."""
        return dequantize(codes, level, self.steps, self.scale_columns)

    def nearest(self, w: np.ndarray, h: np.ndarray) -> LayerCodes:
        """Search scales, and take the nearest codes; `h`, (columns,), weighs the columns."""
        size = self.scale_columns[self.lead]
        groups = grouped(w, size)
        fit = fit_scale4 if self.lead == 4 else fit_scale2
        scale = fit(groups, grouped(h[None], size))
        code = nearest(divided(groups, scale), 8 if self.lead == 4 else 2)
        code = code.reshape(len(w), -1)[:, : w.shape[1]]
        if self.lead == 4:
            return self.with_residual(w, scale, code)
        size = self.scale_columns[1]
        return self.with_signs(scale, code, fit_scale1(grouped(w, size), grouped(h[None], size)))

    def with_residual(self, w: np.ndarray, scale: np.ndarray, code: np.ndarray) -> LayerCodes:
        """Codes of levels 8 and 4, out of level 4's scale and codes and the nearest residual."""
        residual = np.floor((self.in_steps(w, scale) - code) * np.float32(self.steps))
        return LayerCodes(
            codes={
                "p4": (code + np.float32(7.5)).astype(np.uint8),
                "r8": (np.clip(residual, -8, 7) + np.float32(8)).astype(np.uint8),
            },
            scales={4: scale},
        )

    def with_signs(self, scale: np.ndarray, code: np.ndarray, scale1: np.ndarray) -> LayerCodes:
        """Codes of levels 2 and 1, out of level 2's scale and codes and level 1's scale."""
        sign, bit = divmod((code + np.float32(1.5)).astype(np.uint8), np.uint8(2))
        return LayerCodes(codes={"s1": sign, "m1": bit}, scales={2: scale, 1: scale1})

    def in_steps(self, w: np.ndarray, scale: np.ndarray) -> np.ndarray:
        """The weights in units of the lead's scale; 0 where that is 0."""
        spread = self.spread(scale, w.shape[1], self.lead)
        result: np.ndarray = w * np.divide(1, spread, out=np.zeros_like(spread), where=spread > 0)
        return result

    def reachable(self, w: np.ndarray, scale: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The lowest and the highest level-4 code from which the residual reaches the weight."""
        x = self.in_steps(w, scale)
        reach, half = np.float32(8 / self.steps), np.float32(0.5)
        close = nearest(x, 8)
        lowest = np.minimum(np.ceil(x - reach - half) + half, close)
        highest = np.maximum(np.floor(x + reach - half) + half, close)
        return lowest.clip(-7.5, 7.5), highest.clip(-7.5, 7.5)
