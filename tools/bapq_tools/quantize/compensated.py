"""Error-compensated codes of one family of levels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bapq_edge.bank.codes import LayerCodes
from bapq_edge.bank.layer import Method
from bapq_edge.bank.layout import Level

from ..calibration.matrix_stats import MatrixStats
from .grid import Grid
from .rounding import (
    RoundingProblem,
    absorb_drift,
    descend_codes,
    refit_scales,
    round_compensated,
)
from .row_runs import row_runs
from .scales import fit_scale1, fit_scale2, fit_scale4, grouped

DAMPING = 0.05
"""Share of the mean diagonal added to H: calibration has not seen all directions."""

_RIDGES = (0.03, 0.3)
"""Shares added to H where drift is absorbed. The best on held-out samples is taken, or none."""

_DESCENTS: dict[Level, int] = {4: 1, 2: 2}
"""Rounds of coordinate descent after compensated rounding."""

_LEVEL1_REFITS = 2
"""Rounds over the scales of level 1, whose signs are given."""

_LARGEST_WEIGHT = 1e15
"""Larger ones are rounded to nearest: squares of them leave float32's range."""


@dataclass(frozen=True)
class CandidateCodes:
    """One way to choose the codes of a family."""

    method: Method
    codes: list[LayerCodes]
    """One entry per run of rows."""
    targets: dict[Level, np.ndarray]
    """The matrix that a level's codes aim at, (rows, columns), where it is not the weight."""


def compensated_codes(
    weight: np.ndarray, stats: MatrixStats, problem: RoundingProblem, grid: Grid
) -> CandidateCodes | None:
    """Choose compensated codes of one family.

    None where the statistics are too ill-conditioned, or the weights too large, to compute with.
    """
    if float(np.abs(weight).max()) > _LARGEST_WEIGHT:
        return None
    runs = row_runs(*weight.shape)
    try:
        targets = {grid.lead: _target(weight, stats, grid.lead)}
        lead = targets[grid.lead]
        if grid.lead == 4:
            codes = [_compensate4(weight[run], lead[run], problem, grid) for run in runs]
        else:
            codes = [_compensate2(lead[run], problem, grid) for run in runs]
        if grid.lead == 2 and 1 in stats.levels:
            targets[1] = _target(weight, stats, 1)
            own = RoundingProblem.damped(stats.blocks, stats.levels[1].grams, DAMPING)
            for run, found in zip(runs, codes, strict=True):
                found.scales[1] = _refit1(targets[1][run], found, own, grid)
        return CandidateCodes("compensated", codes, targets)
    except np.linalg.LinAlgError:
        return None


def _compensate4(
    weight: np.ndarray, target: np.ndarray, problem: RoundingProblem, grid: Grid
) -> LayerCodes:
    size = grid.scale_columns[4]
    scale = fit_scale4(grouped(weight, size), grouped(problem.diagonal[None], size))
    spread = grid.spread(scale, weight.shape[1], 4)
    bounds = grid.reachable(weight, scale)
    code = round_compensated(target, spread, 8, problem, bounds)
    for _ in range(_DESCENTS[4]):
        code = descend_codes(target, spread, code, 8, problem, bounds)
    return grid.with_residual(weight, scale, code)


def _compensate2(target: np.ndarray, problem: RoundingProblem, grid: Grid) -> LayerCodes:
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


def _refit1(
    target: np.ndarray, codes: LayerCodes, problem: RoundingProblem, grid: Grid
) -> np.ndarray:
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
            ridge = RoundingProblem.damped(stats.blocks, seen.grams, share)
            found = absorb_drift(weight, seen.drift, ridge)
        missed = wanted - seen.held_out @ found.T
        error = float(np.square(missed, dtype=np.float64).sum())
        if error < best_error:
            best, best_error = found, error
    return best
