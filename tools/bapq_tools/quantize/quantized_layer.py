"""A layer as the bank stores it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from bapq_edge.bank.codes import LayerCodes, dequantize
from bapq_edge.bank.layer import Method
from bapq_edge.bank.layout import Level

from .row_runs import row_runs


@dataclass(frozen=True)
class QuantizedLayer:
    """Codes, scales and biases of a layer, and what the manifest tells about it."""

    codes: LayerCodes
    residual_steps: int
    scale_columns: dict[Level, int]
    row_error: dict[Level, np.ndarray]
    """Squared output error of each row over the squared output of the layer, (rows,) float64."""
    method: dict[Level, Method]
    """How the codes were chosen, for levels below 32."""
    output_error: dict[Level, float] = field(default_factory=dict)
    """Square of the model's relative output error with this layer alone at the level; empty where
    it was not measured."""

    @property
    def levels(self) -> tuple[Level, ...]:
        """The levels of the layer, highest first."""
        return tuple(self.row_error)

    @property
    def relative_error(self) -> dict[Level, float]:
        """Norm of the output's error over the norm of the output, by level."""
        return {level: float(np.sqrt(rows.sum())) for level, rows in self.row_error.items()}

    def weight(self, level: Level) -> np.ndarray:
        """The weights at a level, (rows, columns) float32."""
        result = np.empty(self.shape, np.float32)
        for run in row_runs(*self.shape):
            result[run] = dequantize(
                self.codes.of_rows(run), level, self.residual_steps, self.scale_columns
            )
        return result

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        held = (*self.codes.codes.values(), self.codes.weight)
        return next(values.shape for values in held if values is not None)

    def bias(self, level: Level) -> np.ndarray | None:
        """The bias at a level, (rows,) float32; None without one."""
        return self.codes.bias.get(level)

    def of_rows(self, rows: np.ndarray) -> QuantizedLayer:
        """Some rows of the layer, by their numbers."""
        errors = {level: values[rows] for level, values in self.row_error.items()}
        return replace(self, codes=self.codes.of_rows(rows), row_error=errors)
