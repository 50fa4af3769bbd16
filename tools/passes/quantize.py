"""Chooses codes, scales and biases of a layer.

Levels 8 and 4 share plane `p4`, levels 2 and 1 share `s1`: two families that have nothing to do
with each other. Of each family two candidates are made, nearest codes with searched scales and
error-compensated codes, and the one with the smaller error on held-out samples is kept.

Level 8 is a uniform grid around level 4's codes. With nearest codes the residual reaches half a
step of level 4; compensated codes may lie further off, and the residual still finds the weight.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from bapq_edge.bank.codes import LayerCodes, dequantize, join_rows
from bapq_edge.bank.layout import PLANES, SCALED_PLANES, Level, planes_for

from .ir import HeavyLayer, LevelStats, MatrixStats
from .rounding import (
    Problem,
    absorb_drift,
    descend_codes,
    refit_scales,
    round_compensated,
)
from .scales import divided, fit_scale1, fit_scale2, fit_scale4, grouped, nearest

SCALE_COLUMNS: dict[Level, int] = {4: 32, 2: 64, 1: 128}
"""Columns per scale. A bf16 scale then costs 0.5, 0.25 and 0.125 bits per weight: an eighth of the
level's own bits. On MiniLM the mean level-2 error is 0.312, 0.330, 0.345 at 32, 64, 128."""

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

_BLOCK_WEIGHTS = 1 << 17
"""Weights rounded to nearest at a time: the temporaries, about ten float32 arrays of this size,
then stay near a core's cache."""


_TASK_WEIGHTS = 1 << 25
"""Weights of one task at most."""


Fit = Callable[[np.ndarray, np.ndarray, int], LayerCodes]
"""(weight, h, residual steps) -> nearest codes with searched scales"""


@dataclass(frozen=True)
class LevelResult:
    """How one level of some rows came out."""

    row_error: np.ndarray
    """(rows,) float64: mean square of the error that the rounding adds to a row's output"""
    shift: np.ndarray
    """(rows,) float64: mean of the output that the bias must make up for"""
    method: str
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
    method: dict[Level, str]
    """of levels below 32: nearest or compensated"""
    output_error: dict[Level, float] = field(default_factory=dict)
    """square of the model's relative output error with this layer alone at the level; empty where
    it was not measured"""

    @property
    def relative_error(self) -> dict[Level, float]:
        """Norm of the output's error over norm of the output."""
        return {level: float(np.sqrt(rows.sum())) for level, rows in self.row_error.items()}

    def weight(self, level: Level) -> np.ndarray:
        """(rows, columns) float32 at a level."""
        return dequantize(self.codes, level, self.residual_steps, self.scale_columns)

    def bias(self, level: Level) -> np.ndarray | None:
        """(rows,) float32 at a level; None without one."""
        return self.codes.bias.get(level)


def residual_steps(levels: tuple[Level, ...], calibrated: bool) -> int:
    """Residual steps of a layer: a bank without level 4 has no use for compensated codes."""
    compensated = calibrated and 4 in levels
    return COMPENSATED_RESIDUAL_STEPS if compensated else NEAREST_RESIDUAL_STEPS


def quantize_family(
    weight: np.ndarray,
    stats: MatrixStats | None,
    family: tuple[Level, ...],
    levels: tuple[Level, ...],
) -> FamilyResult:
    """One family of levels of a matrix (rows, columns), or of some of its rows.

    A pure function: independent matrices, families and runs of rows may be worked on anywhere.
    Without stats all columns weigh the same and codes are the nearest.
    """
    weight = np.ascontiguousarray(weight, np.float32)
    steps = residual_steps(levels, stats is not None)
    fit = _fit_levels_8_and_4 if 4 in family else _fit_levels_2_and_1
    if stats is None:
        return _nearest_in_blocks(weight, fit, steps)
    lead: Level = 4 if 4 in family else 2
    seen = stats.levels.get(lead)
    if seen is None:  # the bank holds level 8 or 1 of this family only
        seen = next(iter(stats.levels.values()))
    problem = Problem.damped(stats.blocks, seen.grams, _DAMPING)
    candidates = [("nearest", fit(weight, problem.diagonal, steps), weight)]
    if lead in stats.levels:
        found = _compensated(weight, stats, seen, problem, lead, steps)
        if found is not None:
            candidates.append(("compensated", *found))

    def held_out_error(codes: LayerCodes) -> float:
        if not len(stats.held_out):
            return 0.0
        missed = stats.held_out @ weight.T
        missed -= seen.held_out @ dequantize(codes, lead, steps, SCALE_COLUMNS).T
        return float(np.square(missed, dtype=np.float64).sum())

    # Without held-out samples the last one, compensated, wins.
    method, codes, target = min(reversed(candidates), key=lambda c: held_out_error(c[1]))
    return FamilyResult(
        codes,
        {
            level: _result(weight, target, codes, level, steps, stats, seen, problem, method)
            for level in family
        },
        problem.row_errors(weight),
    )


