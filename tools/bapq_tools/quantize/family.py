"""Chooses the codes and scales of a family of levels.

Levels 8 and 4 share plane `p4`, levels 2 and 1 share `s1`: two families that have nothing to do
with each other. Of each family two candidates are made, nearest codes with searched scales and
error-compensated codes, and the one with the smaller error on held-out samples is kept.

Level 8 is a uniform grid around level 4's codes. With nearest codes the residual reaches half a
step of level 4. Compensated codes may lie further off, and the residual still finds the weight.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bapq_edge.bank.codes import LayerCodes, join_rows
from bapq_edge.bank.layer import Method
from bapq_edge.bank.layout import Level

from ..calibration.matrix_stats import MatrixStats
from .compensated import DAMPING, CandidateCodes, compensated_codes
from .grid import Grid, residual_steps
from .options import LayerOptions, scale_columns_of
from .rounding import RoundingProblem
from .row_runs import row_runs

FAMILIES: tuple[tuple[Level, ...], ...] = ((8, 4), (2, 1))
"""Levels whose planes depend on each other."""

_TINY = np.float32(2.0**-125)
"""It stands for zero: too small for any scale, and normal."""

_BLOCK_WEIGHTS = 1 << 17
"""Weights rounded to nearest at a time: the temporaries, about ten float32 arrays of this size,
then stay near a core's cache."""


@dataclass(frozen=True)
class LevelResult:
    """The result for one level of some rows."""

    row_error: np.ndarray
    """Mean square of the error that the rounding adds to each row's output, (rows,) float64."""
    shift: np.ndarray
    """Mean of the output that the bias must make up for, (rows,) float64."""
    method: Method
    """How the codes were chosen."""


@dataclass
class FamilyResult:
    """Codes and scales of one family of levels, for some rows."""

    codes: LayerCodes
    levels: dict[Level, LevelResult]
    row_norm: np.ndarray
    """Mean square of each row's output, (rows,) float64, by the same measure as `row_error`."""


def families_of(options: LayerOptions) -> list[tuple[Level, ...]]:
    """The families with a level that is wanted."""
    return [family for family in FAMILIES if any(level in options.levels for level in family)]


def quantize_family(
    weight: np.ndarray,
    stats: MatrixStats | None,
    family: tuple[Level, ...],
    options: LayerOptions,
) -> FamilyResult:
    """Quantize a matrix (rows, columns), or some of its rows, at one family of levels.

    This is a pure function: independent matrices, families and runs of rows may be worked on
    anywhere. Without stats all columns weigh the same and codes are the nearest.
    """
    # The sign of a zero decides its code: no grid has a zero.
    signs, weight = weight, np.abs(weight, dtype=np.float32)
    np.maximum(weight, _TINY, out=weight)
    np.copysign(weight, signs, out=weight)
    lead: Level = 4 if 4 in family else 2
    correlated = stats is not None and stats.correlated
    grid = Grid(lead, residual_steps(options.levels, correlated), scale_columns_of(options))
    if stats is None:
        return _nearest_in_blocks(weight, grid, family)
    # A bank with level 8 or 1 of this family only has no forward pass at the lead.
    seen = stats.levels.get(lead) or next(iter(stats.levels.values()))
    problem = RoundingProblem.damped(stats.blocks, seen.grams, DAMPING)
    runs = row_runs(*weight.shape)
    # Without held-out samples the last one, compensated, wins.
    candidates = [
        CandidateCodes("nearest", [grid.nearest(weight[run], problem.diagonal) for run in runs], {})
    ]
    if correlated and lead in stats.levels and lead in options.levels:
        compensated = compensated_codes(weight, stats, problem, grid)
        candidates += [] if compensated is None else [compensated]

    def held_out_error(candidate: CandidateCodes) -> float:
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


def _nearest_in_blocks(weight: np.ndarray, grid: Grid, family: tuple[Level, ...]) -> FamilyResult:
    """Take the nearest codes; nothing is known of the inputs."""
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
