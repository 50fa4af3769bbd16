"""Chooses codes and scales of a layer, level by level.

Every level is fitted by itself except where planes are shared: level 8 adds `r8` to level 4's `p4`,
and level 1 reads level 2's `s1`. Errors are weighted by the mean square of the column's input, the
diagonal of the layer's true output error. All scales are rounded to bf16 before codes are chosen,
so that codes are nearest on the very grid that the device computes on.

Level 8 is a uniform grid of 256 values: the residual divides one step of level 4 into
`RESIDUAL_STEPS`, and no value of it is reached twice.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from bapq_edge.bank.codes import LayerCodes, dequantize, from_bf16, to_bf16
from bapq_edge.bank.layout import PLANES, SCALED_PLANES, Level, Plane, planes_for

from .ir import ColumnStats, HeavyLayer, LayerOptions

SCALE_COLUMNS: dict[Level, int] = {4: 32, 2: 64, 1: 128}
"""Columns per scale. A bf16 scale then costs 0.5, 0.25 and 0.125 bits per weight: an eighth of the
level's own bits. On MiniLM the mean level-2 error is 0.312, 0.330, 0.345 at 32, 64, 128."""

RESIDUAL_STEPS = 16
"""Level 4 rounds to nearest, so the residual need not reach past half a step: 7.5/16 of a step and
half a residual step cover it exactly, with the finest grid the format admits. On MiniLM, scales
at the group's largest magnitude / 8, the mean level-8 error is 0.0056, 0.0060, 0.0075, 0.0114 at
16, 15, 12, 8 steps."""

_LEVEL4_STEPS = np.linspace(8, 7, 9)
"""Level-4 scales tried: the group's largest magnitude over these. 8 is the edge of level 8's grid;
a smaller scale would clip the largest weight at level 8, where it cannot be made good. 7 puts the
largest weight inside level 4's grid. On MiniLM 17 scales lower the level-4 error by 0.1 %; going on
to 6 lowers it by 1 % and raises that of level 8 by 2 %."""

_LEVEL2_STARTS = np.linspace(0.5, 1.4, 7)
"""Level-2 scales tried first, in units of the group's weighted rms; the best four-level grid for a
normal distribution has 0.996, magnitudes that are all alike 2/3."""

_LEVEL2_REFITS = 2
"""Rounds of (nearest codes, best scale for them) after the search; a third gains 0.01 %."""

_DAMPING = np.float32(0.1)
"""Added to every column's weight, in units of their mean: an input that calibration never saw
active may still be active later."""

_CORRECTED_SHARE: dict[Level, float] = {32: 0.0, 8: 0.5, 4: 0.5, 2: 0.5, 1: 0.0}
"""Share of the mean output error that the bias takes up. The mean is that of the float model's
inputs on the calibration data: layers before shift it at low levels, padded sequences at all. All
of it is best where it is exact (MiniLM at level 4: 0.967, half 0.964, none 0.955), and worse than
none where calibration sentences are two thirds padding (0.947, half 0.958, none 0.954). At level 1
even half lost 40 of 600 digits."""

_BIAS_GAIN = 0.01
"""A new bias must be worth this share of the squared output error at some level: it costs 4 bytes
per row and plane, and the sampling error of the mean must not outweigh it."""

_SMALLEST_PEAK = np.float32(2.0**-116)
"""Groups below this are stored as zero: scale and scale/16 must be normal float32 values."""

_TINY = np.float32(2.0**-125)
"""Stands for zero: less than `_SMALLEST_PEAK`, and normal."""

_LARGEST_SCALE = np.float32(2.0**125)
"""An eighth of float32's range: no code times its scale overflows, whatever the weights."""

_BLOCK_WEIGHTS = 1 << 17
"""Weights quantized at a time by one thread: the temporaries, about ten float32 arrays of this
size, then stay near a core's cache."""


@dataclass(frozen=True)
class QuantizedInfo:
    """What the bank's manifest tells about a quantized layer."""

    residual_steps: int
    scale_columns: dict[Level, int]
    row_error: dict[Level, np.ndarray]
    """(rows,) float64: squared output error of a row over the squared output of the layer"""

    @property
    def relative_error(self) -> dict[Level, float]:
        """Norm of the output's error over norm of the output."""
        return {level: float(np.sqrt(rows.sum())) for level, rows in self.row_error.items()}


