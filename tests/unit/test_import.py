"""Every form of ONNX file becomes one plain float32 model, or a named error on one line."""

from __future__ import annotations

import platform
import warnings
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from bapq_edge.errors import (
    FrozenInputWarning,
    InputFileError,
    ModelFormatError,
    UnsupportedModelError,
)
from bapq_tools.onnx_graph.importers.onnx_file import load_model
from support import onnx_models as models
from support.onnx_models import FLOAT, INT64, load, weights

node = helper.make_node
HALF, BFLOAT = TensorProto.FLOAT16, TensorProto.BFLOAT16


def linear(opset: int = 13) -> onnx.ModelProto:
    return models.model(
        [node("MatMul", ["x", "w"], ["p"]), node("Add", ["p", "b"], ["y"])],
        {"x": (FLOAT, ["batch", 32])},
        {"y": (FLOAT, ["batch", 40])},
        {"w": weights(32, 40), "b": weights(40)},
        opset=opset,
    )


def refuse(path: Path, match: str, error: type[Exception] = ModelFormatError) -> None:
    with pytest.raises(error, match=match) as caught:
        load_model(path)
    assert "\n" not in str(caught.value)


# Files that are no model


def test_missing_file(tmp_path: Path) -> None:
    refuse(tmp_path / "none.onnx", "No such file", InputFileError)


def test_directory(tmp_path: Path) -> None:
    refuse(tmp_path, "Is a directory", InputFileError)


