"""Chooses codes, scales and biases of a layer.

Levels 8 and 4 share plane `p4`, levels 2 and 1 share `s1`: two families that have nothing to do
with each other. Of each family two candidates are made, nearest codes with searched scales and
error-compensated codes, and the one with the smaller error on held-out samples is kept.

Level 8 is a uniform grid around level 4's codes. With nearest codes the residual reaches half a
step of level 4; compensated codes may lie further off, and the residual still finds the weight.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import numpy as np

from bapq_edge.bank.codes import LayerCodes, dequantize, join_rows
from bapq_edge.bank.layer import Method
from bapq_edge.bank.layout import Level, planes_for, scaled_levels

from ..onnx_graph.ir import HeavyLayer, LayerOptions, MatrixStats
from .rounding import (
    Problem,
    absorb_drift,
    descend_codes,
    refit_scales,
    round_compensated,
)
from .scales import divided, fit_scale1, fit_scale2, fit_scale4, grouped, nearest

SCALE_COLUMNS: dict[Level, int] = {4: 32, 2: 96, 1: 128}
"""Columns per scale: a bf16 scale costs 0.5, 0.17 and 0.125 bits per weight. With 64 instead of
96, level 2 of MiniLM has a cosine of 0.877 instead of 0.868, and a bank of levels 8, 4 and 2 has
1.274 instead of 1.265 times the bytes of one of level 8."""

NEAREST_RESIDUAL_STEPS = 16
"""Nearest codes: 7.5/16 of a step and half a residual step reach exactly half a step of level 4,
with the finest grid the format admits."""

COMPENSATED_RESIDUAL_STEPS = 12
"""The residual reaches 2/3 of a step: a level-4 code may be the farther neighbour of a weight in
the middle third. On MiniLM, cosines of levels 8 and 4 with float activations are 0.9996 and 0.9922
at 8 steps, 0.9997 and 0.9919 at 10, 0.9998 and 0.9908 at 12, 0.9999 and 0.9812 at 16."""

FAMILIES: tuple[tuple[Level, ...], ...] = ((8, 4), (2, 1))
"""Levels whose planes depend on each other."""

_DAMPING = 0.05
"""Share of the mean diagonal added to H: calibration has not seen all directions."""

_RIDGES = (0.03, 0.3)
"""Shares added to H where drift is absorbed; the best on held-out samples is taken, or none."""

_DESCENTS: dict[Level, int] = {4: 1, 2: 2}
"""Rounds of coordinate descent after compensated rounding."""

_LEVEL1_REFITS = 2
"""Rounds over the scales of level 1, whose signs are given."""

_BIAS_GAIN = 0.01
"""A new bias must be worth this share of the squared output error at some level: it costs 4 bytes
per row and plane."""

_TINY = np.float32(2.0**-125)
"""Stands for zero: too small for any scale, and normal."""

_LARGEST_WEIGHT = 1e15
"""Larger ones are rounded to nearest: squares of them leave float32's range."""

_BLOCK_WEIGHTS = 1 << 17
"""Weights rounded to nearest at a time: the temporaries, about ten float32 arrays of this size,
then stay near a core's cache."""

_RUN_WEIGHTS = 1 << 22
"""Weights whose compensated codes are chosen at a time, which takes about a dozen float32 arrays of
this size. All runs of a task share its factors."""

_TASK_WEIGHTS = 1 << 25
"""Weights of one task at most."""


@dataclass(frozen=True)
class LevelResult:
    """How one level of some rows came out."""

    row_error: np.ndarray
    """(rows,) float64: mean square of the error that the rounding adds to a row's output"""
    shift: np.ndarray
    """(rows,) float64: mean of the output that the bias must make up for"""
    method: Method
    """nearest or compensated"""


@dataclass
class FamilyResult:
    """Codes and scales of one family of levels, for some rows."""

    codes: LayerCodes
    levels: dict[Level, LevelResult]
    row_norm: np.ndarray
    """(rows,) float64: mean square of the output, in the terms of `row_error`"""


