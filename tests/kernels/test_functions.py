"""Activation functions: every family's bits alike, and near the functions in real numbers."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from support.kernel_library import Family

HARD_SWISH, SILU, GELU, GELU_TANH = 1, 2, 3, 4

_SQRT_HALF, _SLOPE = math.sqrt(0.5), 2 * math.sqrt(2 / math.pi)


def _normal_tail(t: float) -> float:
    """The normal distribution at -t, which loses no digits where it is small."""
    return math.erfc(t * _SQRT_HALF) / 2


def _sigmoid(w: float) -> float:
    return 1 / (1 + math.exp(-w)) if w > -700 else 0.0


TRUTH: dict[int, Callable[[float], float]] = {
    HARD_SWISH: lambda x: x * min(max(x / 6 + 0.5, 0.0), 1.0),
    SILU: lambda x: x * _sigmoid(x),
    GELU: lambda x: x * _normal_tail(-x),
    GELU_TANH: lambda x: x * _sigmoid(_SLOPE * (x + 0.044715 * x**3)),
}
ULPS = {SILU: 3, GELU: 6}
"""Largest error, in units of the result's last place, down to x = -12."""
ABSOLUTE = {HARD_SWISH: 2.0**-21, SILU: 2.0**-19, GELU: 2.0**-21, GELU_TANH: 2.0**-20}
"""Largest error anywhere in -16..16."""

SPECIAL = [0.0, -0.0, 1e-40, -1e-40, 1e30, -1e30, np.inf, -np.inf, np.nan, 3.0, -3.0, 88.0, -88.0]


def inputs() -> NDArray[np.float32]:
    """(m, 16): all of -16..16, dense around zero."""
    rng = np.random.default_rng(0)
    parts = [np.linspace(-16, 16, 8000), rng.normal(0, 2, 4000), rng.normal(0, 0.01, 2000)]
    values = np.concatenate(parts).astype(np.float32)
    return values[: len(values) // 16 * 16].reshape(-1, 16)


@pytest.mark.parametrize("function", TRUTH)
def test_error(families: list[Family], function: int) -> None:
    x = inputs()
    truth = np.vectorize(TRUTH[function])(x.astype(np.float64))
    result = families[0].apply(function, None, x)
    error = np.abs(result - truth)
    assert error.max() <= ABSOLUTE[function]
    if function in ULPS:
        ulps = error / np.spacing(np.abs(truth).astype(np.float32))
        assert ulps[x > -12].max() <= ULPS[function]


@pytest.mark.parametrize("function", TRUTH)
def test_families_agree(families: list[Family], function: int) -> None:
    rng = np.random.default_rng(function)
    special = np.resize(np.array(SPECIAL, np.float32), (2, 16))
    for x in (inputs(), special, rng.normal(0, 3, (1, 16)).astype(np.float32)):
        for bias in (None, rng.normal(0, 1, 16).astype(np.float32)):
            results = [family.apply(function, bias, x) for family in families]
            for family, result in zip(families, results, strict=True):
                np.testing.assert_array_equal(result, results[-1], err_msg=family.name)
            if bias is not None:
                shifted = families[0].apply(function, None, x + bias)
                np.testing.assert_array_equal(results[0], shifted)


@pytest.mark.parametrize("function", TRUTH)
def test_far_from_zero(families: list[Family], function: int) -> None:
    """x itself, and as good as nothing; NaN stays."""
    x = np.zeros((1, 16), np.float32)
    x[0, :6] = [1e30, np.inf, -1e30, -100, np.nan, 0]
    up, infinite, *down, nan, zero = families[0].apply(function, None, x)[0, :6]
    assert (up, infinite, zero) == (np.float32(1e30), np.inf, 0)
    assert np.abs(down).max() < 1e-35
    assert np.isnan(nan)
