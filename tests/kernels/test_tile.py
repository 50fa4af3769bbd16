"""Tile products: every level of every family this CPU runs, against the NumPy bit model."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from support.kernel_library import Family
from support.kernel_reference import BLOCK, TILE_ROWS, Panel, Tile, bf16

LEVELS = (32, 8, 4, 2, 1)
PLANE_TOPS = {32: (), 8: (15, 15), 4: (15,), 2: (1, 1), 1: (1,)}
"""Highest code of each plane that a level reads."""


def make_tile(
    rng: np.random.Generator,
    level: int,
    blocks: int,
    *,
    scale_blocks: int = 1,
    residual_steps: int = 16,
    codes: str = "random",
    padding: int = 0,
) -> Tile:
    """Build a tile; codes: random, all low, all high, or half of each."""
    shape = (TILE_ROWS, blocks * BLOCK)
    planes = []
    for top in PLANE_TOPS[level]:
        plane = rng.integers(0, top + 1, shape)
        if codes != "random":
            plane = {"low": 0 * plane, "high": 0 * plane + top, "split": top * (plane > top // 2)}[
                codes
            ]
        plane[:, shape[1] - padding :] = 0
        planes.append(plane.astype(np.uint8))
    groups = -(-blocks // scale_blocks)
    return Tile(
        level,
        tuple(planes),
        bf16(rng.lognormal(-4, 1, (groups, TILE_ROWS))),
        scale_blocks,
        residual_steps,
        rng.normal(0, 0.1, shape).astype(np.float32),
        padding,
    )


def make_panel(
    rng: np.random.Generator,
    m: int,
    blocks: int,
    q: Any = None,
    zero_point: int | None = None,
    padding: int = 0,
) -> Panel:
    """Build m rows; q: random over all that is allowed, or what is given for every column.

    With a zero point, one scale is that of all rows and blocks.
    """
    shape = (m, blocks * BLOCK)
    values = rng.integers(-127, 128, shape) if q is None else np.broadcast_to(q, shape)
    values = values.astype(np.int8)
    values[:, shape[1] - padding :] = 0
    return Panel(
        values,
        rng.lognormal(-4, 2, (m, blocks) if zero_point is None else (1, 1)).astype(np.float32),
        values.reshape(m, blocks, BLOCK).sum(axis=2, dtype=np.int64).astype(np.float32),
        rng.normal(0, 1, shape).astype(np.float32),
        zero_point or 0,
    )


def check(families: list[Family], tile: Tile, panel: Panel) -> None:
    """Every family gives the model's bits, and the model lies within its bound."""
    want = tile.product(panel)
    real, bound = tile.real_product(panel)
    assert (np.abs(want - real) <= bound).all()
    for family in families:
        got = family.tile(tile, panel)
        different = np.flatnonzero(got.view(np.uint32) != want.view(np.uint32))
        assert different.size == 0, (
            f"{family.name}: {different.size} of {want.size} outputs differ, first "
            f"{got.flat[different[0]]!r}, expected {want.flat[different[0]]!r}"
        )


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("m", range(1, 18))
def test_every_row_count(families: list[Family], level: int, m: int) -> None:
    rng = np.random.default_rng((level, m))
    for blocks in range(1, 6):
        check(families, make_tile(rng, level, blocks), make_panel(rng, m, blocks))


@pytest.mark.parametrize("level", (8, 4, 2, 1))
@pytest.mark.parametrize("m", range(1, 18))
def test_every_row_count_of_a_uniform_panel(families: list[Family], level: int, m: int) -> None:
    rng = np.random.default_rng((level, m))
    for blocks in range(1, 6):
        padding = int(rng.integers(0, 32)) * (m % 2)
        tile = make_tile(rng, level, blocks, residual_steps=15 + m % 2, padding=padding)
        zero_point = -127 * (m % 3 > 0)
        check(families, tile, make_panel(rng, m, blocks, None, zero_point, padding))


@pytest.mark.parametrize("level", (8, 4, 2, 1))
@pytest.mark.parametrize("scale_blocks", (1, 2, 3, 5, 8, 9, 20, 100))
def test_runs_of_a_uniform_panel(families: list[Family], level: int, scale_blocks: int) -> None:
    rng = np.random.default_rng((level, scale_blocks))
    for blocks in (1, 4, 7, 8, 11, 40):
        tile = make_tile(rng, level, blocks, scale_blocks=scale_blocks, residual_steps=12)
        check(families, tile, make_panel(rng, 7, blocks, zero_point=int(rng.integers(-127, 128))))


@pytest.mark.parametrize("level", (8, 4, 2, 1))
@pytest.mark.parametrize("codes", ("low", "high"))
@pytest.mark.parametrize("q", (-127, 127))
def test_no_run_overflows(families: list[Family], level: int, codes: str, q: int) -> None:
    rng = np.random.default_rng(level)
    tile = make_tile(rng, level, 16, scale_blocks=8, codes=codes)
    check(families, tile, make_panel(rng, 5, 16, q, zero_point=-q))


