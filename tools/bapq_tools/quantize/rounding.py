"""Error-compensated rounding of a matrix on a given grid.

All functions minimize `sum over rows of (w - q) H (w - q)ᵀ`, the square of the output's error,
where H is the mean of x xᵀ, block by block of the columns. Codes are mid-rise: -half+0.5 to
half-0.5 in steps of 1. Rows are independent of each other.

Methods: Frantar et al., "GPTQ", 2022, for the order of rounding and the update of what is not yet
rounded; cyclic coordinate descent, as in Behdin et al., "QuantEase", 2023, on codes and scales
after it. The target that absorbs drift is the linear least-squares estimate of the float model's
output from the input that the layer really gets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.linalg import cho_solve, cholesky
from scipy.linalg.lapack import dpotrf, dtrtri

from bapq_edge.bank.codes import from_bf16, to_bf16

SMALLEST_SCALE = np.float32(2.0**-120)
"""Smaller scales become 0: the scale of level 8, a sixteenth of it, must be a normal float32."""

_STEP_COLUMNS = 128
"""Columns rounded between two updates of all columns behind them: the rest stays in cache."""


@dataclass(frozen=True)
class RoundingProblem:
    """H of a matrix with some of its mean diagonal added, in blocks of columns."""

    blocks: Sequence[slice]
    grams: Sequence[np.ndarray]
    """One per block, (c, c) float32, positive definite; or its diagonal, (c,), if all else is 0."""

    @classmethod
    def damped(
        cls, blocks: Sequence[slice], grams: Sequence[np.ndarray], share: float
    ) -> RoundingProblem:
        """Add `share` of the mean diagonal of all blocks to each diagonal."""
        diagonal = np.concatenate([_diagonal(gram) for gram in grams])
        added = np.float32(share * max(float(diagonal.mean(dtype=np.float64)), 1e-30))
        damped = [np.array(gram) for gram in grams]
        for gram in damped:
            gram.flat[:: len(gram) + 1 if gram.ndim == 2 else 1] += added
        return cls(blocks, damped)

    @cached_property
    def factors(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Per block, the order of rounding and a factor of H⁻¹ in that order.

        The order is (c,), the most active column first. The factor is U, (c, c) float32, upper,
        with Uᵀ U = H⁻¹.

        Raises numpy.linalg.LinAlgError where H is not positive definite in float64.
        """
        orders = [np.argsort(-np.diagonal(gram), kind="stable") for gram in self.grams]
        pairs = zip(orders, self.grams, strict=True)
        return [(order, _inverse_factor(gram, order)) for order, gram in pairs]

    @property
    def diagonal(self) -> np.ndarray:
        """The diagonal of H, (columns,)."""
        return np.concatenate([_diagonal(gram) for gram in self.grams])

    def times(self, rows: np.ndarray) -> np.ndarray:
        """The product rows @ H, (rows, columns)."""
        pairs = zip(self.blocks, self.grams, strict=True)
        products = [
            rows[:, block] @ gram if gram.ndim == 2 else rows[:, block] * gram
            for block, gram in pairs
        ]
        return np.concatenate(products, axis=1)

    def row_errors(self, difference: np.ndarray) -> np.ndarray:
        """The error d H dᵀ of each row d, (rows,) float64."""
        peak = max(float(np.abs(difference).max(initial=0)), 2.0**-100)
        unit = difference / np.float32(peak)  # squares of any float32 would overflow
        result: np.ndarray = (unit * self.times(unit)).sum(1, dtype=np.float64) * peak**2
        return result


def _diagonal(gram: np.ndarray) -> np.ndarray:
    return np.diagonal(gram) if gram.ndim == 2 else gram


def absorb_drift(weight: np.ndarray, drift: np.ndarray, problem: RoundingProblem) -> np.ndarray:
    """Return weight + drift H⁻¹, which makes the most of the drifted input; H is used up."""
    result = weight.copy()
    for block, gram in zip(problem.blocks, problem.grams, strict=True):
        # LAPACK works on columns; H is its own transpose.
        lower = cholesky(gram.T, lower=True, overwrite_a=True)
        result[:, block] += cho_solve((lower, True), drift[:, block].T).T
    return result


def round_compensated(
    target: np.ndarray,
    scale: np.ndarray,
    half: int,
    problem: RoundingProblem,
    bounds: tuple[np.ndarray, np.ndarray] | None = None,
) -> np.ndarray:
    """Round column by column, the most active first; later columns make up for earlier errors.

    target and scale: (rows, columns), scales positive or 0 where the group is; bounds: lowest and
    highest code allowed per weight. Returns codes (rows, columns) float32.

    Raises numpy.linalg.LinAlgError where H is not positive definite in float64.
    """
    codes = np.empty_like(target)
    for block, (order, upper) in zip(problem.blocks, problem.factors, strict=True):
        columns = np.arange(block.start, block.stop)[order]
        codes[:, columns] = _round_block(
            target[:, columns].T.copy(),
            _ColumnGrids.of(scale, half, bounds, columns),
            upper,
        ).T
    return codes


def descend_codes(
    target: np.ndarray,
    scale: np.ndarray,
    codes: np.ndarray,
    half: int,
    problem: RoundingProblem,
    bounds: tuple[np.ndarray, np.ndarray] | None = None,
) -> np.ndarray:
    """Do one round of coordinate descent: each code becomes the best one given all others."""
    gradient = problem.times(target - codes * scale)
    result = np.empty_like(codes)
    for block, gram in zip(problem.blocks, problem.grams, strict=True):
        order = np.argsort(-np.diagonal(gram), kind="stable")
        columns = np.arange(block.start, block.stop)[order]
        result[:, columns] = _descend_block(
            codes[:, columns].T.copy(),
            gradient[:, columns].T.copy(),
            _ColumnGrids.of(scale, half, bounds, columns),
            gram[np.ix_(order, order)],
        ).T
    return result


