"""Calibration by inputs of any size and type: open dimensions, many files, strings, sequences."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import bapq_edge
from bapq_edge.bank.reader import Bank
from bapq_edge.errors import CalibrationError, CalibrationShapeError, InputFileError
from bapq_tools import build_bank
from bapq_tools.calibration.samples import load_calibration
from support import onnx_models as models
from support.onnx_models import FLOAT, INT64, weights

node = helper.make_node


def built(model, calibration, tmp_path, name="m.bank"):
    return build_bank(
        model, tmp_path / name, calibration=calibration, workers=1, progress=False
    ).bank


def planes(bank):
    return {path.name: path.read_bytes() for path in Path(bank).rglob("*.bin")}


def product(batch):
    return models.model(
        [node("MatMul", ["x", "w"], ["y"], "product")],
        {"x": (FLOAT, [batch, 32])},
        {"y": (FLOAT, [batch, 64])},
        {"w": weights(32, 64)},
    )


def convolution(shape):
    return models.model(
        [
            node("Conv", ["x", "w"], ["h"], "first", kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
            node("Relu", ["h"], ["r"]),
            node("Conv", ["r", "v"], ["y"], "second", kernel_shape=[3, 3]),
        ],
        {"x": (FLOAT, shape)},
        {"y": (FLOAT, None)},
        {"w": weights(32, 4, 3, 3), "v": weights(8, 32, 3, 3)},
    )


# ---- open dimensions ----


@pytest.mark.parametrize("unknown", [-1, 0])
def test_a_size_that_is_none_is_an_open_dimension(unknown, tmp_path):
    x = weights(40, 32)
    expected = planes(built(product("n"), {"x": x}, tmp_path, "open.bank"))
    bank = built(product(unknown), {"x": x}, tmp_path)
    assert planes(bank) == expected
    with bapq_edge.Session(bank, level=8) as session:
        assert session.run(None, {"x": x[:7]})[0].shape == (7, 64)


@pytest.mark.parametrize("unknown", [-1, 0])
def test_images_of_no_declared_size(unknown, tmp_path):
    bank = built(convolution([unknown, 4, unknown, unknown]), {"x": weights(3, 4, 9, 7)}, tmp_path)
    with bapq_edge.Session(bank, level=8) as session:
        assert session.run(None, {"x": weights(2, 4, 5, 12)})[0].shape == (2, 8, 3, 10)
    with pytest.raises(CalibrationShapeError, match=r"\(\?, 4, \?, \?\)"):
        built(convolution([unknown, 4, unknown, unknown]), {"x": weights(3, 5, 9, 7)}, tmp_path)


# ---- samples of different sizes ----


def test_samples_of_several_sizes(tmp_path):
    parts = [{"x": weights(n, 4, h, w)} for n, h, w in ((3, 9, 7), (1, 5, 16), (2, 8, 8))]
    folder = tmp_path / "samples"
    folder.mkdir()
    for number, part in enumerate(parts):
        np.savez(folder / f"{number}.npz", **part)
    files = sorted(folder.iterdir())
    model = convolution(["n", 4, "h", "w"])
    data = load_calibration(parts, model.graph.input)
    assert data.samples == 6
    shapes = [data.feed(i)["x"].shape[2:] for i in range(6)]
    assert shapes == [(9, 7)] * 3 + [(5, 16)] + [(8, 8)] * 2
    forms = [parts, folder, files, tuple(map(str, files))]
    banks = [planes(built(model, form, tmp_path, f"{i}.bank")) for i, form in enumerate(forms)]
    assert banks.count(banks[0]) == len(forms)


def test_a_part_that_does_not_fit_is_named(tmp_path):
    model = convolution(["n", 4, "h", "w"])
    np.savez(tmp_path / "good.npz", x=weights(2, 4, 5, 5))
    np.savez(tmp_path / "wrong.npz", x=weights(2, 3, 5, 5))
    with pytest.raises(CalibrationShapeError, match=r"wrong\.npz: array x has shape"):
        built(model, [tmp_path / "good.npz", tmp_path / "wrong.npz"], tmp_path)
    with pytest.raises(InputFileError, match=r"absent\.npz"):
        built(model, [tmp_path / "good.npz", tmp_path / "absent.npz"], tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CalibrationError, match=r"empty holds no \.npz"):
        built(model, tmp_path / "empty", tmp_path)


def test_padding_is_cut_also_where_the_token_axis_has_no_name():
    def tokens(name):
        return helper.make_tensor_value_info(name, INT64, [None, None])

    data = load_calibration(
        {"ids": np.arange(8).reshape(2, 4), "attention_mask": [[1, 1, 0, 0], [1, 1, 1, 0]]},
        [tokens("ids"), tokens("attention_mask")],
    )
    assert [data.feed(i)["ids"].tolist() for i in range(2)] == [[[0, 1]], [[4, 5, 6]]]


def test_empty_tensors_count_nothing(tmp_path):
    """A model with a cache, empty in the first call, and samples without any row."""
    model = models.model(
        [
            node("Concat", ["past", "x"], ["all"], axis=1),
            node("MatMul", ["all", "w"], ["y"], "product"),
            node("MatMul", ["past", "v"], ["z"], "on_past"),
        ],
        {"x": (FLOAT, ["n", "t", 32]), "past": (FLOAT, ["n", "p", 32])},
        {"y": (FLOAT, None), "z": (FLOAT, None)},
        {"w": weights(32, 64), "v": weights(32, 48)},
    )
    calibration = [
        {"x": weights(4, 3, 32), "past": np.zeros((4, 0, 32))},
        {"x": weights(2, 0, 32), "past": np.zeros((2, 0, 32))},
        {"x": weights(3, 1, 32), "past": weights(3, 2, 32)},
    ]
    bank = built(model, calibration, tmp_path)
    feeds = {"x": weights(1, 3, 32), "past": weights(1, 2, 32)}
    with bapq_edge.Session(bank, level=8) as session:
        for found, wanted in zip(session.run(None, feeds), models.run(model, feeds), strict=True):
            assert np.abs(found - wanted).max() < 0.02 * np.abs(wanted).max()


# ---- types ----


def of_strings():
    return models.model(
        [
            node(
                "LabelEncoder",
                ["words"],
                ["ids"],
                domain="ai.onnx.ml",
                keys_strings=["a", "b", "c"],
                values_int64s=[0, 1, 2],
            ),
            node("Gather", ["table", "ids"], ["rows"], "embedding"),
            node("MatMul", ["rows", "w"], ["y"], "product"),
        ],
        {"words": (TensorProto.STRING, ["n", "t"])},
        {"y": (FLOAT, None)},
        {"table": weights(40, 32), "w": weights(32, 64)},
        domains=[("ai.onnx.ml", 2)],
    )


def test_strings(tmp_path):
    words = np.array([["a", "b"], ["c", "a"], ["c", "b"]])
    np.savez(tmp_path / "words.npz", words=words)
    bank = built(of_strings(), tmp_path / "words.npz", tmp_path)
    assert planes(built(of_strings(), {"words": words.astype(object)}, tmp_path)) == planes(bank)
    with pytest.raises(CalibrationShapeError, match="words has type int64"):
        built(of_strings(), {"words": np.zeros((3, 2), np.int64)}, tmp_path)


def of_sequences():
    """A sequence as input, and one between two layers."""
    model = models.model(
        [
            node("ConcatFromSequence", ["frames"], ["x"], axis=0),
            node("MatMul", ["x", "w"], ["h"], "first"),
            node("SplitToSequence", ["h"], ["parts"], axis=0, keepdims=1),
            node("SequenceAt", ["parts", "zero"], ["part"]),
            node("MatMul", ["part", "v"], ["y"], "second"),
        ],
        {"x": (FLOAT, None)},
        {"y": (FLOAT, None)},
        {"w": weights(32, 64), "v": weights(64, 32), "zero": np.array(0, np.int64)},
    )
    model.graph.input[0].CopyFrom(
        helper.make_tensor_sequence_value_info("frames", FLOAT, [None, 32])
    )
    return model


def test_sequences(tmp_path):
    frames = weights(6, 3, 1, 32)  # 6 samples of 3 frames
    ragged = [[weights(2, 32), weights(1, 32)], [weights(3, 32)]] * 3
    for given in (frames, ragged):
        bank = built(of_sequences(), {"frames": given}, tmp_path)
        assert [layer.name for layer in Bank.open(bank).manifest.layers] == ["first", "second"]
    ragged[1][0][0, 5] = np.nan
    with pytest.raises(CalibrationError, match="first in sample 1"):
        built(of_sequences(), {"frames": ragged}, tmp_path)


def of_optionals():
    tensor = helper.make_tensor_type_proto(FLOAT, ["n", 32])
    there = models.graph(
        [node("OptionalGetElement", ["extra"], ["got"])], {}, {"got": (FLOAT, None)}
    )
    absent = models.graph([node("Identity", ["x"], ["same"])], {}, {"same": (FLOAT, None)})
    model = models.model(
        [
            node("OptionalHasElement", ["extra"], ["has"]),
            node("If", ["has"], ["h"], then_branch=there, else_branch=absent),
            node("MatMul", ["h", "w"], ["y"], "product"),
        ],
        {"x": (FLOAT, ["n", 32])},
        {"y": (FLOAT, None)},
        {"w": weights(32, 64)},
        opset=18,
    )
    model.graph.input.append(
        onnx.ValueInfoProto(name="extra", type=helper.make_optional_type_proto(tensor))
    )
    return model


def test_optionals(tmp_path):
    x = weights(20, 32)
    left_out = built(of_optionals(), {"x": x}, tmp_path, "out.bank")
    given = built(of_optionals(), {"x": np.zeros((20, 32)), "extra": x}, tmp_path, "in.bank")
    assert planes(left_out) == planes(given)


def test_maps_are_refused_by_name(tmp_path):
    model = product("n")
    kind = onnx.TypeProto()
    kind.map_type.key_type = INT64
    kind.map_type.value_type.CopyFrom(helper.make_tensor_type_proto(FLOAT, []))
    inputs = [*model.graph.input, onnx.ValueInfoProto(name="lookup", type=kind)]
    with pytest.raises(CalibrationError, match=r"input lookup is of a type .* map_type"):
        load_calibration({"x": weights(2, 32), "lookup": [{}, {}]}, inputs)
