"""Cuts a layer into independent tasks, and joins their results."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from bapq_edge.bank.codes import LayerCodes
from bapq_edge.bank.layer import Method
from bapq_edge.bank.layout import Level, planes_for, scaled_levels

from ..calibration.matrix_stats import MatrixStats
from ..onnx_graph.ir import HeavyLayer
from .family import FamilyResult, families_of, quantize_family
from .grid import can_compensate, residual_steps
from .options import COMPENSATED_CONV_COLUMNS, SCALE_COLUMNS, LayerOptions, scale_columns_of
from .quantized_layer import QuantizedLayer
from .row_runs import TASK_WEIGHTS, row_runs
from .scales import coarseness

_BIAS_GAIN = 0.01
"""A new bias must be worth this share of the squared output error at some level: it costs 4 bytes
per row and plane."""

_MOST_COARSER = 1.25
"""How much coarser a convolution's grid may become by fewer scales. Weights that are spread as a
normal distribution, and those of the models here, reach 1.22; a layer with outliers keeps its own
scales beside them."""


def quantize_layer(
    layer: HeavyLayer, stats: list[MatrixStats] | None, options: LayerOptions
) -> QuantizedLayer:
    """Quantize a whole layer at once; `stats` has one entry per group of its convolution."""
    options = with_scales(layer, stats, options)
    results = (quantize_family(*task) for task in layer_tasks(layer, stats, options))
    return join_layer(layer, options, stats, results)


def with_scales(
    layer: HeavyLayer, stats: list[MatrixStats] | None, options: LayerOptions
) -> LayerOptions:
    """The options with what a convolution has instead of the defaults; not a depthwise one."""
    convolution = not layer.depthwise and all(use.operator == "Conv" for use in layer.uses)
    if not convolution or not can_compensate(options.levels, _correlated(stats)):
        return options
    step = coarseness(layer.weight, SCALE_COLUMNS[4])
    if coarseness(layer.weight, COMPENSATED_CONV_COLUMNS) > _MOST_COARSER * step:
        return options
    return replace(options, scale_columns={4: COMPENSATED_CONV_COLUMNS, **options.scale_columns})


def layer_tasks(
    layer: HeavyLayer, stats: list[MatrixStats] | None, options: LayerOptions
) -> list[tuple[np.ndarray, MatrixStats | None, tuple[Level, ...], LayerOptions]]:
    """Arguments of the calls of `quantize_family` whose results `join_layer` takes."""
    return [
        (layer.weight[part.rows, part.columns], part.stats, family, options)
        for part, family in itertools.product(_parts(layer, stats), families_of(options))
    ]


def join_layer(
    layer: HeavyLayer,
    options: LayerOptions,
    stats: list[MatrixStats] | None,
    results: Iterable[FamilyResult],
    row_weight: np.ndarray | None = None,
) -> QuantizedLayer:
    """Make the layer out of the results of its `layer_tasks`, in their order.

    `row_weight`, (rows,), tells how often each row of a gathered table is read.

    The bias of every level makes up for the shift of the mean; where the layer has none, one is
    added if that pays.
    """
    levels = options.levels
    rows, columns = layer.weight.shape
    codes = LayerCodes(weight=layer.weight if 32 in levels else None)
    # Level 32 loses nothing; of the others, what the blocks of columns lose adds up.
    errors = {level: np.zeros(rows) for level in levels}
    shifts = {level: np.zeros(rows) for level in levels}
    methods: dict[Level, list[Method]] = {level: [] for level in levels}
    norms = np.zeros(rows)
    families = families_of(options)
    parts = itertools.product(_parts(layer, stats), families)
    for (part, family), result in zip(parts, results, strict=True):
        for plane, code in result.codes.codes.items():
            if plane in planes_for(levels):
                if plane not in codes.codes:
                    codes.codes[plane] = np.empty((rows, columns), np.uint8)
                codes.codes[plane][part.rows, part.columns] = code
        for level, scale in result.codes.scales.items():
            if level in scaled_levels(levels):
                size = scale_columns_of(options)[level]
                if level not in codes.scales:
                    codes.scales[level] = np.empty((rows, -(-columns // size)), np.float32)
                begin = part.columns.start // size
                codes.scales[level][part.rows, begin : begin + scale.shape[1]] = scale
        for level in family:
            found = result.levels[level]
            if level in levels:
                errors[level][part.rows] += found.row_error
                shifts[level][part.rows] += found.shift
                methods[level].append(found.method)
        if family == families[-1]:
            norms[part.rows] += result.row_norm
    if row_weight is not None:
        for values in (norms, *errors.values()):
            values *= row_weight
    norm = float(norms.sum())
    pays = any(
        float(np.square(shifts[level]).sum()) > _BIAS_GAIN * errors[level].sum() for level in levels
    )
    if layer.bias is not None or (stats is not None and pays and not layer.gathered):
        bias = np.zeros(rows, np.float32) if layer.bias is None else layer.bias
        for level in levels:
            codes.bias[level] = (bias + shifts[level]).astype(np.float32)
    return QuantizedLayer(
        codes,
        residual_steps(levels, _correlated(stats)),
        {level: scale_columns_of(options)[level] for level in codes.scales},
        {level: errors[level] / norm if norm else 0 * errors[level] for level in levels},
        {level: _most(found) for level, found in methods.items() if found},
    )


def _correlated(stats: list[MatrixStats] | None) -> bool:
    return stats is not None and all(each.correlated for each in stats)


@dataclass(frozen=True)
class _LayerPart:
    """A part of a layer that a task works on, and what is known of its input."""

    rows: slice
    columns: slice
    stats: MatrixStats | None


def _parts(layer: HeavyLayer, stats: list[MatrixStats] | None) -> list[_LayerPart]:
    """Cut a layer so that no part is in two groups of a grouped Conv or two blocks of columns.

    The parts do not depend on the number of workers, so neither does the bank.
    """
    rows, columns = layer.weight.shape
    groups: list[MatrixStats | None] = [None] if stats is None else [*stats]
    group_rows = rows // len(groups)
    parts = []
    for group, own in enumerate(groups):
        first = group * group_rows
        for number, block in enumerate((slice(0, columns),) if own is None else own.blocks):
            for run in row_runs(group_rows, block.stop - block.start, TASK_WEIGHTS):
                part_rows = slice(first + run.start, first + run.stop)
                known = None if own is None else own.part(run, number)
                parts.append(_LayerPart(part_rows, block, known))
    return parts


def _most(methods: list[Method]) -> Method:
    return max(sorted(set(methods)), key=methods.count)
