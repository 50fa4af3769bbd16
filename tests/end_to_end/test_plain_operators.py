"""Operators that read no layer: maxima of windows exactly, normalized rows against real numbers."""

from __future__ import annotations

from itertools import product as combinations

import numpy as np
import pytest
from onnx import helper, numpy_helper

from bapq_edge import Session
from bapq_edge.engine.graph import RUN_INPUT
from bapq_edge.errors import RunInputError
from support.banks import graph_bytes, random_codes, write_bank
from support.operators import SCALE_COLUMNS, describe

NAMES = ("pad_top", "pad_left", "pad_bottom", "pad_right")


def bank_of(path, operator, x_shape, constants=(), **attributes):
    """A bank whose graph is this one operator; its layer is read by none."""
    inputs = ["x", RUN_INPUT, *(f"c{i}" for i in range(len(constants)))]
    node = helper.make_node(operator, inputs, ["y"], domain="bapq", **attributes)
    values = [helper.make_node("Constant", [], [f"c{i}"], value=numpy_helper.from_array(value))
              for i, value in enumerate(constants)]  # fmt: skip
    codes = random_codes(np.random.default_rng(0), 16, 32, SCALE_COLUMNS, False)
    layer = ("fc", "MatMul", codes, describe(16, 32, 16, False))
    graph = graph_bytes([*values, node], x_shape, [None] * len(x_shape))
    path.mkdir(exist_ok=True)
    return write_bank(path / "b.bank", graph, [layer])


def run(bank, x, threads=1):
    with Session(bank, threads=threads) as session:
        return session.run(None, {"x": x})[0]


# ---- maxima of windows ----


def window(kernel, strides=(1, 1), pads=(0, 0, 0, 0), dilations=(1, 1), auto_pad=0):
    attributes = {"auto_pad": auto_pad} | dict(zip(NAMES, pads, strict=True))
    for name, values in (("kernel", kernel), ("stride", strides), ("dilation", dilations)):
        attributes[f"{name}_h"], attributes[f"{name}_w"] = values
    return attributes


def pooled(x, kernel, strides=(1, 1), pads=(0, 0, 0, 0), dilations=(1, 1)):
    top, left, bottom, right = pads
    x = np.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right)), constant_values=-np.inf)
    out = [
        (size - (k - 1) * d - 1) // s + 1
        for size, k, d, s in zip(x.shape[2:], kernel, dilations, strides, strict=True)
    ]
    best = np.full((*x.shape[:2], *out), -np.inf, np.float32)
    for taps in combinations(*map(range, kernel)):
        rows, columns = (
            slice(tap * d, tap * d + (count - 1) * s + 1, s)
            for tap, d, count, s in zip(taps, dilations, out, strides, strict=True)
        )
        best = np.maximum(best, x[:, :, rows, columns])
    return best


