"""Tables and weights that quantization cannot carry stay in float, with the reason."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import helper, numpy_helper

import bapq_edge
from bapq_edge.bank.reader import Bank
from bapq_edge.errors import NoHeavyLayerError, UncalibratedWarning
from bapq_tools import build_bank
from support import onnx_models as models
from support.onnx_models import FLOAT, INT64, weights

node = helper.make_node
LOWEST = float(np.finfo(np.float32).min)

pytestmark = pytest.mark.filterwarnings(
    f"ignore::{UncalibratedWarning.__module__}.UncalibratedWarning"
)


def kept(bank):
    return {entry.name: entry.reason for entry in Bank.open(bank).manifest.kept_in_float}


def built(model, tmp_path, **options):
    return build_bank(model, tmp_path / "m.bank", workers=1, progress=False, **options).bank


def masked(table):
    """Scores of a product, and a mask that is looked up by position, through a Softmax."""
    return models.model(
        [
            node("MatMul", ["x", "w"], ["scores"], "product"),
            node("Gather", ["table", "position"], ["mask"], "mask"),
            node("Add", ["scores", "mask"], ["masked"]),
            node("Softmax", ["masked"], ["y"], axis=-1),
        ],
        {"x": (FLOAT, ["n", 32]), "position": (INT64, ["n"])},
        {"y": (FLOAT, None)},
        {"w": weights(32, 48) * np.float32(0.1), "table": table},
    )


def causal(value):
    return np.triu(np.full((48, 48), value, np.float32), 1)


@pytest.mark.parametrize("value", [LOWEST, -1e9, -1e4, -100])
def test_a_mask_stays_in_float(value, tmp_path):
    model = masked(causal(value))
    feeds = {"x": weights(20, 32), "position": np.arange(20)}
    bank = built(model, tmp_path)
    assert list(kept(bank)) == ["mask"]
    assert "mask" in kept(bank)["mask"]
    (wanted,) = models.run(model, feeds)
    with bapq_edge.Session(bank, level=8) as session:
        assert np.abs(session.run(None, feeds)[0] - wanted).max() < 0.02


def test_an_embedding_becomes_a_layer_whatever_its_scale(tmp_path):
    for scale in (1e-3, 1, 300):
        table = weights(48, 48) * np.float32(scale)
        table[0] = 0  # that of padding
        assert kept(built(masked(table), tmp_path)) == {}


def product(weight):
    nodes = [
        node("MatMul", ["x", "v"], ["h"], "first"),
        node("MatMul", ["h", "w"], ["y"], "product"),
    ]
    shapes = {"x": (FLOAT, ["n", 32])}, {"y": (FLOAT, None)}
    return models.model(nodes, *shapes, {"v": weights(32, 64), "w": weight})


def test_weights_that_an_outlier_would_drown_stay_in_float(tmp_path):
    weight = weights(64, 48)
    weight[5, 3] = 1e6
    bank = built(product(weight), tmp_path)
    reason = kept(bank)["product"]
    assert "row 3 holds 1e+06 beside weights of 0." in reason
    assert "8 bits" in reason
    assert kept(built(product(weight), tmp_path, levels=[32])) == {}


def test_rows_of_other_size_are_carried(tmp_path):
    """A large row has scales of its own, and outliers of a row that does nothing harm nobody."""
    weight = weights(64, 48)
    weight[:, 7] *= np.float32(1e6)
    weight[:, 9] *= np.float32(1e-12)
    weight[5, 9] = 1e-3
    assert kept(built(product(weight), tmp_path)) == {}


@pytest.mark.parametrize(
    ("weight", "activation"), [(1, 1e20), (1, 1e30), (1e20, 1), (1e30, 1), (1e14, 1e20), (1, 1e-30)]
)
def test_huge_weights_and_activations_are_calibrated_as_others(weight, activation, tmp_path):
    def errors(weight, activation):
        constants = {"v": weights(32, 64) * np.float32(weight), "w": weights(64, 48)}
        model = product(constants["w"])
        model.graph.initializer[0].CopyFrom(numpy_helper.from_array(constants["v"], "v"))
        x = weights(60, 32) * np.float32(activation)
        report = build_bank(
            model, tmp_path / "m.bank", calibration={"x": x}, workers=1, progress=False
        )
        return report.relative_error

    expected = errors(1, 1)
    for level, error in errors(weight, activation).items():
        assert error == pytest.approx(expected[level], rel=0.2)


def test_a_model_of_nothing_else_is_told_why(tmp_path):
    model = models.model(
        [node("Gather", ["table", "position"], ["y"], "mask")],
        {"position": (INT64, ["n"])},
        {"y": (FLOAT, None)},
        {"table": causal(LOWEST)},
    )
    with pytest.raises(NoHeavyLayerError, match=r"Gather 'mask'.*up to -3\.4e\+38 is a mask"):
        built(model, tmp_path)