def scale_columns_of(options: LayerOptions) -> dict[Level, int]:
    """Columns per scale of levels 4, 2 and 1 for these options."""
    return {**SCALE_COLUMNS, **options.scale_columns}


def quantize_layer(
    layer: HeavyLayer, stats: ColumnStats | None, options: LayerOptions, workers: int = 1
) -> tuple[LayerCodes, QuantizedInfo]:
    """Codes, scales and biases of every plane that the options' levels need; rows keep their order.

    Without stats all columns weigh the same. The result does not depend on `workers`.
    """
    planes = planes_for(options.levels)
    plane_levels: list[Level] = [PLANES[plane] for plane in planes]
    scale_columns = scale_columns_of(options)
    result = _empty_codes(layer, planes, scale_columns)
    blocks = _row_blocks(layer, stats)

    def run(block: _RowBlock) -> dict[Level, _RowErrors]:
        return _quantize_block(layer, block, plane_levels, scale_columns, result)

    with ThreadPoolExecutor(max_workers=max(1, workers)) as pool:
        errors = list(pool.map(run, blocks))

    shift = {
        level: _CORRECTED_SHARE[level] * np.concatenate([e[level].mean for e in errors])
        for level in plane_levels
    }
    squares = {level: np.concatenate([e[level].square for e in errors]) for level in plane_levels}
    norm = sum(e[plane_levels[0]].norm for e in errors)
    if layer.bias is not None or _bias_pays(layer, stats, shift, squares):
        bias = np.zeros(len(layer.weight), np.float32) if layer.bias is None else layer.bias
        for level in plane_levels:
            result.bias[level] = (bias + shift[level]).astype(np.float32)
    row_error = {
        level: squares[level] / norm if norm else 0 * squares[level] for level in options.levels
    }
    stored = {level: scale_columns[level] for level in result.scales}
    return result, QuantizedInfo(RESIDUAL_STEPS, stored, row_error)


def fit_scale4(w: np.ndarray, h: np.ndarray) -> np.ndarray:
    """Level-4 scale with the smallest weighted error, never clipping level 8.

    Shapes: w (rows, groups, columns), h alike or broadcast; returns (rows, groups).
    """
    peak = _peak(w)
    best_scale = np.zeros_like(peak)
    best_error = np.full(peak.shape, np.inf, np.float32)
    for steps in _LEVEL4_STEPS:
        scale = _bf16_not_below(np.minimum(peak / np.float32(steps), _LARGEST_SCALE))
        x = _divided(w, scale)
        x -= _nearest(x, 8)
        x *= x
        x *= h
        error = x.sum(-1) * _relative_square(scale, peak)
        better = error < best_error
        best_scale[better], best_error[better] = scale[better], error[better]
    return best_scale


def fit_scale2(w: np.ndarray, h: np.ndarray) -> np.ndarray:
    """Level-2 scale with the smallest weighted error: a search, then alternating refits.

    Shapes as in `fit_scale4`.
    """
    peak = _peak(w)
    unit = _divided(w, peak)  # squares of any float32 would overflow
    hw = unit * h
    rms = np.sqrt(_ratio((hw * unit).sum(-1), _sum_weights(h, w)))  # in units of the peak
    best_scale = np.zeros_like(peak)
    best_gain = np.full(peak.shape, -np.inf, np.float32)

    def keep_better(scale: np.ndarray) -> np.ndarray:
        """Compare a scale with the best one; returns the best scale for the same codes."""
        code = _nearest(_divided(w, scale), 2)
        cross = (hw * code).sum(-1)
        energy = (code * code * h).sum(-1)
        # sum h (w - s c)^2 = const - gain
        ratio = _ratio(scale, peak)
        gain = ratio * (2 * cross - ratio * energy)
        better = gain > best_gain
        best_scale[better], best_gain[better] = scale[better], gain[better]
        return _scale_of(peak, _ratio(cross, energy))

    for start in _LEVEL2_STARTS:
        keep_better(_scale_of(peak, rms * np.float32(start)))
    for _ in range(_LEVEL2_REFITS):
        keep_better(keep_better(best_scale.copy()))
    return best_scale