@dataclass(frozen=True)
class QuantizedLayer:
    """A layer as the bank stores it, and what the manifest tells about it."""

    codes: LayerCodes
    residual_steps: int
    scale_columns: dict[Level, int]
    row_error: dict[Level, np.ndarray]
    """(rows,) float64: squared output error of a row over the squared output of the layer"""
    method: dict[Level, Method]
    """of levels below 32"""
    output_error: dict[Level, float] = field(default_factory=dict)
    """square of the model's relative output error with this layer alone at the level; empty where
    it was not measured"""

    @property
    def levels(self) -> tuple[Level, ...]:
        """Levels of the layer, highest first."""
        return tuple(self.row_error)

    @property
    def relative_error(self) -> dict[Level, float]:
        """Norm of the output's error over norm of the output."""
        return {level: float(np.sqrt(rows.sum())) for level, rows in self.row_error.items()}

    def weight(self, level: Level) -> np.ndarray:
        """(rows, columns) float32 at a level."""
        result = np.empty(self.shape, np.float32)
        for run in _runs_of(*self.shape):
            part = self.codes.of_rows(run)
            result[run] = dequantize(part, level, self.residual_steps, self.scale_columns)
        return result

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns)"""
        held = (*self.codes.codes.values(), self.codes.weight)
        return next(values.shape for values in held if values is not None)

    def bias(self, level: Level) -> np.ndarray | None:
        """(rows,) float32 at a level; None without one."""
        return self.codes.bias.get(level)

    def of_rows(self, rows: np.ndarray) -> QuantizedLayer:
        """Some rows of the layer, by their numbers."""
        errors = {level: values[rows] for level, values in self.row_error.items()}
        return replace(self, codes=self.codes.of_rows(rows), row_error=errors)


def scale_columns_of(options: LayerOptions) -> dict[Level, int]:
    """Columns per scale of levels 4, 2 and 1 for these options."""
    return {**SCALE_COLUMNS, **options.scale_columns}


def residual_steps(levels: tuple[Level, ...], calibrated: bool) -> int:
    """Residual steps of a layer: a bank without level 4 has no use for compensated codes."""
    compensated = calibrated and 4 in levels
    return COMPENSATED_RESIDUAL_STEPS if compensated else NEAREST_RESIDUAL_STEPS


def quantize_family(
    weight: np.ndarray,
    stats: MatrixStats | None,
    family: tuple[Level, ...],
    options: LayerOptions,
) -> FamilyResult:
    """One family of levels of a matrix (rows, columns), or of some of its rows.

    A pure function: independent matrices, families and runs of rows may be worked on anywhere.
    Without stats all columns weigh the same and codes are the nearest.
    """
    # The sign of a zero decides its code: no grid has a zero.
    signs, weight = weight, np.abs(weight, dtype=np.float32)
    np.maximum(weight, _TINY, out=weight)
    np.copysign(weight, signs, out=weight)
    lead: Level = 4 if 4 in family else 2
    grid = Grid(lead, residual_steps(options.levels, stats is not None), scale_columns_of(options))
    if stats is None:
        return _nearest_in_blocks(weight, grid, family)
    # A bank with level 8 or 1 of this family only has no chain for its lead.
    seen = stats.levels.get(lead) or next(iter(stats.levels.values()))
    problem = Problem.damped(stats.blocks, seen.grams, _DAMPING)
    runs = _runs_of(*weight.shape)
    # Without held-out samples the last one, compensated, wins.
    candidates = [
        _Candidate("nearest", [grid.nearest(weight[run], problem.diagonal) for run in runs], {})
    ]
    if lead in stats.levels and lead in options.levels:
        candidates += _compensated(weight, stats, problem, grid)

    def held_out_error(candidate: _Candidate) -> float:
        error = 0.0
        for run, codes in zip(runs, candidate.codes, strict=True):
            with np.errstate(over="ignore", invalid="ignore"):
                missed = stats.held_out @ weight[run].T
                missed -= seen.held_out @ grid.dequantize(codes, lead).T
                square = np.square(missed, dtype=np.float64).sum()
            error += float(np.nan_to_num(square, nan=np.inf))
        return error

    best = min(reversed(candidates), key=held_out_error)
    results = {}
    for level in family:
        # Level 8 holds the weight itself, and meets what the float model would.
        mean = stats.mean if level == 8 else stats.levels.get(level, seen).mean
        aim = best.targets.get(level, weight)
        errors, shifts = [], []
        for run, codes in zip(runs, best.codes, strict=True):
            found = grid.dequantize(codes, level)
            shifts.append(weight[run].astype(np.float64) @ stats.mean)
            shifts[-1] -= found.astype(np.float64) @ mean
            errors.append(problem.row_errors(aim[run] - found))
        method = best.method if level in best.targets else "nearest"
        results[level] = LevelResult(np.concatenate(errors), np.concatenate(shifts), method)
    norm = np.concatenate([problem.row_errors(weight[run]) for run in runs])
    return FamilyResult(join_rows(best.codes), results, norm)


@dataclass(frozen=True)
class _Candidate:
    """One way to choose the codes of a family."""

    method: Method
    codes: list[LayerCodes]
    """run by run of the rows"""
    targets: dict[Level, np.ndarray]
    """(rows, columns): what a level's codes aim at, where that is not the weight"""


