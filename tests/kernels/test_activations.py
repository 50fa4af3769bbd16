"""Activation quantizer and block sums: every family's bits against NumPy."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from support import kernel_reference as reference
from support.kernel_library import Family

RNG_ROWS = {
    "normal": lambda rng, n: rng.normal(0, 1, n),
    "wide": lambda rng, n: rng.normal(0, 1, n) * 2.0 ** rng.integers(-100, 100, n),
    "ties": lambda rng, n: np.append(rng.integers(-254, 255, n - 1) / 2, 127),
    "huge": lambda rng, n: rng.choice([-1, 1], n) * np.float64(np.finfo(np.float32).max),
    "around the lift": lambda rng, n: rng.normal(0, 1, n) * 2.0**-100,
    "tiny": lambda rng, n: rng.normal(0, 1, n) * 2.0**-125,
    "subnormal": lambda rng, n: rng.normal(0, 1, n) * 2.0**-135,
    "smallest": lambda rng, n: rng.integers(-1, 2, n) * 2.0**-149,
    "zero": lambda rng, n: np.zeros(n) * rng.choice([-1, 1], n),
}


def check(families: list[Family], x: NDArray[np.float32]) -> None:
    want = reference.quantize_row(x)
    for family in families:
        for got_part, want_part in zip(family.quantize_row(x), want, strict=True):
            np.testing.assert_array_equal(got_part, want_part, err_msg=family.name, strict=True)


@pytest.mark.parametrize("kind", RNG_ROWS)
def test_rows(families: list[Family], kind: str) -> None:
    rng = np.random.default_rng(len(kind))
    for n in (1, 5, 31, 32, 33, 63, 64, 96, 100, 1000):
        check(families, RNG_ROWS[kind](rng, n).astype(np.float32))


def test_every_bit_pattern_of_floats(families: list[Family]) -> None:
    """Blocks of one magnitude each, over the whole range of exponents."""
    rng = np.random.default_rng(0)
    exponents = np.arange(255, dtype=np.uint32).repeat(reference.BLOCK)
    mantissas = rng.integers(0, 1 << 23, exponents.size).astype(np.uint32)
    signs = rng.integers(0, 2, exponents.size).astype(np.uint32)
    check(families, (signs << 31 | exponents << 23 | mantissas).view(np.float32))


@pytest.mark.parametrize("poison", (np.nan, -np.nan, np.inf, -np.inf))
def test_poison_stays_in_its_block(families: list[Family], poison: float) -> None:
    rng = np.random.default_rng(0)
    for at in (0, 13, 31):
        x = rng.normal(0, 1, 80).astype(np.float32)
        x[32 + at] = poison
        check(families, x)
        for family in families:
            q, scale, total = family.quantize_row(x)
            assert np.isnan(scale).tolist() == [False, True, False]
            assert not q[32:64].any()
            assert total[1] == 0
            assert (q[80:] == 0).all()


def test_quantized_values_restore_the_row(families: list[Family]) -> None:
    """Within half a step, as a user of the quantizer expects."""
    x = np.random.default_rng(0).normal(0, 3, 4096).astype(np.float32)
    for family in families:
        q, scale, _ = family.quantize_row(x)
        restored = q.reshape(-1, reference.BLOCK) * scale[:, None].astype(np.float64)
        error = np.abs(restored - x.reshape(-1, reference.BLOCK))
        assert (error <= scale[:, None] * 0.5001).all()


def test_block_sums(families: list[Family]) -> None:
    rng = np.random.default_rng(0)
    for rows, blocks in ((1, 1), (3, 5), (17, 9), (64, 32)):
        q = rng.integers(-128, 128, (rows, blocks * reference.BLOCK)).astype(np.int8)
        q[0] = -128
        q[-1, : reference.BLOCK] = 127
        want = q.reshape(rows, blocks, -1).sum(axis=2, dtype=np.int64).astype(np.float32)
        for family in families:
            np.testing.assert_array_equal(family.block_sums(q), want, err_msg=family.name)
