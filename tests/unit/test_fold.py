"""Folding leaves a smaller model of standard operators that computes the same."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from bapq_edge.errors import StorageError, UnsupportedModelError
from bapq_tools.onnx_graph.fold import fold
from support import onnx_models as models
from support.onnx_models import FLOAT, INT64, weights

node = helper.make_node


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folding works in here, and must leave nothing behind."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    assert not list(folder.iterdir())


def test_batch_norm_goes_into_the_convolution(capfd: pytest.CaptureFixture[str]) -> None:
    source = models.model(
        [
            node("Conv", ["x", "k"], ["c"], kernel_shape=[3, 3]),
            node("BatchNormalization", ["c", "scale", "shift", "mean", "var"], ["n"]),
            node("Relu", ["n"], ["y"]),
        ],
        {"x": (FLOAT, ["batch", 8, "height", "width"])},
        {"y": (FLOAT, ["batch", 16, "h", "w"])},
        {
            "k": weights(16, 8, 3, 3),
            "scale": weights(16),
            "shift": weights(16, seed=1),
            "mean": weights(16, seed=2),
            "var": np.abs(weights(16, seed=3)) + 0.1,
        },
    )
    folded = fold(source)
    assert models.operators(folded) == ["Conv", "Relu"]
    assert list(folded.graph.input) == list(source.graph.input)
    assert list(folded.graph.output) == list(source.graph.output)
    x = weights(2, 8, 7, 7)
    want = models.run(source, {"x": x})[0]
    np.testing.assert_allclose(models.run(folded, {"x": x})[0], want, atol=1e-5 * want.max())
    assert capfd.readouterr() == ("", "")


def test_transformer_patterns_stay_standard_operators() -> None:
    """Layer normalization and Gelu spelled out: ORT has operators of its own for both."""
    source = models.model(
        [
            node("ReduceMean", ["x"], ["mean"], axes=[-1]),
            node("Sub", ["x", "mean"], ["d"]),
            node("Pow", ["d", "two"], ["square"]),
            node("ReduceMean", ["square"], ["var"], axes=[-1]),
            node("Add", ["var", "epsilon"], ["shifted"]),
            node("Sqrt", ["shifted"], ["deviation"]),
            node("Div", ["d", "deviation"], ["unit"]),
            node("Mul", ["unit", "gain"], ["scaled"]),
            node("Add", ["scaled", "offset"], ["norm"]),
            node("MatMul", ["norm", "w"], ["p"]),
            node("Add", ["p", "b"], ["q"]),
            node("Div", ["q", "root2"], ["r"]),
            node("Erf", ["r"], ["e"]),
            node("Add", ["e", "one"], ["f"]),
            node("Mul", ["q", "f"], ["g"]),
            node("Mul", ["g", "half"], ["y"]),
        ],
        {"x": (FLOAT, ["batch", "sequence", 32])},
        {"y": (FLOAT, ["batch", "sequence", 40])},
        {
            "two": np.array(2, np.float32),
            "epsilon": np.array(1e-5, np.float32),
            "gain": weights(32),
            "offset": weights(32, seed=1),
            "w": weights(32, 40),
            "b": weights(40),
            "root2": np.array(2**0.5, np.float32),
            "one": np.array(1, np.float32),
            "half": np.array(0.5, np.float32),
        },
    )
    folded = fold(source)
    assert not [kind for kind in models.operators(folded) if "." in kind]
    assert [item.domain for item in folded.opset_import] == [""]
    x = weights(2, 3, 32)
    want = models.run(source, {"x": x})[0]
    np.testing.assert_allclose(models.run(folded, {"x": x})[0], want, atol=1e-5)


def test_constants_are_computed() -> None:
    source = models.model(
        [
            node("Shape", ["w"], ["s"]),
            node("ConstantOfShape", ["s"], ["v"],
                 value=numpy_helper.from_array(np.array([2], np.float32))),
            node("Mul", ["w", "v"], ["w2"]),
            node("Cast", ["w2"], ["w3"], to=TensorProto.FLOAT),
            node("MatMul", ["x", "w3"], ["y"]),
        ],
        {"x": (FLOAT, ["batch", 32])},
        {"y": (FLOAT, ["batch", 40])},
        {"w": weights(32, 40)},
    )  # fmt: skip
    folded = fold(source)
    assert models.operators(folded) == ["MatMul"]
    (weight,) = folded.graph.initializer
    np.testing.assert_array_equal(numpy_helper.to_array(weight), 2 * weights(32, 40))


def test_metadata_and_domains_in_use_stay() -> None:
    source = models.model(
        [
            node("MatMul", ["x", "w"], ["p"]),
            node("Binarizer", ["p"], ["y"], domain="ai.onnx.ml", threshold=0.5),
        ],
        {"x": (FLOAT, ["batch", 32])},
        {"y": (FLOAT, ["batch", 40])},
        {"w": weights(32, 40)},
        domains=[("ai.onnx.ml", 1)],
    )
    helper.set_model_props(source, {"author": "me"})
    folded = fold(source)
    assert folded.metadata_props == source.metadata_props
    assert {item.domain: item.version for item in folded.opset_import}.keys() == {"", "ai.onnx.ml"}


def test_undeclared_output_shapes_are_filled_in() -> None:
    source = models.model(
        [node("MatMul", ["x", "w"], ["y"])],
        {"x": (FLOAT, ["batch", 32])},
        {"y": (FLOAT, None)},
        {"w": weights(32, 40)},
    )
    (output,) = fold(source).graph.output
    dims = output.type.tensor_type.shape.dim
    assert [dim.dim_param or dim.dim_value for dim in dims] == ["batch", 40]


@pytest.mark.parametrize(
    "nodes, reason",
    [
        ([node("Mystery", ["x"], ["y"])], "Mystery"),
        ([node("Mystery", ["x"], ["y"], domain="acme")], "acme"),
        ([node("MatMul", ["x", "nothing"], ["y"])], "nothing"),
    ],
)
def test_model_that_ort_refuses(nodes: list[onnx.NodeProto], reason: str) -> None:
    source = models.model(nodes, {"x": (FLOAT, [4])}, {"y": (FLOAT, None)}, domains=[("acme", 1)])
    with pytest.raises(UnsupportedModelError, match=reason) as caught:
        fold(source)
    message = str(caught.value)
    assert "\n" not in message
    assert "onnxruntime_src" not in message
    assert "bapq-fold" not in message


def test_no_temporary_space(monkeypatch: pytest.MonkeyPatch) -> None:
    source = models.model(
        [node("Gather", ["w", "i"], ["y"])],
        {"i": (INT64, [4])},
        {"y": (FLOAT, None)},
        {"w": weights(32, 40)},
    )
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100))
    with pytest.raises(StorageError, match=r"needs 10240 bytes .* has 100; .* TMPDIR"):
        fold(source)
