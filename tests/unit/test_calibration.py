"""Calibration data: what is refused and how, and how it is cut into samples."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from onnx import helper

from bapq_edge.errors import (
    CalibrationArrayError,
    CalibrationError,
    CalibrationShapeError,
    CalibrationValueError,
    StorageError,
)
from bapq_tools.calibration.samples import load_calibration
from support.onnx_models import FLOAT, INT32, INT64

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
    text, pickled, object_array = (tmp_path / name for name in "acd")
    text.write_text("not arrays")
    pickled.write_bytes(pickle.dumps({"x": 1}))
    with object_array.open("wb") as file:
        np.savez(file, x=np.array([{}], object))
    truncated = tmp_path / "t"
    with truncated.open("wb") as file:
        np.savez(file, x=np.ones((200, 3)))
    truncated.write_bytes(truncated.read_bytes()[:-200])
    empty = tmp_path / "e"
    empty.touch()
    for path in (text, pickled, object_array, truncated, empty):
        with pytest.raises(CalibrationError, match=r"not an \.npz file") as caught:
            load_calibration(path, X)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(StorageError, match="No such file"):
        load_calibration(tmp_path / "absent.npz", X)


def test_an_npy_is_the_data_of_a_single_input(tmp_path):
    np.save(tmp_path / "x.npy", np.ones((2, 3), np.float32))
    assert load_calibration(tmp_path / "x.npy", X).samples == 2
    with pytest.raises(CalibrationArrayError, match="2 inputs, a, b; write"):
        load_calibration(tmp_path / "x.npy", inputs(a=["n", 3], b=["n", 3]))


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


def test_padding_of_masked_tokens_is_cut_off():
    tokens = [
        helper.make_tensor_value_info("ids", INT64, ["batch", "tokens"]),
        helper.make_tensor_value_info("attention_mask", INT64, ["batch", "tokens"]),
        helper.make_tensor_value_info("x", FLOAT, ["batch", 4]),
    ]
    mask = np.array([[1, 1, 1, 0], [0, 1, 1, 1], [0, 0, 0, 0]])
    ids = np.arange(12).reshape(3, 4)
    data = load_calibration({"ids": ids, "attention_mask": mask, "x": np.ones((3, 4))}, tokens)
    assert data.feed(0)["ids"].tolist() == [[0, 1, 2]]
    assert data.feed(1)["ids"].tolist() == [[5, 6, 7]]
    assert data.feed(2)["ids"].tolist() == [[8, 9, 10, 11]]
    assert data.feed(0)["x"].shape == (1, 4)
