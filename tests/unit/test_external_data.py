"""Weights in files beside the model: read where they may lie, refused elsewhere."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from bapq_edge.errors import ModelFormatError
from bapq_tools.onnx_graph.importers.onnx_file import load_model
from support import onnx_models as models
from support.onnx_models import FLOAT, weights

node = helper.make_node


def linear(opset: int = 13) -> onnx.ModelProto:
    return models.model(
        [node("MatMul", ["x", "w"], ["p"]), node("Add", ["p", "b"], ["y"])],
        {"x": (FLOAT, ["batch", 32])},
        {"y": (FLOAT, ["batch", 40])},
        {"w": weights(32, 40), "b": weights(40)},
        opset=opset,
    )


def save_external(source: onnx.ModelProto, folder: Path) -> Path:
    path = folder / "model.onnx"
    onnx.save_model(
        source, path, save_as_external_data=True, location="weights.bin", size_threshold=0
    )
    return path


def refuse(path: Path, match: str, error: type[Exception] = ModelFormatError) -> None:
    with pytest.raises(error, match=match) as caught:
        load_model(path)
    assert "\n" not in str(caught.value)


def test_external_data_is_read(tmp_path: Path) -> None:
    loaded = load_model(save_external(linear(), tmp_path))
    np.testing.assert_array_equal(
        numpy_helper.to_array(loaded.graph.initializer[0]), weights(32, 40)
    )


def test_missing_external_data_is_named(tmp_path: Path) -> None:
    path = save_external(linear(), tmp_path)
    (tmp_path / "weights.bin").unlink()
    refuse(path, "weights.bin is missing: it holds the data of tensor 'w'")


def test_truncated_external_data(tmp_path: Path) -> None:
    path = save_external(linear(), tmp_path)
    with open(tmp_path / "weights.bin", "r+b") as file:
        file.truncate(100)
    refuse(path, "weights.bin is truncated.* the file has 100")


@pytest.mark.parametrize("key, value", [("offset", "-1"), ("length", "8"), ("offset", "x")])
def test_external_data_that_does_not_fit(key: str, value: str, tmp_path: Path) -> None:
    path = save_external(linear(), tmp_path)
    model = onnx.load_model(path, load_external_data=False)
    for entry in model.graph.initializer[0].external_data:
        if entry.key == key:
            entry.value = value
    path.write_bytes(model.SerializeToString())
    refuse(path, "needs 5120 bytes")


@pytest.mark.parametrize("location", ["../secret.bin", "{root}/secret.bin", "link.bin", ""])
def test_external_data_stays_in_the_models_folder(location: str, tmp_path: Path) -> None:
    (tmp_path / "secret.bin").write_bytes(bytes(10_000))
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "link.bin").symlink_to(tmp_path / "secret.bin")
    path = save_external(linear(), folder)
    model = onnx.load_model(path, load_external_data=False)
    for entry in model.graph.initializer[0].external_data:
        if entry.key == "location":
            entry.value = location.format(root=tmp_path)
    path.write_bytes(model.SerializeToString())
    refuse(path, "outside of the model's folder.*--external-data")
    if location:
        loaded = load_model(path, external_data=tmp_path)
        assert loaded.graph.initializer[0].raw_data == bytes(5120)


def test_names_in_the_models_folder_may_be_links_into_a_cache(tmp_path: Path) -> None:
    """As the Hugging Face cache keeps files: names in a snapshot, contents under their digest."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "1" / "onnx"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    path = save_external(linear(), snapshot)
    for digest, file in enumerate((path, snapshot / "weights.bin")):
        file.rename(blobs / str(digest))
        file.symlink_to(Path("../../../blobs") / str(digest))
    loaded = load_model(path)
    np.testing.assert_array_equal(
        numpy_helper.to_array(loaded.graph.initializer[0]), weights(32, 40)
    )
