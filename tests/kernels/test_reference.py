"""The reference's fused multiply-add, against exact fractions."""

from __future__ import annotations

from fractions import Fraction

import numpy as np

from support.kernel_reference import fma


def nearest_float32(value: Fraction) -> np.float32:
    """Round exactly, ties to even, by trying the neighbours of a first guess."""
    guess = np.float32(float(value))
    neighbours = (
        np.nextafter(guess, np.float32(-np.inf)),
        guess,
        np.nextafter(guess, np.float32(np.inf)),
    )
    return min(
        neighbours,
        key=lambda f: (abs(Fraction(float(f)) - value), int(np.float32(f).view(np.uint32)) & 1),
    )


def test_fma_rounds_once() -> None:
    rng = np.random.default_rng(0)
    a, b = (rng.normal(0, 1, 2000).astype(np.float32) for _ in range(2))
    c = (rng.normal(0, 1, 2000) * 2.0 ** rng.integers(-60, 40, 2000)).astype(np.float32)
    # Ties of float32 that only a term below float64's last bit breaks.
    a[0], b[0], c[0] = 2.0**-24, 1, 1
    a[1], b[1], c[1] = 2.0**-24 * (1 + 2.0**-23), 1 - 2.0**-24, 1
    a[2], b[2], c[2] = -(2.0**-30), 2.0**-30, 1 + 2.0**-23
    for i, got in enumerate(fma(a, b, c)):
        exact = Fraction(float(a[i])) * Fraction(float(b[i])) + Fraction(float(c[i]))
        assert got == nearest_float32(exact), i


def test_fma_near_zero_and_infinity() -> None:
    a = np.array([2.0**-80, 3 * 2.0**-75, 2.0**100, np.nan, 0], np.float32)
    b = np.array([2.0**-70, 2.0**-75, 2.0**100, 1, -1], np.float32)
    c = np.array([0, 2.0**-149, 1, 1, 0], np.float32)
    with np.errstate(over="ignore"):
        got = fma(a, b, c)
    want = np.array([0, 2.0**-148, np.inf, np.nan, 0], np.float32)
    np.testing.assert_array_equal(got, want)