@pytest.mark.parametrize(
    "content", [b"", b"a text file\n", b"\x00" * 1000, b"PK\x03\x04", bytes(range(256))]
)
def test_not_a_model(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    refuse(path, "not a")


def test_model_truncated_anywhere(tmp_path: Path) -> None:
    whole = linear().SerializeToString()
    path = tmp_path / "model.onnx"
    for size in range(0, len(whole), 97):
        path.write_bytes(whole[:size])
        refuse(path, "model")


def test_tensor_shorter_than_its_shape(tmp_path: Path) -> None:
    source = linear()
    source.graph.initializer[0].raw_data = b"\0" * 64
    (tmp_path / "model.onnx").write_bytes(source.SerializeToString())
    refuse(tmp_path / "model.onnx", "'w' .* needs 5120 bytes and has 64")


# Opsets and functions


def test_old_opset_is_converted(tmp_path: Path) -> None:
    source = linear(opset=8)
    source.ir_version = 3
    for name, shape in (("w", [32, 40]), ("b", [40])):  # as that format version demands
        source.graph.input.append(helper.make_tensor_value_info(name, FLOAT, shape))
    loaded = load(source, tmp_path)
    assert [item.name for item in loaded.graph.input] == ["x"]
    assert loaded.opset_import[0].version == 9
    x = weights(4, 32)
    np.testing.assert_array_equal(models.run(loaded, {"x": x}), models.run(linear(), {"x": x}))


def test_old_opset_that_cannot_be_converted(tmp_path: Path) -> None:
    source = models.model(
        [node("GRUUnit", ["x"], ["y"])], {"x": (FLOAT, [1])}, {"y": (FLOAT, [1])}, opset=6
    )
    (tmp_path / "model.onnx").write_bytes(source.SerializeToString())
    refuse(tmp_path / "model.onnx", "opset 6", UnsupportedModelError)


def test_model_without_standard_operators(tmp_path: Path) -> None:
    source = linear()
    source.opset_import[0].domain = "ai.onnx.ml"
    (tmp_path / "model.onnx").write_bytes(source.SerializeToString())
    refuse(tmp_path / "model.onnx", "only ai.onnx.ml", UnsupportedModelError)


def test_newest_stamp_is_lowered_to_what_the_operators_need(tmp_path: Path) -> None:
    source = linear(opset=onnx.defs.onnx_opset_version())
    source.ir_version = onnx.IR_VERSION
    loaded = load(source, tmp_path)
    assert (loaded.opset_import[0].version, loaded.ir_version) == (14, 7)
    models.run(loaded, {"x": weights(4, 32)})


def test_functions_are_inlined(tmp_path: Path) -> None:
    source = models.model(
        [node("Linear", ["x", "w"], ["y"], domain="local")],
        {"x": (FLOAT, [4, 32])},
        {"y": (FLOAT, None)},
        {"w": weights(32, 40)},
        domains=[("local", 1)],
    )
    body = [node("MatMul", ["a", "b"], ["c"]), node("Relu", ["c"], ["d"])]
    opsets = [helper.make_opsetid("", 17)]
    function = helper.make_function("local", "Linear", ["a", "b"], ["d"], body, opsets)
    source.functions.append(function)
    source.ir_version = 8
    assert models.operators(load(source, tmp_path)) == ["MatMul", "Relu"]


def test_nodes_of_other_domains_are_carried(tmp_path: Path) -> None:
    offset = {"offset": [0.0] * 32, "scale": [2.0] * 32}
    source = models.model(
        [
            node("Scaler", ["x"], ["s"], domain="ai.onnx.ml", **offset),
            node("MatMul", ["s", "w"], ["p"]),
            node("ZipMap", ["p"], ["y"], domain="ai.onnx.ml", classlabels_int64s=range(40)),
        ],
        {"x": (FLOAT, ["batch", 32])},
        {"y": (FLOAT, None)},
        {"w": weights(32, 40)},
        domains=[("ai.onnx.ml", 1)],
    )
    value = helper.make_tensor_type_proto(FLOAT, None)
    mapped = helper.make_sequence_type_proto(helper.make_map_type_proto(INT64, value))
    source.graph.output[0].type.CopyFrom(mapped)
    x = weights(2, 32)
    assert models.run(load(source, tmp_path), {"x": x}) == models.run(source, {"x": x})


# Constants


def test_initializers_are_no_inputs(tmp_path: Path) -> None:
    source = linear()
    source.graph.input.append(helper.make_tensor_value_info("w", FLOAT, [32, 40]))
    with pytest.warns(FrozenInputWarning, match="1 initializer .* constants of the bank: w;"):
        loaded = load(source, tmp_path)
    assert [item.name for item in loaded.graph.input] == ["x"]


def test_before_ir_4_listed_initializers_could_not_be_overridden(tmp_path: Path) -> None:
    source = linear(opset=9)
    source.ir_version = 3
    for name, shape in (("w", [32, 40]), ("b", [40])):
        source.graph.input.append(helper.make_tensor_value_info(name, FLOAT, shape))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(source, tmp_path)


def test_constant_nodes_become_initializers_in_bodies_too(tmp_path: Path) -> None:
    tensor = numpy_helper.from_array(weights(32, 40))
    then = models.graph(
        [node("Constant", [], ["w"], value=tensor), node("MatMul", ["x", "w"], ["t"])],
        {},
        {"t": (FLOAT, None)},
    )
    other = models.graph([node("Constant", [], ["e"], value_float=1.5)], {}, {"e": (FLOAT, None)})
    source = models.model(
        [node("If", ["flag"], ["y"], then_branch=then, else_branch=other)],
        {"x": (FLOAT, [4, 32]), "flag": (TensorProto.BOOL, [])},
        {"y": (FLOAT, None)},
    )
    loaded = load(source, tmp_path)
    assert sorted(models.operators(loaded)) == ["Constant", "If", "MatMul"]
    for flag in (True, False):
        feeds = {"x": weights(4, 32), "flag": np.array(flag)}
        np.testing.assert_array_equal(models.run(loaded, feeds), models.run(source, feeds))


# Half floats


def half_model() -> onnx.ModelProto:
    branches = {
        f"{name}_branch": models.graph(
            [node(op, ["h", "k"], [name])],
            {},
            {name: (HALF, None)},
            {"k": np.array(0.5, np.float16)},
            name=name,
        )
        for name, op in (("then", "Mul"), ("else", "Add"))
    }
    return models.model(
        [
            node("MatMul", ["x", "w"], ["p"]),
            node("Cast", ["ids"], ["i"], to=HALF),
            node("Add", ["p", "i"], ["h"]),
            node("If", ["flag"], ["s"], **branches),
            node("Shape", ["s"], ["shape"]),
            node("ConstantOfShape", ["shape"], ["ones"],
                 value=helper.make_tensor("one", HALF, [1], [1.0])),
            node("Add", ["s", "ones"], ["y"]),
            node("Cast", ["y"], ["z"], to=FLOAT),
        ],
        {
            "x": (HALF, ["batch", 32]),
            "ids": (INT64, ["batch", 1]),
            "flag": (TensorProto.BOOL, []),
        },
        {"y": (HALF, ["batch", 40]), "z": (FLOAT, ["batch", 40]), "h": (HALF, None)},
        {"w": weights(32, 40).astype(np.float16)},
    )  # fmt: skip


def test_half_floats_are_widened_inside(tmp_path: Path) -> None:
    source = half_model()
    loaded = load(source, tmp_path)
    assert list(loaded.graph.input) == list(source.graph.input)
    assert list(loaded.graph.output) == list(source.graph.output)
    assert {t.data_type for t in loaded.graph.initializer} == {FLOAT}
    for flag in (True, False):
        feeds = {
            "x": weights(3, 32).astype(np.float16),
            "ids": np.array([[1], [2], [3]]),
            "flag": np.array(flag),
        }
        for have, want in zip(models.run(loaded, feeds), models.run(source, feeds), strict=True):
            assert have.dtype == want.dtype
            np.testing.assert_allclose(have, want, atol=0.03)


def test_bfloat_weights_are_widened(tmp_path: Path) -> None:
    source = models.model(
        [node("MatMul", ["x", "w"], ["y"])],
        {"x": (BFLOAT, [4, 32])},
        {"y": (BFLOAT, [4, 40])},
        {"w": weights(32, 40).astype(ml_dtypes.bfloat16)},
    )
    loaded = load(source, tmp_path)
    assert models.operators(loaded) == ["Cast", "MatMul", "Cast"]
    (weight,) = loaded.graph.initializer
    want = weights(32, 40).astype(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(numpy_helper.to_array(weight), want)


def test_a_model_in_float64_becomes_one_in_float32(tmp_path: Path) -> None:
    double = TensorProto.DOUBLE
    source = models.model(
        [
            node("MatMul", ["x", "w"], ["p"]),
            node("Add", ["p", "b"], ["s"]),
            node("Cast", ["s"], ["half"], to=HALF),
            node("Cast", ["half"], ["y"], to=double),
        ],
        {"x": (double, ["n", 32])},
        {"y": (double, ["n", 40])},
        {"w": weights(32, 40).astype(float), "b": weights(40).astype(float)},
    )
    x = weights(5, 32).astype(float)
    loaded = load(source, tmp_path)
    assert {tensor.data_type for tensor in loaded.graph.initializer} == {FLOAT}
    assert loaded.graph.input[0].type.tensor_type.elem_type == double
    (found,), (wanted,) = models.run(loaded, {"x": x}), models.run(source, {"x": x})
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, wanted, rtol=2e-3, atol=2e-3)


def test_few_values_in_float64_stay(tmp_path: Path) -> None:
    """They may be times, which float32 cannot tell apart."""
    source = models.model(
        [node("Sub", ["t", "start"], ["d"]), node("MatMul", ["x", "w"], ["y"])],
        {"t": (TensorProto.DOUBLE, ["n"]), "x": (FLOAT, ["n", 32])},
        {"d": (TensorProto.DOUBLE, ["n"]), "y": (FLOAT, ["n", 40])},
        {"w": weights(32, 40), "start": np.array([1.7e9])},
    )
    assert models.operators(load(source, tmp_path)) == ["Sub", "MatMul"]


@pytest.mark.skipif(platform.machine() != "x86_64", reason="that layout is of x86-64")
def test_a_layout_of_one_cpu_is_refused(tmp_path: Path) -> None:
    source = models.model(
        [node("Conv", ["x", "k"], ["y"], "first", kernel_shape=[3, 3])],
        {"x": (FLOAT, [1, 32, 8, 8])},
        {"y": (FLOAT, None)},
        {"k": weights(32, 32, 3, 3)},
    )
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "layout.onnx")
    options.log_severity_level = 4
    ort.InferenceSession(source.SerializeToString(), options, providers=["CPUExecutionProvider"])
    with pytest.raises(UnsupportedModelError, match=r"of domain com.microsoft.nchwc: .*EXTENDED"):
        load_model(tmp_path / "layout.onnx")