def refit_scales(
    target: np.ndarray, scale: np.ndarray, codes: np.ndarray, group: int, problem: RoundingProblem
) -> np.ndarray:
    """Do one round over the scales: each becomes the best one given the codes and other scales.

    scale: (rows, groups); returns bf16 values as float32, never negative. A scale of 0 stays,
    as does that of a group which two blocks cut.
    """
    result = scale.copy()
    for block, gram in zip(problem.blocks, problem.grams, strict=True):
        spread = np.repeat(result, group, axis=1)[:, block]
        gradient = (target[:, block] - codes[:, block] * spread) @ gram
        columns = target.shape[1]
        for index in range(-(-block.start // group), result.shape[1]):
            begin, end = index * group, min((index + 1) * group, columns)
            if end > block.stop:
                break
            part = slice(begin - block.start, end - block.start)
            code = codes[:, block][:, part]
            slope = (code * gradient[:, part]).sum(1)
            curvature = ((code @ gram[part, part]) * code).sum(1)
            step = np.divide(slope, curvature, out=np.zeros_like(slope), where=curvature > 0)
            wanted = np.where(result[:, index] > 0, result[:, index] + step, 0)
            found = from_bf16(to_bf16(np.where(wanted < SMALLEST_SCALE, 0, wanted)))
            gradient -= ((found - result[:, index])[:, None] * code) @ gram[part]
            result[:, index] = found
    return result


@dataclass(frozen=True)
class _ColumnGrids:
    """The grids of some columns, one row per column."""

    scale: np.ndarray
    inverse: np.ndarray
    lowest: np.ndarray
    highest: np.ndarray

    @classmethod
    def of(
        cls,
        scale: np.ndarray,
        half: int,
        bounds: tuple[np.ndarray, np.ndarray] | None,
        columns: np.ndarray,
    ) -> _ColumnGrids:
        scale = scale[:, columns].T.copy()
        inverse = np.divide(1, scale, out=np.zeros_like(scale), where=scale > 0)
        if bounds is None:
            end = np.full((len(scale), 1), half - 0.5, np.float32)
            return cls(scale, inverse, -end, end)
        return cls(scale, inverse, bounds[0][:, columns].T.copy(), bounds[1][:, columns].T.copy())

    def nearest(self, x: np.ndarray, column: int) -> np.ndarray:
        """The nearest allowed codes of one column; x, in units of the scale, is overwritten."""
        np.floor(x, out=x)
        x += np.float32(0.5)
        np.maximum(x, self.lowest[column], out=x)
        result: np.ndarray = np.minimum(x, self.highest[column], out=x)
        return result


def _inverse_factor(gram: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Compute U of `RoundingProblem.factors`, from the factor of H in reversed order."""
    turned = order[::-1]
    square = gram[np.ix_(turned, turned)].astype(np.float64)
    # LAPACK works on columns; H is its own transpose.
    lower, failed = dpotrf(square.T, lower=1, overwrite_a=1)
    if not failed:
        lower, failed = dtrtri(lower, lower=1, overwrite_c=1)
    if failed:
        raise np.linalg.LinAlgError(f"column {failed} of {len(gram)} depends on others")
    return np.ascontiguousarray(lower[::-1, ::-1], np.float32)


def _round_block(rest: np.ndarray, grid: _ColumnGrids, upper: np.ndarray) -> np.ndarray:
    """Round `rest`, (columns, rows), which is overwritten; returns the codes, (columns, rows)."""
    codes = np.empty_like(rest)
    count = len(rest)
    for begin in range(0, count, _STEP_COLUMNS):
        end = min(begin + _STEP_COLUMNS, count)
        errors = np.empty((end - begin, rest.shape[1]), np.float32)
        for column in range(begin, end):
            code = grid.nearest(rest[column] * grid.inverse[column], column)
            codes[column] = code
            error = errors[column - begin]
            np.multiply(code, -grid.scale[column], out=error)
            error += rest[column]
            error *= 1 / upper[column, column]
            rest[column + 1 : end] -= upper[column, column + 1 : end, None] * error
        rest[end:] -= upper[begin:end, end:].T @ errors
    return codes


def _descend_block(
    codes: np.ndarray, gradient: np.ndarray, grid: _ColumnGrids, gram: np.ndarray
) -> np.ndarray:
    """Return new codes; `codes` and `gradient`, (columns, rows), are overwritten."""
    count = len(codes)
    for begin in range(0, count, _STEP_COLUMNS):
        end = min(begin + _STEP_COLUMNS, count)
        changes = np.empty((end - begin, codes.shape[1]), np.float32)
        for column in range(begin, end):
            wanted = gradient[column] * grid.inverse[column]
            wanted *= 1 / gram[column, column]
            wanted += codes[column]
            code = grid.nearest(wanted, column)
            change = changes[column - begin]
            np.subtract(code, codes[column], out=change)
            change *= grid.scale[column]
            codes[column] = code
            gradient[column + 1 : end] -= gram[column, column + 1 : end, None] * change
        gradient[end:] -= gram[begin:end, end:].T @ changes
    return codes
