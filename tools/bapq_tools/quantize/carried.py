"""Finds layers whose range of values no quantization carries: they stay in float."""

from __future__ import annotations

import numpy as np

from ..onnx_graph.ir import HeavyLayer
from .options import SCALE_COLUMNS

_LARGEST_RATIO = 1e4
"""Of the largest weight in a scale group to the usual one. Level 8 rounds all of a group to
1/256 of the largest: from here on, by 40 times the usual one. Trained models reach 600 (MiniLM),
and lose nothing by it."""

_LARGEST_LOOKED_UP = 1e4
"""Embeddings are around 1. What is looked up and reaches this is a mask, such as -10000 or the
lowest float, whose zeros must stay zeros, or a table of numbers."""

_TYPICAL_OF = 1 << 16
"""Number of weights that the typical one of a layer is taken from."""

_BLOCK_WEIGHTS = 1 << 20


def uncarried(layer: HeavyLayer) -> str | None:
    """Why the layer must not be quantized; None where it may."""
    if layer.gathered:
        low, high = float(layer.weight.min()), float(layer.weight.max())
        if max(-low, high) >= _LARGEST_LOOKED_UP:
            largest = high if high > -low else low
            return f"a table with values up to {largest:.3g} is a mask or a list, no embedding"
        if low != high and _holds_only(layer.weight, low, high):
            return f"a table of nothing but {low:.3g} and {high:.3g} is a mask, no embedding"
    return _lost_beside_outliers(layer.weight)


def _holds_only(weight: np.ndarray, low: float, high: float) -> bool:
    """Whether no value lies between; most tables are told by their first rows."""
    return all(
        bool(np.isin(part, (np.float32(low), np.float32(high))).all())
        for part in (weight[:8], weight)
    )


def _lost_beside_outliers(weight: np.ndarray) -> str | None:
    """Find a scale group whose largest weight leaves most others no code but that of zero.

    Only where that error is also large beside the weights of the whole layer: in a row that does
    nothing it harms nobody.
    """
    rows, columns = weight.shape
    typical = _median_of_nonzero(weight.reshape(-1)[:: max(1, weight.size // _TYPICAL_OF)])
    if typical == 0:
        return None
    size = SCALE_COLUMNS[4]
    step = max(1, _BLOCK_WEIGHTS // columns)
    for begin in range(0, rows, step):
        peaks = np.abs(weight[begin : begin + step]).astype(np.float64)
        peaks = np.maximum.reduceat(peaks, np.arange(0, columns, size), axis=1)
        for row, group in np.argwhere(peaks > _LARGEST_RATIO * typical):
            values = weight[begin + row, group * size : (group + 1) * size]
            usual = _median_of_nonzero(values)
            if peaks[row, group] > _LARGEST_RATIO * usual:
                return (
                    f"row {begin + row} holds {peaks[row, group]:.3g} beside weights of "
                    f"{usual:.3g}: 8 bits cannot carry both"
                )
    return None


def _median_of_nonzero(values: np.ndarray) -> float:
    magnitudes = np.abs(values[values != 0])
    return float(np.median(magnitudes)) if magnitudes.size else 0.0