def join_layer(
    layer: HeavyLayer,
    levels: tuple[Level, ...],
    parts: list[dict[tuple[Level, ...], FamilyResult]],
    calibrated: bool,
    row_weight: np.ndarray | None = None,
) -> QuantizedLayer:
    """The layer out of its runs of rows, in order, each with the families that were asked for.

    `row_weight`, (rows,), is how often each row of a gathered table is read.

    The bias of every level makes up for the shift of the mean; where the layer has none, one is
    added if that pays.
    """
    codes = LayerCodes(weight=layer.weight if 32 in levels else None)
    errors: dict[Level, np.ndarray] = {}
    shifts: dict[Level, np.ndarray] = {}
    methods: dict[Level, str] = {}
    norm = 0.0
    rows = len(layer.weight)
    often = 1.0 if row_weight is None else row_weight
    if 32 in levels:
        errors[32], shifts[32] = np.zeros(rows), np.zeros(rows)
    wanted = planes_for(levels)
    for family in FAMILIES if parts else ():
        if family not in parts[0]:
            continue
        results = [part[family] for part in parts]
        for plane in results[0].codes.codes:
            if plane in wanted:
                codes.codes[plane] = np.concatenate([r.codes.codes[plane] for r in results])
        for level in results[0].codes.scales:
            if any(SCALED_PLANES.get(plane) == level for plane in wanted):
                codes.scales[level] = np.concatenate([r.codes.scales[level] for r in results])
        for level in family:
            errors[level] = np.concatenate([r.levels[level].row_error for r in results]) * often
            shifts[level] = np.concatenate([r.levels[level].shift for r in results])
            methods[level] = _most([r.levels[level].method for r in results])
        norm = float((np.concatenate([r.row_norm for r in results]) * often).sum())
    completed = [PLANES[plane] for plane in wanted]
    pays = any(
        float(np.square(shifts[level]).sum()) > _BIAS_GAIN * errors[level].sum()
        for level in completed
    )
    gathered = any(use.operator == "Gather" for use in layer.uses)
    if layer.bias is not None or (calibrated and pays and not gathered):
        bias = np.zeros(rows, np.float32) if layer.bias is None else layer.bias
        for level in completed:
            codes.bias[level] = (bias + shifts[level]).astype(np.float32)
    return QuantizedLayer(
        codes,
        residual_steps(levels, calibrated),
        {level: SCALE_COLUMNS[level] for level in codes.scales},
        {level: errors[level] / norm if norm else 0 * errors[level] for level in levels},
        {level: methods[level] for level in levels if level in methods},
    )


