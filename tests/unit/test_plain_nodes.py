"""Nodes that operators of ours compute although they read no layer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

from bapq_tools.onnx_graph.assemble import assemble, drop_replaced
from bapq_tools.onnx_graph.fold import fold
from bapq_tools.onnx_graph.importers.onnx_file import load_model
from bapq_tools.onnx_graph.layers import find_layers
from support import onnx_models as models
from support.onnx_models import FLOAT, weights

node = helper.make_node


def check(source: onnx.ModelProto, feeds: dict[str, np.ndarray], folder: Path) -> list[str]:
    """What is assembled computes what the source does, and is the same once weights are dropped."""
    path = folder / "model.onnx"
    path.write_bytes(source.SerializeToString())
    folded = fold(load_model(path))
    plan = find_layers(folded)
    assembled = assemble(folded, plan)
    expected = models.run(source, feeds)
    found = models.run(models.standard_model(assembled, plan), feeds)
    for want, have in zip(expected, found, strict=True):
        np.testing.assert_allclose(have, want, rtol=0, atol=2e-5)
    assert assemble(drop_replaced(folded, plan), plan) == assembled
    return models.operators(assembled)


def test_pools_and_normalizations_become_operators(tmp_path: Path) -> None:
    kernel = weights(16, 8, 3, 3)
    source = models.model(
        [
            node("Conv", ["x", "w"], ["c"], kernel_shape=[3, 3]),
            node("MaxPool", ["c"], ["p"], kernel_shape=[3, 2], strides=[2, 1], pads=[1, 0, 0, 1]),
            node("MaxPool", ["p"], ["q"], kernel_shape=[2, 2], auto_pad="SAME_LOWER"),
            node("MaxPool", ["q"], ["r"], kernel_shape=[2, 2], strides=[2, 2], ceil_mode=1),
            node("LayerNormalization", ["r", "scale", "bias"], ["n"], axis=-1, epsilon=1e-3),
            node("LayerNormalization", ["n", "scale"], ["m"]),
            node("LayerNormalization", ["m", "two", "two"], ["y"], axis=2),
        ],
        {"x": (FLOAT, ["batch", 8, 12, 12])},
        {"y": (FLOAT, None)},
        {"w": kernel, "scale": weights(5), "bias": weights(5, seed=1), "two": weights(3, 5)},
        opset=17,
    )
    assert check(source, {"x": weights(2, 8, 12, 12)}, tmp_path) == [
        "bapq.Conv", "bapq.MaxPool", "bapq.MaxPool", "MaxPool",
        "bapq.LayerNormalization", "bapq.LayerNormalization", "LayerNormalization",
    ]  # fmt: skip


def test_pools_of_other_types_stay(tmp_path: Path) -> None:
    window = {"kernel_shape": [2, 2]}
    source = models.model(
        [
            node("MaxPool", ["x"], ["a"], **window),
            node("Cast", ["x"], ["d"], to=TensorProto.DOUBLE),
            node("MaxPool", ["d"], ["b"], **window),
            node("MaxPool", ["x"], ["c", "at"], **window),
            node("MatMul", ["c", "w"], ["y"]),
        ],
        {"x": (FLOAT, [1, 2, 33, 33])},
        {"y": (FLOAT, None), "a": (FLOAT, None), "b": (TensorProto.DOUBLE, None)},
        {"w": weights(32, 40)},
    )
    found = check(source, {"x": weights(1, 2, 33, 33)}, tmp_path)
    assert (found.count("bapq.MaxPool"), found.count("MaxPool")) == (1, 2)