@pytest.mark.parametrize("kernel", [1, 2, 3, 5, (1, 4), (6, 2)])
@pytest.mark.parametrize("stride", [1, 2, 3, (2, 1)])
@pytest.mark.parametrize("width", [6, 7, 8, 13, 29])
def test_a_maximum_is_that_of_its_window(tmp_path, kernel, stride, width):
    kernel, strides = (value if isinstance(value, tuple) else (value, value)
                       for value in (kernel, stride))  # fmt: skip
    rng = np.random.default_rng(width)
    x = rng.standard_normal((2, 3, 9, width)).astype(np.float32)
    for pads in ((0, 0, 0, 0), (kernel[0] // 2, kernel[1] // 2, 0, kernel[1] - 1)):
        shape = {"kernel": kernel, "strides": strides, "pads": pads}
        bank = bank_of(tmp_path / str(sum(pads)), "MaxPool", [None] * 4, **window(**shape))
        np.testing.assert_array_equal(run(bank, x, threads=2), pooled(x, **shape))


@pytest.mark.parametrize(
    ("size", "shape"),
    [
        ((15, 17), {"kernel": (3, 3), "dilations": (2, 3), "strides": (1, 2)}),
        ((15, 17), {"kernel": (3, 3), "dilations": (3, 2), "pads": (4, 4, 4, 4)}),
        ((2, 3), {"kernel": (3, 3), "pads": (7, 6, 5, 9), "strides": (2, 2)}),
        ((3, 40), {"kernel": (2, 2), "strides": (5, 4), "pads": (0, 9, 3, 0)}),
    ],
)
def test_windows_with_gaps_and_windows_of_padding_alone(tmp_path, size, shape):
    x = np.random.default_rng(0).standard_normal((1, 5, *size)).astype(np.float32)
    bank = bank_of(tmp_path, "MaxPool", [None] * 4, **window(**shape))
    np.testing.assert_array_equal(run(bank, x), pooled(x, **shape))


def test_a_line_is_an_image_of_height_one(tmp_path):
    x = np.random.default_rng(0).standard_normal((2, 4, 30)).astype(np.float32)
    bank = bank_of(tmp_path, "MaxPool", [None] * 3, **window((1, 3), (1, 2), (0, 1, 0, 1)))
    expected = pooled(x[:, :, None], (1, 3), (1, 2), (0, 1, 0, 1))[:, :, 0]
    np.testing.assert_array_equal(run(bank, x), expected)


@pytest.mark.parametrize("width", [9, 30])
def test_a_nan_stays_in_its_windows_and_zero_has_no_sign(tmp_path, width):
    x = np.full((1, 1, 9, width), -0.0, np.float32)
    x[0, 0, 4, 3:9] = [np.nan, 1, np.inf, -np.inf, np.nan, 2]
    bank = bank_of(tmp_path, "MaxPool", [None] * 4, **window((3, 3), (2, 2)))
    y = run(bank, x)
    np.testing.assert_array_equal(y, pooled(x, (3, 3), (2, 2)))
    assert not np.signbit(y[y == 0]).any()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"kernel_h": 0}, "the pooling's kernel_h is 0, it can be from 1 to 1048576"),
        ({"pad_left": -1}, "the pooling's pad_left is -1"),
        ({"kernel_w": 12}, "the pooling's input of 9 x 9 is smaller than its window"),
    ],
)
def test_windows_that_cannot_be_are_refused(tmp_path, changed, message):
    bank = bank_of(tmp_path, "MaxPool", [None] * 4, **window((3, 3)) | changed)
    with pytest.raises(RunInputError, match=message):
        run(bank, np.zeros((1, 1, 9, 9), np.float32))


# ---- layer normalization ----


def normalized(x, scale, bias, epsilon):
    x = x.astype(np.float64)
    mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + epsilon) * scale + bias


@pytest.mark.parametrize("n", [1, 2, 3, 5, 16, 31, 32, 100, 384])
@pytest.mark.parametrize("has_bias", [True, False])
def test_rows_are_normalized(tmp_path, n, has_bias):
    rng = np.random.default_rng(n)
    x = rng.normal(3, 2, (2, 150, n)).astype(np.float32)
    factors = rng.normal(1, 1, (1 + has_bias, n)).astype(np.float32)
    bank = bank_of(tmp_path, "LayerNormalization", [None] * 3, [*factors], epsilon=1e-3)
    y = run(bank, x, threads=2)
    expected = normalized(x, factors[0], factors[1] if has_bias else 0, 1e-3)
    np.testing.assert_allclose(y, expected, rtol=0, atol=2e-5)


def test_a_row_with_a_nan_spoils_no_other(tmp_path):
    x = np.random.default_rng(0).standard_normal((4, 40)).astype(np.float32)
    ones = np.ones(40, np.float32)
    bank = bank_of(tmp_path, "LayerNormalization", [None] * 2, [ones, 0 * ones], epsilon=1e-5)
    clean = run(bank, x)
    x[1, 7] = np.nan
    y = run(bank, x)
    assert np.isnan(y[1]).all()
    np.testing.assert_array_equal(y[[0, 2, 3]], clean[[0, 2, 3]])


@pytest.mark.parametrize("length", [1, 39, 41])
def test_factors_of_another_length_are_refused(tmp_path, length):
    factors = [np.ones(40, np.float32), np.ones(length, np.float32)]
    bank = bank_of(tmp_path, "LayerNormalization", [None] * 2, factors, epsilon=1e-5)
    with pytest.raises(RunInputError, match=f"has 40 values a row, its bias {length} on 1 axes"):
        run(bank, np.ones((2, 40), np.float32))
