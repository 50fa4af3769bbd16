"""Calibration data: what is refused and how, and the moments that reach the quantizer."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from onnx import TensorProto, helper
from unit import models
from unit.models import FLOAT, INT32, INT64, weights

from bapq_edge.errors import (
    CalibrationArrayError,
    CalibrationError,
    CalibrationShapeError,
    CalibrationValueError,
    StorageError,
)
from bapq_tools.passes import calibrate as stage
from bapq_tools.passes.calibrate import calibrate, load_calibration
from bapq_tools.passes.layers import find_layers

node = helper.make_node


def inputs(**shapes):
    """Model inputs; a name that starts with `ids` is int64, others float32."""
    return [
        helper.make_tensor_value_info(name, INT64 if name.startswith("ids") else FLOAT, shape)
        for name, shape in shapes.items()
    ]


X = inputs(x=["batch", 3])


# ---- what is refused ----


def test_names_must_be_those_of_the_model():
    for arrays in ({}, {"x": np.ones((2, 3)), "y": np.ones((2, 3))}, {"y": np.ones((2, 3))}):
        with pytest.raises(CalibrationArrayError, match="the model needs x") as caught:
            load_calibration(arrays, X)
        for name in arrays:
            assert name in str(caught.value)


@pytest.mark.parametrize(
    ("declared", "shape"),
    [
        (["batch", 3], (5, 4)),
        (["batch", 3], (5,)),
        (["batch", 3], (2, 5, 4)),
        ([1, 3], (5, 1, 4)),
        ([4, 3], (6, 3)),
        ([], ()),
    ],
)
def test_shape_must_fit(declared, shape):
    with pytest.raises(CalibrationShapeError) as caught:
        load_calibration({"x": np.ones(shape, np.float32)}, inputs(x=declared))
    assert str(shape) in str(caught.value) and "\n" not in str(caught.value)


def test_type_must_fit():
    for array in (np.ones((2, 3), np.int64), np.ones((2, 3), bool), np.full((2, 3), "a")):
        with pytest.raises(CalibrationShapeError, match=rf"{array.dtype}.*float32"):
            load_calibration({"x": array}, X)
    with pytest.raises(CalibrationShapeError, match=r"float32.*int64"):
        load_calibration({"ids": np.ones((2, 3), np.float32)}, inputs(ids=["n", 3]))


def test_sizes_of_a_type_convert_when_the_values_fit():
    wide = load_calibration({"x": np.full((2, 3), 0.1)}, X)
    assert wide.feed(0)["x"].dtype == np.float32
    for dtype in (np.int8, np.uint16, np.int32, np.uint64):
        data = load_calibration({"ids": np.full((2, 3), 7, dtype)}, inputs(ids=["n", 3]))
        assert data.feed(1)["ids"].dtype == np.int64 and (data.feed(1)["ids"] == 7).all()
    narrow = [helper.make_tensor_value_info("i", INT32, ["n"])]
    assert load_calibration({"i": np.array([2**31 - 1])}, narrow).feed(0)["i"] == [2**31 - 1]
    with pytest.raises(CalibrationShapeError, match="2147483648"):
        load_calibration({"i": np.array([2**31])}, narrow)
    with pytest.raises(CalibrationValueError):
        load_calibration({"x": np.full((2, 3), 1e39)}, X)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_must_be_finite(bad):
    x = np.ones((6, 3), np.float32)
    x[4, 1] = x[5, 0] = bad
    with pytest.raises(CalibrationValueError, match=r"array x holds 2 .*sample 4"):
        load_calibration({"x": x}, X)
    with pytest.raises(CalibrationValueError, match=r"sample 2"):
        load_calibration({"x": x}, inputs(x=[2, 3]))


def test_counts_must_agree():
    two = inputs(a=["n", 2], b=["n", 2])
    with pytest.raises(CalibrationShapeError, match="a has 3, b has 4"):
        load_calibration({"a": np.ones((3, 2)), "b": np.ones((4, 2))}, two)
    with pytest.raises(CalibrationError, match="0 samples"):
        load_calibration({"x": np.ones((0, 3))}, X)


def test_file_must_be_an_npz_of_plain_arrays(tmp_path):
    text, single, pickled, object_array = (tmp_path / name for name in "abcd")
    text.write_text("not arrays")
    with single.open("wb") as file:
        np.save(file, np.ones((2, 3)))
    pickled.write_bytes(pickle.dumps({"x": 1}))
    with object_array.open("wb") as file:
        np.savez(file, x=np.array([{}], object))
    truncated = tmp_path / "t"
    with truncated.open("wb") as file:
        np.savez(file, x=np.ones((200, 3)))
    truncated.write_bytes(truncated.read_bytes()[:-200])
    empty = tmp_path / "e"
    empty.touch()
    for path in (text, single, pickled, object_array, truncated, empty):
        with pytest.raises(CalibrationError, match=r"not an \.npz file") as caught:
            load_calibration(path, X)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(StorageError, match="No such file"):
        load_calibration(tmp_path / "absent.npz", X)


def test_damaged_member_is_named_too(tmp_path):
    path = tmp_path / "x.npz"
    np.savez(path, x=np.ones((200, 3)))
    data = bytearray(path.read_bytes())
    data[1000] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(CalibrationError, match=r"not an \.npz file"):
        load_calibration(path, X)


# ---- samples ----


@pytest.mark.parametrize(
    ("declared", "shape", "samples", "fed"),
    [
        (["n", 3], (5, 3), 5, (1, 3)),
        ([1, 3], (5, 3), 5, (1, 3)),
        ([2, 3], (6, 3), 3, (2, 3)),
        ([2, 3], (6, 2, 3), 6, (2, 3)),
        (["time", 3], (4, 7, 3), 4, (7, 3)),
        ([], (5,), 5, ()),
        (None, (5, 3), 5, (1, 3)),
    ],
)
def test_samples_are_cut_to_the_inputs_shape(declared, shape, samples, fed):
    array = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    data = load_calibration({"x": array}, inputs(x=declared))
    assert data.samples == samples
    parts = [data.feed(i)["x"] for i in range(samples)]
    assert all(part.shape == fed for part in parts)
    np.testing.assert_array_equal(np.concatenate([p.ravel() for p in parts]), array.ravel())


def test_digest_is_that_of_the_values(tmp_path):
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    np.savez_compressed(tmp_path / "x.npz", x=x)
    digest = load_calibration({"x": x}, X).blake2b
    assert load_calibration(tmp_path / "x.npz", X).blake2b == digest
    assert load_calibration({"x": x.astype(np.float64)}, X).blake2b == digest
    assert load_calibration({"x": x + 1}, X).blake2b != digest


# ---- moments ----


def stats_of(model, feeds, workers=1):
    plan = find_layers(model)
    before = model.SerializeToString()
    data = load_calibration(feeds, model.graph.input)
    stats = calibrate(model, plan, data, workers)
    assert model.SerializeToString() == before
    return stats


def assert_moments(stats, columns):
    """columns: (groups, rows, columns) of the activations that the layer multiplied."""
    columns = columns.astype(np.float64)
    assert stats.rows == columns.shape[1]
    np.testing.assert_allclose(stats.mean, columns.mean(1), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(stats.mean_square, np.square(columns).mean(1), rtol=1e-5)


def two_products():
    nodes = [node("MatMul", ["x", "w"], ["h"], "first"), node("Relu", ["h"], ["r"])]
    nodes.append(node("MatMul", ["r", "v"], ["y"], "second"))
    constants = {"w": weights(32, 64), "v": weights(64, 32)}
    shapes = {"x": (FLOAT, ["n", "t", 32])}, {"y": (FLOAT, None)}
    return models.model(nodes, *shapes, constants), constants


def test_products_see_graph_inputs_and_what_is_inside():
    model, constants = two_products()
    x = weights(7, 5, 32)
    stats = stats_of(model, {"x": x})
    assert_moments(stats["first"], x.reshape(1, -1, 32))
    assert_moments(stats["second"], np.maximum(x @ constants["w"], 0).reshape(1, -1, 64))


def test_neither_workers_nor_bunches_change_the_moments(monkeypatch):
    model, _ = two_products()
    feeds = {"x": weights(9, 5, 32)}
    once = stats_of(model, feeds)
    monkeypatch.setattr(stage, "_OBSERVED_BYTES", 1)
    monkeypatch.setattr(stage, "_PROBED_TENSORS", 1)
    for name, found in stats_of(model, feeds, workers=3).items():
        np.testing.assert_array_equal(found.mean, once[name].mean)
        np.testing.assert_array_equal(found.mean_square, once[name].mean_square)


def im2col(x, kernel, strides, dilations, pads, group):
    """(group, n * outputs, columns) of x (n, c, h, w), in the order (ky, kx, channel)."""
    top, left, bottom, right = pads
    x = np.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right)))
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    rows = []
    for y in range(0, x.shape[2] - reach[0] + 1, strides[0]):
        for z in range(0, x.shape[3] - reach[1] + 1, strides[1]):
            patch = x[:, :, y : y + reach[0] : dilations[0], z : z + reach[1] : dilations[1]]
            split = patch.reshape(len(x), group, -1, *kernel)
            rows.append(split.transpose(1, 0, 3, 4, 2).reshape(group, len(x), -1))
    return np.concatenate(rows, axis=1)


@pytest.mark.parametrize(
    ("kernel", "strides", "dilations", "pads", "group"),
    [
        ((3, 3), (1, 1), (1, 1), (1, 1, 1, 1), 1),
        ((3, 3), (2, 2), (1, 1), (0, 1, 2, 0), 2),
        ((5, 2), (3, 1), (1, 2), (4, 0, 4, 3), 4),
        ((1, 1), (2, 3), (1, 1), (0, 0, 0, 0), 1),
        ((3, 3), (1, 2), (4, 3), (4, 3, 4, 3), 1),
        ((7, 7), (1, 1), (2, 2), (9, 9, 9, 9), 1),  # some positions meet padding alone
    ],
)
def test_convolutions_see_what_an_im2col_would(kernel, strides, dilations, pads, group):
    shape = (64, 16 // group, *kernel)
    top, left, bottom, right = pads
    attributes = {
        "kernel_shape": kernel,
        "strides": strides,
        "dilations": dilations,
        "pads": [top, left, bottom, right],
        "group": group,
    }
    model = models.model(
        [node("Conv", ["x", "w"], ["y"], "conv", **attributes)],
        {"x": (FLOAT, ["n", 16, 7, 9])},
        {"y": (FLOAT, None)},
        {"w": weights(*shape)},
    )
    x = weights(3, 16, 7, 9) + 1
    found = stats_of(model, {"x": x})["conv"]
    assert_moments(found, im2col(x, kernel, strides, dilations, pads, group))


@pytest.mark.parametrize("auto_pad", ["SAME_UPPER", "SAME_LOWER", "VALID"])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_automatic_padding(auto_pad, stride):
    w, x = weights(64, 8, 4, 4), weights(2, 8, 9, 10) + 1
    model = models.model(
        [node("Conv", ["x", "w"], ["y"], "conv", auto_pad=auto_pad, strides=[stride] * 2)],
        {"x": (FLOAT, ["n", 8, 9, 10])},
        {"y": (FLOAT, None)},
        {"w": w},
    )
    found = stats_of(model, {"x": x})["conv"]
    # The mean of the output follows from the mean of the input exactly.
    (y,) = models.run(model, {"x": x})
    matrix = w.transpose(0, 2, 3, 1).reshape(64, -1)
    assert found.rows == y[:, 0].size
    np.testing.assert_allclose(matrix @ found.mean[0], y.mean((0, 2, 3)), rtol=1e-3, atol=1e-4)


def test_one_dimensional_convolution():
    w, x = weights(64, 8, 3), weights(4, 8, 11) + 1
    model = models.model(
        [node("Conv", ["x", "w"], ["y"], "conv", pads=[2, 0], strides=[2])],
        {"x": (FLOAT, ["n", 8, 11])},
        {"y": (FLOAT, None)},
        {"w": w},
    )
    expected = im2col(x[:, :, None], (1, 3), (1, 2), (1, 1), (0, 2, 0, 0), 1)
    assert_moments(stats_of(model, {"x": x})["conv"], expected)


def test_tied_weights_add_up_and_gathered_ones_are_left_out():
    table = weights(40, 32)
    nodes = [
        node("MatMul", ["x", "w"], ["h"], "once"),
        node("MatMul", ["h", "w"], ["g"], "twice"),
        node("Gather", ["table", "ids"], ["row"], "embedding"),
        node("MatMul", ["g", "transposed"], ["y"], "head"),
    ]
    w = weights(32, 32)
    model = models.model(
        nodes,
        {"x": (FLOAT, ["n", 32]), "ids": (INT64, ["n"])},
        {"y": (FLOAT, None), "row": (FLOAT, None)},
        {"w": w, "table": table, "transposed": np.ascontiguousarray(table.T)},
    )
    x = weights(6, 32)
    stats = stats_of(model, {"x": x, "ids": np.arange(6)})
    assert set(stats) == {"once"}
    assert_moments(stats["once"], np.concatenate([x, x @ w])[None])


def test_layers_inside_bodies_have_no_stats():
    body = models.graph(
        [node("MatMul", ["x", "w"], ["inner"], "inside")], {}, {"inner": (FLOAT, None)}
    )
    other = models.graph([node("Identity", ["x"], ["same"])], {}, {"same": (FLOAT, None)})
    model = models.model(
        [
            node("If", ["c"], ["h"], then_branch=body, else_branch=other),
            node("MatMul", ["h", "v"], ["y"], "outside"),
        ],
        {"x": (FLOAT, ["n", 32]), "c": (TensorProto.BOOL, [])},
        {"y": (FLOAT, None)},
        {"w": weights(32, 32), "v": weights(32, 64)},
    )
    x = weights(4, 32)
    stats = stats_of(model, {"x": x, "c": np.array([True, False, True, False])})
    assert set(stats) == {"outside"}
    inner = np.where(np.array([[True], [False], [True], [False]]), x @ weights(32, 32), x)
    assert_moments(stats["outside"], inner[None])


def test_sample_that_the_model_refuses_is_named():
    model = models.model(
        [node("Gather", ["w", "ids"], ["h"]), node("MatMul", ["h", "v"], ["y"], "product")],
        {"ids": (INT64, ["n"])},
        {"y": (FLOAT, None)},
        {"w": weights(40, 32), "v": weights(32, 64)},
    )
    with pytest.raises(CalibrationError, match="fails on calibration sample 2") as caught:
        stats_of(model, {"ids": np.array([1, 2, 99])})
    assert "\n" not in str(caught.value)


def test_activation_that_overflows_is_named():
    model = models.model(
        [node("Exp", ["x"], ["e"]), node("MatMul", ["e", "w"], ["y"], "product")],
        {"x": (FLOAT, ["n", 32])},
        {"y": (FLOAT, None)},
        {"w": weights(32, 64)},
    )
    x = weights(3, 32)
    x[1, 5] = 1000
    with pytest.raises(CalibrationError, match="sample 1 gives layer product"):
        stats_of(model, {"x": x})