def row_runs(rows: int, columns: int, groups: int = 1) -> list[slice]:
    """Runs of rows that one task works on, none across two groups of a grouped Conv.

    They do not depend on the number of workers, so neither does the bank.
    """
    group_rows = rows // groups
    step = max(16, _TASK_WEIGHTS // columns // 16 * 16)
    return [
        slice(begin, min(begin + step, (group + 1) * group_rows))
        for group in range(groups)
        for begin in range(group * group_rows, (group + 1) * group_rows, step)
    ]


def _nearest_in_blocks(weight: np.ndarray, fit: Fit, steps: int) -> FamilyResult:
    ones = np.ones(weight.shape[1], np.float32)
    step = max(1, _BLOCK_WEIGHTS // weight.shape[1])
    parts, errors = [], []
    for begin in range(0, len(weight), step):
        block = weight[begin : begin + step]
        part = fit(block, ones, steps)
        parts.append(part)
        family: tuple[Level, ...] = (8, 4) if "p4" in part.codes else (2, 1)
        errors.append(
            {
                level: np.square(
                    block - dequantize(part, level, steps, SCALE_COLUMNS), dtype=np.float64
                ).sum(1)
                for level in family
            }
        )
    return FamilyResult(
        join_rows(parts),
        {
            level: LevelResult(
                np.concatenate([e[level] for e in errors]), np.zeros(len(weight)), "nearest"
            )
            for level in errors[0]
        },
        np.square(weight, dtype=np.float64).sum(1),
    )


def _compensated(
    weight: np.ndarray,
    stats: MatrixStats,
    seen: LevelStats,
    problem: Problem,
    lead: Level,
    steps: int,
) -> tuple[LayerCodes, np.ndarray] | None:
    """Compensated codes of level 4 or 2 with what follows from them, and the matrix they aim at.

    None where the statistics are too ill-conditioned, or the weights too large, to compute with.
    """
    try:
        with np.errstate(over="ignore", invalid="ignore"):
            target = _target(weight, stats, seen)
            finite = np.isfinite(problem.row_errors(target)).all()
            return _compensate(weight, target, problem, lead, steps) if finite else None
    except np.linalg.LinAlgError:
        return None


def _compensate(
    weight: np.ndarray, target: np.ndarray, problem: Problem, lead: Level, steps: int
) -> tuple[LayerCodes, np.ndarray]:
    h = problem.diagonal
    part = LayerCodes()
    if lead == 4:
        size = SCALE_COLUMNS[4]
        scale = fit_scale4(grouped(weight, size), grouped(h[None], size))
        spread = np.repeat(scale, size, axis=1)[:, : weight.shape[1]]
        bounds = _reachable(weight, spread, steps)
        code = round_compensated(target, spread, 8, problem, bounds)
        for _ in range(_DESCENTS[4]):
            code = descend_codes(target, spread, code, 8, problem, bounds)
        part.scales[4] = scale
        part.codes["p4"] = (code + np.float32(7.5)).astype(np.uint8)
        part.codes["r8"] = _residual(weight, spread, code, steps)
        return part, target
    size = SCALE_COLUMNS[2]
    scale = fit_scale2(grouped(target, size), grouped(h[None], size))

    def spread_of(values: np.ndarray) -> np.ndarray:
        return np.repeat(values, size, axis=1)[:, : weight.shape[1]]

    code = round_compensated(target, spread_of(scale), 2, problem)
    for _ in range(_DESCENTS[2]):
        scale = refit_scales(target, scale, code, size, problem)
        code = descend_codes(target, spread_of(scale), code, 2, problem)
    part.scales[2] = scale
    planes = (code + np.float32(1.5)).astype(np.uint8)
    part.codes["s1"], part.codes["m1"] = planes >> 1, planes & 1
    size = SCALE_COLUMNS[1]
    signs = part.codes["s1"].astype(np.float32) - np.float32(0.5)
    scale = fit_scale1(grouped(target, size), grouped(h[None], size))
    for _ in range(_LEVEL1_REFITS):
        scale = refit_scales(target, scale, signs, size, problem)
    part.scales[1] = scale
    return part, target


def _target(weight: np.ndarray, stats: MatrixStats, seen: LevelStats) -> np.ndarray:
    """The matrix whose output comes nearest to the float model's, judged on held-out samples."""
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


def _reachable(weight: np.ndarray, spread: np.ndarray, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Lowest and highest level-4 codes from which the residual finds the weight."""
    x = weight * np.divide(1, spread, out=np.zeros_like(spread), where=spread > 0)
    reach = np.float32(8 / steps)
    close = nearest(x, 8)
    lowest = np.minimum(np.ceil(x - reach - np.float32(0.5)) + np.float32(0.5), close)
    highest = np.maximum(np.floor(x + reach - np.float32(0.5)) + np.float32(0.5), close)
    return lowest.clip(-7.5, 7.5), highest.clip(-7.5, 7.5)


def _residual(weight: np.ndarray, spread: np.ndarray, code: np.ndarray, steps: int) -> np.ndarray:
    """Plane r8, (rows, columns): the nearest residual; code in units of level 4."""
    x = weight * np.divide(1, spread, out=np.zeros_like(spread), where=spread > 0)
    residual = np.floor((x - code) * np.float32(steps))
    return (np.clip(residual, -8, 7) + np.float32(8)).astype(np.uint8)


def _fit_levels_8_and_4(w: np.ndarray, h: np.ndarray, steps: int) -> LayerCodes:
    part = LayerCodes()
    size = SCALE_COLUMNS[4]
    groups = grouped(w, size)
    part.scales[4] = fit_scale4(groups, grouped(h[None], size))
    code = nearest(divided(groups, part.scales[4]), 8).reshape(len(w), -1)[:, : w.shape[1]]
    spread = np.repeat(part.scales[4], size, axis=1)[:, : w.shape[1]]
    part.codes["p4"] = (code + np.float32(7.5)).astype(np.uint8)
    part.codes["r8"] = _residual(w, spread, code, steps)
    return part


def _fit_levels_2_and_1(w: np.ndarray, h: np.ndarray, steps: int) -> LayerCodes:
    part = LayerCodes()
    size = SCALE_COLUMNS[2]
    groups = grouped(w, size)
    part.scales[2] = fit_scale2(groups, grouped(h[None], size))
    code = nearest(divided(groups, part.scales[2]), 2).reshape(len(w), -1)[:, : w.shape[1]]
    planes = (code + np.float32(1.5)).astype(np.uint8)
    part.codes["s1"], part.codes["m1"] = planes >> 1, planes & 1
    size = SCALE_COLUMNS[1]
    part.scales[1] = fit_scale1(grouped(w, size), grouped(h[None], size))
    return part


def _result(
    weight: np.ndarray,
    target: np.ndarray,
    codes: LayerCodes,
    level: Level,
    steps: int,
    stats: MatrixStats,
    seen: LevelStats,
    problem: Problem,
    method: str,
) -> LevelResult:
    found = dequantize(codes, level, steps, SCALE_COLUMNS)
    if level == 8:  # holds the weight itself, and meets what the float model would
        shift = ((weight - found) * stats.mean).sum(1, dtype=np.float64)
        return LevelResult(problem.row_errors(weight - found), shift, "nearest")
    shift = weight.astype(np.float64) @ stats.mean - found.astype(np.float64) @ seen.mean
    return LevelResult(problem.row_errors(target - found), shift, method)


def _most(methods: list[str]) -> str:
    return max(sorted(set(methods)), key=methods.count)
