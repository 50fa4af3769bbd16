"""Codes, scales and biases that the quantizer chooses, judged by what the device computes."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from onnx import GraphProto, NodeProto

from bapq_edge.bank.codes import check_values, dequantize
from bapq_edge.bank.layout import LEVELS, PLANES_OF_LEVEL, planes_for
from bapq_tools.calibration.matrix_stats import LevelStats, MatrixStats
from bapq_tools.onnx_graph.ir import HeavyLayer, LayerUse
from bapq_tools.quantize.layer_tasks import quantize_layer
from bapq_tools.quantize.options import SCALE_COLUMNS, LayerOptions

LOW = (8, 4, 2, 1)


def layer(weight, bias=None, operators=("MatMul",)):
    uses = tuple(
        LayerUse(NodeProto(), (), operator, "x", "y", GraphProto(), False) for operator in operators
    )
    weight = np.ascontiguousarray(weight, np.float32)
    return HeavyLayer("layer", weight, bias, uses, ())


def undrifted(x, held_out, rows):
    """Statistics of a matrix that meets x, (n, columns), whatever the levels before it."""
    mean = x.mean(0)
    gram = (x - mean).T @ (x - mean) / np.float32(len(x))
    drift = np.zeros((rows, x.shape[1]), np.float32)
    seen = LevelStats((gram,), drift, mean, held_out - mean)
    blocks = (slice(0, x.shape[1]),)
    return MatrixStats(blocks, mean, held_out - mean, {4: seen, 2: seen})


def normal(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def stats_of(x, groups=1):
    """Activations (rows, groups * columns) that calibration sees; every eighth row is held out."""
    return x, groups


def quantize(layer, seen, options):
    """Codes of the layer and all that is known of it; no level drifts from the float model."""
    stats = None
    if seen is not None:
        x, groups = seen
        held = np.arange(len(x)) % 8 == 7
        rows = len(layer.weight) // groups
        stats = []
        for group, part in enumerate(np.split(x, groups, axis=1)):
            weight = layer.weight[group * rows : (group + 1) * rows]
            stats.append(undrifted(part[~held], part[held], len(weight)))
    found = quantize_layer(layer, stats, options)
    return found.codes, found


def weights_at(codes, info, level):
    return dequantize(codes, level, info.residual_steps, info.scale_columns)


def relative(found, expected):
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


def test_each_level_is_as_near_as_its_bits_allow():
    w = normal(70, 200)
    codes, info = quantize(layer(w), None, LayerOptions(LEVELS))
    errors = {level: relative(weights_at(codes, info, level), w) for level in LEVELS}
    assert errors[32] == 0
    # Optimal scalar quantizers of a normal distribution reach 0.115, 0.343, 0.603 at 4, 2, 1 bits.
    assert errors[8] < 0.0065 and errors[4] < 0.097 and errors[2] < 0.34 and errors[1] < 0.603
    for level, error in errors.items():
        assert info.relative_error[level] == pytest.approx(error, rel=1e-4, abs=1e-12)


def test_row_errors_are_shares_of_the_layer_s_output():
    w, x = normal(24, 64), normal(3000, 64) * np.linspace(0.1, 2, 64).astype(np.float32)
    codes, info = quantize(layer(w), stats_of(x), LayerOptions(LOW))
    wanted = x @ w.T
    for level in LOW:
        missed = x @ (weights_at(codes, info, level) - w).T
        expected = np.square(missed).sum(0) / np.square(wanted).sum()
        # the damping of H and the rows held out make the difference
        np.testing.assert_allclose(info.row_error[level], expected, rtol=0.3)
        assert info.relative_error[level] ** 2 == pytest.approx(info.row_error[level].sum())


def test_level_8_is_within_half_a_step_everywhere():
    w = normal(64, 96) ** 3  # heavy tails: the largest weight of a group stands far out
    codes, info = quantize(layer(w), None, LayerOptions((8,)))
    step = np.repeat(codes.scales[4], 32, axis=1) / info.residual_steps
    assert (np.abs(weights_at(codes, info, 8) - w) <= step * 0.5001).all()
    # ... and the step is that of 256 values over the group's range, to bf16's precision.
    peak = np.abs(w).reshape(64, 3, 32).max(-1)
    assert (codes.scales[4] <= peak / 7 * 1.008).all()


def test_level_4_codes_are_the_nearest():
    w = normal(32, 64)
    codes, info = quantize(layer(w), None, LayerOptions((4,)))
    scale = np.repeat(codes.scales[4], 32, axis=1)
    grid = (np.arange(16, dtype=np.float32) - 7.5) * scale[..., None]
    nearest = np.abs(grid - w[..., None]).min(-1)
    np.testing.assert_allclose(np.abs(weights_at(codes, info, 4) - w), nearest, atol=1e-6)


def test_level_2_scale_beats_every_other():
    w = normal(8, 64)
    codes, info = quantize(layer(w), None, LayerOptions((2,)))
    found = np.square(weights_at(codes, info, 2) - w).sum(-1)
    best = np.full(8, np.inf)
    for scale in np.linspace(0.5, 2, 301):
        code = np.clip(np.floor(w / scale), -2, 1) + 0.5
        best = np.minimum(best, np.square(w - scale * code).sum(-1))
    assert (found <= best * 1.01).all()


def test_two_valued_weights_are_exact_at_level_1():
    w = np.where(normal(16, 128) < 0, -0.25, 0.25)
    codes, info = quantize(layer(w), None, LayerOptions(LOW))
    np.testing.assert_array_equal(weights_at(codes, info, 1), w)
    assert info.relative_error[1] == 0


@pytest.mark.parametrize("levels", [c for n in (1, 2) for c in itertools.combinations(LEVELS, n)])
def test_any_set_of_levels_fills_exactly_its_planes(levels):
    w, bias = normal(20, 40), normal(20)
    codes, info = quantize(layer(w, bias), None, LayerOptions(levels))
    planes = planes_for(levels)
    assert set(codes.codes) == set(planes) - {"f32"}
    assert (codes.weight is not None) == (32 in levels)
    assert set(codes.bias) == set(levels)
    assert set(codes.scales) == {4 if level == 8 else level for level in levels} - {32}
    assert set(info.relative_error) == set(levels)
    assert info.method == {level: "nearest" for level in levels if level != 32}
    assert set(info.scale_columns) == set(codes.scales)
    whole, _ = quantize(layer(w, bias), None, LayerOptions(LEVELS))
    for level in levels:
        np.testing.assert_array_equal(
            weights_at(codes, info, level),
            dequantize(whole, level, info.residual_steps, SCALE_COLUMNS),
        )
        for plane in set(PLANES_OF_LEVEL[level]) - {"f32"}:
            np.testing.assert_array_equal(codes.codes[plane], whole.codes[plane])


@pytest.mark.parametrize(
    ("operator", "power", "calibrated", "options", "columns"),
    [
        ("Conv", 1, True, LayerOptions(LOW), 128),
        ("Conv", 3, True, LayerOptions(LOW), 32),  # outliers, whose scales few weights may share
        ("Conv", 1, True, LayerOptions((8, 2)), 32),  # nearest: there is no level 4 to compensate
        ("Conv", 3, True, LayerOptions(LOW, {4: 64}), 64),
        ("Conv", 1, False, LayerOptions(LOW), 32),
        ("MatMul", 1, True, LayerOptions(LOW), 32),
    ],
)
def test_scales_of_a_convolution_reach_further_where_that_costs_little(
    operator, power, calibrated, options, columns
):
    w, x = normal(16, 200) ** power, normal(1000, 200)
    codes, info = quantize(
        layer(w, operators=(operator,)), stats_of(x) if calibrated else None, options
    )
    assert info.scale_columns[4] == columns
    assert codes.scales[4].shape == (16, -(-200 // columns))
    assert relative(weights_at(codes, info, 8), w) < 0.015


@pytest.mark.parametrize("columns", [1, 31, 33, 65, 129])
def test_columns_past_the_last_do_not_matter(columns):
    """A ragged layer equals the head of one whose rest is smaller and weighs nothing."""
    w = normal(5, columns)
    codes, info = quantize(layer(w), None, LayerOptions(LOW))
    for level, size in SCALE_COLUMNS.items():
        assert codes.scales[level].shape == (5, -(-columns // size))
    tail = slice(columns // 32 * 32, None)
    if columns % 32:
        alone, _ = quantize(layer(w[:, tail]), None, LayerOptions((8, 4)))
        np.testing.assert_array_equal(alone.codes["p4"], codes.codes["p4"][:, tail])
        np.testing.assert_array_equal(alone.scales[4][:, 0], codes.scales[4][:, -1])
    if columns == 1:
        for level in LOW:
            assert relative(weights_at(codes, info, level), w) < 0.004  # that of the bf16 scale


@pytest.mark.parametrize(
    "values",
    [
        np.zeros((3, 70)),
        np.full((3, 70), 0.3),
        np.full((3, 70), -2e-39),  # subnormal
        np.full((3, 70), 3e38),
        np.concatenate([np.zeros((3, 64)), np.ones((3, 6))], axis=1),
        np.concatenate([np.full((3, 1), 1e6), np.full((3, 69), 1e-3)], axis=1),
        np.concatenate([np.full((3, 1), 1e30), np.full((3, 69), 1e-30)], axis=1),
        np.full((3, 70), np.float32(2.0**-116)),
    ],
    ids=["zero", "constant", "subnormal", "huge", "zero group", "outlier", "wide", "small"],
)
@pytest.mark.parametrize("calibrated", [False, True])
def test_unusual_weights(values, calibrated):
    w = values.astype(np.float32)
    stats = stats_of(normal(50, 70)) if calibrated else None
    codes, info = quantize(layer(w), stats, LayerOptions(LOW))
    peak = float(np.abs(w).max())
    for level, scale in codes.scales.items():
        assert (scale >= 0).all()
        for plane in PLANES_OF_LEVEL[level]:
            check_values(plane, codes.codes[plane], scale)
    for level in LOW:
        found = weights_at(codes, info, level)
        assert np.isfinite(found).all()
        assert np.isfinite(info.relative_error[level])
        if level > 2 and not w[:, :64].any():  # the others have one scale for all 70 columns
            np.testing.assert_array_equal(found[:, :64], 0)
    # No scale is below 2^-120; level 8 has 96 steps on each side of zero, or 128.
    assert np.abs(weights_at(codes, info, 8) - w).max() <= max(peak / 190, 2.0**-116)


def test_calibration_protects_the_columns_that_matter():
    w = normal(64, 128)
    x = normal(500, 128) * np.where(np.arange(128) % 16 == 0, 20, 0.5).astype(np.float32)
    plain, info = quantize(layer(w), None, LayerOptions(LOW))
    fitted, fitted_info = quantize(layer(w), stats_of(x), LayerOptions(LOW))
    for level in (4, 2, 1):
        before = relative(x @ weights_at(plain, info, level).T, x @ w.T)
        after = relative(x @ weights_at(fitted, fitted_info, level).T, x @ w.T)
        assert after < before
        assert fitted_info.relative_error[level] == pytest.approx(after, rel=0.1)


def test_bias_takes_up_the_mean_of_the_error():
    w, bias = normal(48, 96), normal(48, seed=1)
    x = normal(400, 96) + 1
    codes, info = quantize(layer(w, bias), stats_of(x), LayerOptions(LEVELS))
    np.testing.assert_array_equal(codes.bias[32], bias)
    for level in (8, 4, 2, 1):
        product = x @ weights_at(codes, info, level).T
        exact = x @ w.T + bias
        assert relative(product + codes.bias[level], exact) < relative(product + bias, exact)
    plain, _ = quantize(layer(w, bias), None, LayerOptions(LEVELS))
    for level in LEVELS:
        np.testing.assert_array_equal(plain.bias[level], bias)


def test_new_bias_only_where_it_helps():
    w = normal(48, 96)
    shifted, centred = normal(400, 96) + 1, normal(400, 96)
    centred -= centred.mean(0)
    assert quantize(layer(w), stats_of(shifted), LayerOptions(LOW))[0].bias
    assert not quantize(layer(w), stats_of(centred), LayerOptions(LOW))[0].bias
    assert not quantize(layer(w), None, LayerOptions(LOW))[0].bias
    tied = layer(w, operators=("MatMul", "Gather"))
    assert not quantize(tied, stats_of(shifted), LayerOptions(LOW))[0].bias


def test_groups_of_a_convolution_have_stats_of_their_own():
    w = normal(24, 36)
    x = normal(300, 72) * np.repeat([0.1, 3], 36).astype(np.float32) + 1
    codes, _ = quantize(layer(w), stats_of(x, groups=2), LayerOptions(LOW))
    for group, rows in enumerate((slice(0, 12), slice(12, 24))):
        part = stats_of(x[:, group * 36 : (group + 1) * 36])
        alone, _ = quantize(layer(w[rows]), part, LayerOptions(LOW))
        for plane, code in alone.codes.items():
            np.testing.assert_array_equal(codes.codes[plane][rows], code)
        for level in LOW:
            np.testing.assert_allclose(codes.bias[level][rows], alone.bias[level], rtol=1e-5)


def test_input_that_calibration_never_saw_active_still_counts():
    w = normal(16, 64)
    dead = stats_of(np.zeros((9, 64), np.float32))
    codes, info = quantize(layer(w), dead, LayerOptions(LOW))
    plain, _ = quantize(layer(w), None, LayerOptions(LOW))
    np.testing.assert_array_equal(codes.codes["p4"], plain.codes["p4"])
    assert all(np.isfinite(list(info.relative_error.values())))