def join_layer(
    layer: HeavyLayer,
    options: LayerOptions,
    stats: list[MatrixStats] | None,
    results: Iterable[FamilyResult],
    row_weight: np.ndarray | None = None,
) -> QuantizedLayer:
    """The layer out of the results of its `layer_tasks`, in their order.

    `row_weight`, (rows,), is how often each row of a gathered table is read.

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
    places = itertools.product(_places(layer, stats), families)
    for (place, family), result in zip(places, results, strict=True):
        for plane, values in result.codes.codes.items():
            if plane in planes_for(levels):
                if plane not in codes.codes:
                    codes.codes[plane] = np.empty((rows, columns), np.uint8)
                codes.codes[plane][place.rows, place.columns] = values
        for level, values in result.codes.scales.items():
            if level in scaled_levels(levels):
                size = scale_columns_of(options)[level]
                if level not in codes.scales:
                    codes.scales[level] = np.empty((rows, -(-columns // size)), np.float32)
                begin = place.columns.start // size
                codes.scales[level][place.rows, begin : begin + values.shape[1]] = values
        for level in family:
            found = result.levels[level]
            if level in levels:
                errors[level][place.rows] += found.row_error
                shifts[level][place.rows] += found.shift
                methods[level].append(found.method)
        if family == families[-1]:
            norms[place.rows] += result.row_norm
    if row_weight is not None:
        for values in (norms, *errors.values()):
            values *= row_weight
    norm = float(norms.sum())
    pays = any(
        float(np.square(shifts[level]).sum()) > _BIAS_GAIN * errors[level].sum() for level in levels
    )
    gathered = any(use.operator == "Gather" for use in layer.uses)
    if layer.bias is not None or (stats is not None and pays and not gathered):
        bias = np.zeros(rows, np.float32) if layer.bias is None else layer.bias
        for level in levels:
            codes.bias[level] = (bias + shifts[level]).astype(np.float32)
    return QuantizedLayer(
        codes,
        residual_steps(levels, stats is not None),
        {level: scale_columns_of(options)[level] for level in codes.scales},
        {level: errors[level] / norm if norm else 0 * errors[level] for level in levels},
        {level: _most(found) for level, found in methods.items() if found},
    )


def quantize_layer(
    layer: HeavyLayer, stats: list[MatrixStats] | None, options: LayerOptions
) -> QuantizedLayer:
    """A whole layer, here and now; `stats` has one entry per group of its convolution."""
    results = (quantize_family(*task) for task in layer_tasks(layer, stats, options))
    return join_layer(layer, options, stats, results)


def layer_tasks(
    layer: HeavyLayer, stats: list[MatrixStats] | None, options: LayerOptions
) -> list[tuple[np.ndarray, MatrixStats | None, tuple[Level, ...], LayerOptions]]:
    """Arguments of the calls of `quantize_family` that `join_layer` takes the results of."""
    return [
        (layer.weight[place.rows, place.columns], place.stats, family, options)
        for place, family in itertools.product(_places(layer, stats), families_of(options))
    ]


def families_of(options: LayerOptions) -> list[tuple[Level, ...]]:
    """Families with a level that is wanted."""
    return [family for family in FAMILIES if any(level in options.levels for level in family)]


@dataclass(frozen=True)
class _Place:
    """A part of a layer that a task works on, and what is known of its input."""

    rows: slice
    columns: slice
    stats: MatrixStats | None


def _places(layer: HeavyLayer, stats: list[MatrixStats] | None) -> list[_Place]:
    """Parts of a layer, none across two groups of a grouped Conv or two blocks of columns.

    They do not depend on the number of workers, so neither does the bank.
    """
    rows, columns = layer.weight.shape
    places = []
    for group, seen in enumerate([None] if stats is None else stats):
        group_rows = rows // (1 if stats is None else len(stats))
        for block, part in enumerate((slice(0, columns),) if seen is None else seen.blocks):
            width = part.stop - part.start
            for run in _runs_of(group_rows, width, _TASK_WEIGHTS):
                place = slice(run.start + group * group_rows, run.stop + group * group_rows)
                places.append(_Place(place, part, None if seen is None else seen.part(run, block)))
    return places


def _runs_of(rows: int, columns: int, weights: int = _RUN_WEIGHTS) -> list[slice]:
    """Runs of rows with at most so many weights, or 16 rows."""
    step = max(16, weights // columns // 16 * 16)
    return [slice(begin, min(begin + step, rows)) for begin in range(0, rows, step)]


@dataclass(frozen=True)
class Grid:
    """The grids of one family of levels, and the codes that lie nearest on them."""

    lead: Level
    """4 for levels 8 and 4, 2 for levels 2 and 1"""
    steps: int
    """residual steps"""
    scale_columns: dict[Level, int]

    def spread(self, scale: np.ndarray, columns: int, level: Level) -> np.ndarray:
        """(rows, groups) -> (rows, columns)."""
        return np.repeat(scale, self.scale_columns[level], axis=1)[:, :columns]

    def dequantize(self, codes: LayerCodes, level: Level) -> np.ndarray:
        """(rows, columns) float32 at a level."""
        return dequantize(codes, level, self.steps, self.scale_columns)

    def nearest(self, w: np.ndarray, h: np.ndarray) -> LayerCodes:
        """Searched scales and nearest codes; h: (columns,) weighs the columns."""
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
        """Levels 8 and 4 out of level 4's scale and codes: the nearest residual is added."""
        residual = np.floor((self.in_steps(w, scale) - code) * np.float32(self.steps))
        return LayerCodes(
            codes={
                "p4": (code + np.float32(7.5)).astype(np.uint8),
                "r8": (np.clip(residual, -8, 7) + np.float32(8)).astype(np.uint8),
            },
            scales={4: scale},
        )

    def with_signs(self, scale: np.ndarray, code: np.ndarray, scale1: np.ndarray) -> LayerCodes:
        """Levels 2 and 1 out of level 2's scale and codes and level 1's scale."""
        both = (code + np.float32(1.5)).astype(np.uint8)
        return LayerCodes(codes={"s1": both >> 1, "m1": both & 1}, scales={2: scale, 1: scale1})

    def in_steps(self, w: np.ndarray, scale: np.ndarray) -> np.ndarray:
        """Weights in units of the lead's scale; 0 where that is 0."""
        spread = self.spread(scale, w.shape[1], self.lead)
        return w * np.divide(1, spread, out=np.zeros_like(spread), where=spread > 0)

    def reachable(self, w: np.ndarray, scale: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Lowest and highest level-4 codes from which the residual finds the weight."""
        x = self.in_steps(w, scale)
        reach, half = np.float32(8 / self.steps), np.float32(0.5)
        close = nearest(x, 8)
        lowest = np.minimum(np.ceil(x - reach - half) + half, close)
        highest = np.maximum(np.floor(x + reach - half) + half, close)
        return lowest.clip(-7.5, 7.5), highest.clip(-7.5, 7.5)


def _nearest_in_blocks(weight: np.ndarray, grid: Grid, family: tuple[Level, ...]) -> FamilyResult:
    """Nearest codes where nothing is known of the inputs."""
    ones = np.ones(weight.shape[1], np.float32)
    step = max(1, _BLOCK_WEIGHTS // weight.shape[1])
    parts: list[LayerCodes] = []
    errors: dict[Level, list[np.ndarray]] = {level: [] for level in family}
    for begin in range(0, len(weight), step):
        block = weight[begin : begin + step]
        parts.append(grid.nearest(block, ones))
        for level in family:
            missed = block - grid.dequantize(parts[-1], level)
            errors[level].append(np.square(missed, dtype=np.float64).sum(1))
    none = np.zeros(len(weight))
    results = {
        level: LevelResult(np.concatenate(e), none, "nearest") for level, e in errors.items()
    }
    return FamilyResult(join_rows(parts), results, np.square(weight, dtype=np.float64).sum(1))


def _compensated(
    weight: np.ndarray, stats: MatrixStats, problem: Problem, grid: Grid
) -> list[_Candidate]:
    """Compensated codes of one family.

    None where the statistics are too ill-conditioned, or the weights too large, to compute with.
    """
    if float(np.abs(weight).max()) > _LARGEST_WEIGHT:
        return []
    runs = _runs_of(*weight.shape)
    try:
        targets = {grid.lead: _target(weight, stats, grid.lead)}
        lead = targets[grid.lead]
        if grid.lead == 4:
            codes = [_compensate4(weight[run], lead[run], problem, grid) for run in runs]
        else:
            codes = [_compensate2(lead[run], problem, grid) for run in runs]
        if grid.lead == 2 and 1 in stats.levels:
            targets[1] = _target(weight, stats, 1)
            own = Problem.damped(stats.blocks, stats.levels[1].grams, _DAMPING)
            for run, found in zip(runs, codes, strict=True):
                found.scales[1] = _refit1(targets[1][run], found, own, grid)
        return [_Candidate("compensated", codes, targets)]
    except np.linalg.LinAlgError:
        return []


def _compensate4(
    weight: np.ndarray, target: np.ndarray, problem: Problem, grid: Grid
) -> LayerCodes:
    size = grid.scale_columns[4]
    scale = fit_scale4(grouped(weight, size), grouped(problem.diagonal[None], size))
    spread = grid.spread(scale, weight.shape[1], 4)
    bounds = grid.reachable(weight, scale)
    code = round_compensated(target, spread, 8, problem, bounds)
    for _ in range(_DESCENTS[4]):
        code = descend_codes(target, spread, code, 8, problem, bounds)
    return grid.with_residual(weight, scale, code)


def _compensate2(target: np.ndarray, problem: Problem, grid: Grid) -> LayerCodes:
    columns, h = target.shape[1], problem.diagonal[None]
    size = grid.scale_columns[2]
    scale = fit_scale2(grouped(target, size), grouped(h, size))
    code = round_compensated(target, grid.spread(scale, columns, 2), 2, problem)
    for _ in range(_DESCENTS[2]):
        scale = refit_scales(target, scale, code, size, problem)
        code = descend_codes(target, grid.spread(scale, columns, 2), code, 2, problem)
    size = grid.scale_columns[1]
    codes = grid.with_signs(scale, code, fit_scale1(grouped(target, size), grouped(h, size)))
    codes.scales[1] = _refit1(target, codes, problem, grid)
    return codes


def _refit1(target: np.ndarray, codes: LayerCodes, problem: Problem, grid: Grid) -> np.ndarray:
    """Scales of level 1 for the signs that level 2 has."""
    signs = codes.codes["s1"].astype(np.float32) - np.float32(0.5)
    scale = codes.scales[1]
    for _ in range(_LEVEL1_REFITS):
        scale = refit_scales(target, scale, signs, grid.scale_columns[1], problem)
    return scale


def _target(weight: np.ndarray, stats: MatrixStats, level: Level) -> np.ndarray:
    """The matrix whose output comes nearest to the float model's, judged on held-out samples."""
    seen = stats.levels[level]
    if not len(stats.held_out):
        return weight
    wanted = stats.held_out @ weight.T
    best, best_error = weight, np.inf
    for share in (None, *_RIDGES):
        found = weight
        if share is not None:
            ridge = Problem.damped(stats.blocks, seen.grams, share)
            found = absorb_drift(weight, seen.drift, ridge)
        missed = wanted - seen.held_out @ found.T
        error = float(np.square(missed, dtype=np.float64).sum())
        if error < best_error:
            best, best_error = found, error
    return best


def _most(methods: list[Method]) -> Method:
    return max(sorted(set(methods)), key=methods.count)