@pytest.mark.parametrize("level", (8, 4, 2, 1))
@pytest.mark.parametrize("scale_blocks", (1, 2, 4))
def test_scales_shared_by_blocks(families: list[Family], level: int, scale_blocks: int) -> None:
    rng = np.random.default_rng((level, scale_blocks))
    for blocks in (1, 3, 4, 5, 8, 11):
        tile = make_tile(rng, level, blocks, scale_blocks=scale_blocks)
        check(families, tile, make_panel(rng, 11, blocks))


@pytest.mark.parametrize("residual_steps", range(8, 17))
def test_residual_steps(families: list[Family], residual_steps: int) -> None:
    rng = np.random.default_rng(residual_steps)
    tile = make_tile(rng, 8, 5, scale_blocks=2, residual_steps=residual_steps)
    check(families, tile, make_panel(rng, 15, 5))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(("m", "blocks"), [(1, 96), (64, 32), (33, 48)])
def test_large(families: list[Family], level: int, m: int, blocks: int) -> None:
    rng = np.random.default_rng((level, m, blocks))
    check(families, make_tile(rng, level, blocks), make_panel(rng, m, blocks))


@pytest.mark.parametrize("level", (8, 4, 2, 1))
@pytest.mark.parametrize("codes", ("low", "high", "split"))
@pytest.mark.parametrize("pattern", ((-127,), (127,), (127, -127), (127,) * 4 + (-127,) * 4))
def test_no_intermediate_overflows(
    families: list[Family], level: int, codes: str, pattern: tuple[int, ...]
) -> None:
    rng = np.random.default_rng(level)
    blocks = 3
    q = np.resize(np.array(pattern), blocks * BLOCK)
    panel = make_panel(rng, 15, blocks, q)
    check(families, make_tile(rng, level, blocks, codes=codes), panel)


@pytest.mark.parametrize("level", (8, 4, 2, 1))
def test_codes_against_the_sign_of_the_activation(families: list[Family], level: int) -> None:
    """Highest code where q is positive and lowest where it is negative: the largest sums."""
    rng = np.random.default_rng(level)
    panel = make_panel(rng, 5, 2)
    panel.q[:] = np.where(rng.integers(0, 2, panel.q.shape[1]) == 0, -127, 127)
    panel.sum[:] = panel.q.reshape(5, 2, BLOCK).sum(axis=2, dtype=np.int64)
    tile = make_tile(rng, level, 2)
    for plane, top in zip(tile.planes, PLANE_TOPS[level], strict=True):
        plane[::2] = np.where(panel.q[0] > 0, top, 0)
        plane[1::2] = np.where(panel.q[0] > 0, 0, top)
    check(families, tile, panel)


@pytest.mark.parametrize("level", (8, 4, 2, 1))
def test_subnormal_scales(families: list[Family], level: int) -> None:
    rng = np.random.default_rng(level)
    tile = make_tile(rng, level, 4, residual_steps=13)
    tile.scale[:] = rng.integers(0, 0x100, tile.scale.shape)  # below 2^-125
    panel = make_panel(rng, 6, 4)
    check(families, tile, panel)
    panel.scale[:] = rng.integers(0, 1 << 23, panel.scale.shape).astype(np.uint32).view(np.float32)
    check(families, tile, panel)


@pytest.mark.parametrize("level", (8, 4, 2, 1))
def test_nan_scale_makes_its_row_nan_and_no_other(families: list[Family], level: int) -> None:
    rng = np.random.default_rng(level)
    tile, panel = make_tile(rng, level, 3), make_panel(rng, 9, 3)
    clean = tile.product(panel)
    panel.q[4, BLOCK : 2 * BLOCK] = 0
    panel.sum[4, 1] = 0
    panel.scale[4, 1] = np.nan
    for family in families:
        got = family.tile(tile, panel)
        assert np.isnan(got[4]).all()
        others = np.arange(9) != 4
        assert np.array_equal(got[others], clean[others])


def test_infinities_and_nans_at_level_32(families: list[Family]) -> None:
    rng = np.random.default_rng(0)
    tile, panel = make_tile(rng, 32, 2), make_panel(rng, 6, 2)
    clean = tile.product(panel)
    panel.x[1, 7] = np.nan
    panel.x[2, 60] = np.inf
    panel.x[3, 3:5] = np.inf, -np.inf
    for family in families:
        got = family.tile(tile, panel)
        assert np.isnan(got[1]).all()
        assert np.array_equal(got[2], np.where(tile.weight[:, 60] > 0, np.inf, -np.inf))
        opposed = np.sign(tile.weight[:, 3]) == np.sign(tile.weight[:, 4])
        assert np.array_equal(np.isnan(got[3]), opposed)
        assert np.array_equal(got[[0, 4, 5]], clean[[0, 4, 5]])