def fit_scale1(w: np.ndarray, h: np.ndarray) -> np.ndarray:
    """Level-1 scale with the smallest weighted error for the signs of w: twice the mean of |w|.

    Shapes as in `fit_scale4`.
    """
    peak = _peak(w)
    mean = _ratio((np.abs(_divided(w, peak)) * h).sum(-1), _sum_weights(h, w))
    return _scale_of(peak, 2 * mean)


@dataclass(frozen=True)
class _RowBlock:
    rows: slice
    weighting: np.ndarray
    """(columns,): h, all positive, mean about 1"""
    mean: np.ndarray | None
    """(columns,): mean of the input"""
    mean_square: np.ndarray
    """(columns,): mean square of the input, ones without stats"""


@dataclass(frozen=True)
class _RowErrors:
    mean: np.ndarray
    """(rows,): mean of the level's output error, (w - w_level) @ mean(x)"""
    square: np.ndarray
    """(rows,): weighted sum of (w - w_level)^2"""
    norm: float
    """weighted sum of w^2"""


def _empty_codes(
    layer: HeavyLayer, planes: Iterable[Plane], scale_columns: dict[Level, int]
) -> LayerCodes:
    result = LayerCodes()
    rows, columns = layer.weight.shape
    for plane in planes:
        if plane == "f32":
            result.weight = np.ascontiguousarray(layer.weight, np.float32)
        else:
            result.codes[plane] = np.empty((rows, columns), np.uint8)
        level = SCALED_PLANES.get(plane)
        if level is not None:
            groups = -(-columns // scale_columns[level])
            result.scales[level] = np.empty((rows, groups), np.float32)
    return result


def _row_blocks(layer: HeavyLayer, stats: ColumnStats | None) -> list[_RowBlock]:
    """Runs of rows, none across the border of two groups of a grouped Conv."""
    rows, columns = layer.weight.shape
    step = max(1, _BLOCK_WEIGHTS // columns)
    ones = np.ones(columns, np.float32)
    group_count = 1 if stats is None else len(stats.mean)
    group_rows = rows // group_count
    blocks = []
    for group in range(group_count):
        mean, mean_square, weighting = None, ones, ones
        if stats is not None:
            mean, mean_square = stats.mean[group], stats.mean_square[group]
            average = mean_square.mean()
            if average > 0:
                weighting = mean_square / average + _DAMPING
        end = (group + 1) * group_rows
        for begin in range(group * group_rows, end, step):
            rows_here = slice(begin, min(begin + step, end))
            blocks.append(_RowBlock(rows_here, weighting, mean, mean_square))
    return blocks


def _quantize_block(
    layer: HeavyLayer,
    block: _RowBlock,
    levels: list[Level],
    scale_columns: dict[Level, int],
    result: LayerCodes,
) -> dict[Level, _RowErrors]:
    w = np.ascontiguousarray(layer.weight[block.rows], np.float32)
    w = np.copysign(np.maximum(np.abs(w), _TINY), w)  # the sign of a pruned zero decides its code
    part = LayerCodes(weight=w)
    if 4 in levels:
        _fit_levels_8_and_4(w, block.weighting, scale_columns, part)
    if 1 in levels:
        _fit_levels_2_and_1(w, block.weighting, scale_columns, part)
    for plane, code in result.codes.items():
        code[block.rows] = part.codes[plane]
    for level, scale in result.scales.items():
        scale[block.rows] = part.scales[level]
    return {level: _row_errors(w, part, level, block, scale_columns) for level in levels}


def _fit_levels_8_and_4(
    w: np.ndarray, h: np.ndarray, scale_columns: dict[Level, int], part: LayerCodes
) -> None:
    grouped = _grouped(w, scale_columns[4])
    scale = fit_scale4(grouped, _grouped(h[None], scale_columns[4]))
    x = _divided(grouped, scale)
    nearest = _nearest(x, 8)
    residual = np.floor((x - nearest) * np.float32(RESIDUAL_STEPS))
    part.codes["p4"] = _ungrouped(nearest + np.float32(7.5), w)
    part.codes["r8"] = _ungrouped(np.clip(residual, -8, 7) + np.float32(8), w)
    part.scales[4] = scale


def _fit_levels_2_and_1(
    w: np.ndarray, h: np.ndarray, scale_columns: dict[Level, int], part: LayerCodes
) -> None:
    grouped = _grouped(w, scale_columns[2])
    part.scales[2] = fit_scale2(grouped, _grouped(h[None], scale_columns[2]))
    code = _ungrouped(_nearest(_divided(grouped, part.scales[2]), 2) + np.float32(1.5), w)
    part.codes["s1"], part.codes["m1"] = code >> 1, code & 1
    size = scale_columns[1]
    part.scales[1] = fit_scale1(_grouped(w, size), _grouped(h[None], size))


def _row_errors(
    w: np.ndarray,
    part: LayerCodes,
    level: Level,
    block: _RowBlock,
    scale_columns: dict[Level, int],
) -> _RowErrors:
    """Errors of what the device will really multiply with."""
    difference = w - dequantize(part, level, RESIDUAL_STEPS, scale_columns)
    mean = np.zeros(len(w), np.float32)
    if block.mean is not None:
        mean = (difference * block.mean).sum(1, dtype=np.float64)

    def weighted_square(values: np.ndarray) -> np.ndarray:
        return (np.square(values, dtype=np.float64) * block.mean_square).sum(1)

    return _RowErrors(mean, weighted_square(difference), float(weighted_square(w).sum()))


def _bias_pays(
    layer: HeavyLayer,
    stats: ColumnStats | None,
    shift: dict[Level, np.ndarray],
    squares: dict[Level, np.ndarray],
) -> bool:
    """Whether a layer without a bias gets one, to take up the mean of the output error.

    A gathered row is an output itself: nothing is summed that a bias could correct.
    """
    if stats is None or any(use.operator == "Gather" for use in layer.uses):
        return False
    return any(
        float(np.square(shift[level]).sum()) > _BIAS_GAIN * squares[level].sum() for level in shift
    )


def _grouped(values: np.ndarray, size: int) -> np.ndarray:
    """(rows, columns) -> (rows, groups, size), zeros past the last column.

    Padded weights and their h are zero, so no sum and no maximum sees them.
    """
    rows, columns = values.shape
    groups = -(-columns // size)
    if groups * size == columns:
        return values.reshape(rows, groups, size)
    padded = np.zeros((rows, groups * size), np.float32)
    padded[:, :columns] = values
    return padded.reshape(rows, groups, size)


def _ungrouped(code: np.ndarray, like: np.ndarray) -> np.ndarray:
    return code.astype(np.uint8).reshape(len(like), -1)[:, : like.shape[1]]


def _peak(w: np.ndarray) -> np.ndarray:
    """Largest magnitude per group; 0 for groups that are stored as zero."""
    peak = np.abs(w).max(-1)
    return np.where(peak < _SMALLEST_PEAK, np.float32(0), peak)


def _divided(w: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """w / scale per group; 0 where the scale is 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        inverse = np.where(scale > 0, 1 / scale, np.float32(0))
    return w * inverse[..., None]


def _nearest(x: np.ndarray, half: int) -> np.ndarray:
    """Nearest of the 2*half mid-rise points -half+0.5 .. half-0.5."""
    return np.clip(np.floor(x), -half, half - 1) + np.float32(0.5)


def _ratio(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a / b, 0 where b is 0."""
    return np.divide(a, b, out=np.zeros_like(a), where=b > 0)


def _relative_square(scale: np.ndarray, peak: np.ndarray) -> np.ndarray:
    return np.square(_ratio(scale, peak))


def _sum_weights(h: np.ndarray, w: np.ndarray) -> np.ndarray:
    return np.broadcast_to(h.sum(-1), w.shape[:-1])


def _scale_of(peak: np.ndarray, ratio: np.ndarray) -> np.ndarray:
    """peak * ratio as bf16, within the scales' range."""
    with np.errstate(over="ignore"):
        return from_bf16(to_bf16(np.minimum(peak * ratio, _LARGEST_SCALE)))


def _bf16_not_below(values: np.ndarray) -> np.ndarray:
    """Smallest bf16 that is no less than the value, for finite values >= 0."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return from_bf16(((bits + np.uint32(0xFFFF)) >> np.uint32(16)).astype(np.uint16))
