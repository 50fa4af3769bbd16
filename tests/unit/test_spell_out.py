"""Products in unusual forms become layers, and give the same numbers."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import helper

import bapq_edge
from bapq_edge.bank.reader import Bank
from bapq_tools import build_bank
from support import onnx_models as models
from support.onnx_models import FLOAT, weights

node = helper.make_node
MICROSOFT = "com.microsoft"

W, X = weights(32, 48), weights(5, 32)
TURNED = np.ascontiguousarray(W.T)
IMAGE, KERNEL = weights(2, 16, 7, 6), weights(8, 16, 3, 3)


def fused(op_type, inputs, **attributes):
    return node(op_type, inputs, ["y"], "layer", domain=MICROSOFT, **attributes)


CASES = {
    "gemm_of_turned": (
        node("Gemm", ["x", "w", "b"], ["y"], "layer", transA=1, alpha=0.5),
        {"x": np.ascontiguousarray(X.T)},
        {"w": W, "b": weights(48)},
    ),
    "constant_on_the_left": (
        node("MatMul", ["w", "x"], ["y"], "layer"),
        {"x": weights(3, 32, 7)},
        {"w": TURNED},
    ),
    "constant_before_a_vector": (
        node("MatMul", ["w", "x"], ["y"], "layer"),
        {"x": weights(32)},
        {"w": TURNED},
    ),
    "fused_matmul": (
        fused("FusedMatMul", ["x", "w"], transA=1, transB=1, alpha=0.125),
        {"x": weights(2, 32, 5)},
        {"w": TURNED},
    ),
    "fused_gemm": (
        fused("FusedGemm", ["x", "w", "b"], transB=1, activation="LeakyRelu", activation_alpha=0.3),
        {"x": X},
        {"w": TURNED, "b": weights(48)},
    ),
    "fused_conv": (
        fused("FusedConv", ["x", "w", "b"], activation="Relu", pads=[1, 1, 1, 1]),
        {"x": IMAGE},
        {"w": KERNEL, "b": weights(8)},
    ),
    "fused_conv_with_sum": (
        fused(
            "FusedConv",
            ["x", "w", "b", "z"],
            activation="Clip",
            activation_params=[-5.0, 20.0],
            pads=[1, 1, 1, 1],
        ),
        {"x": IMAGE, "z": weights(2, 8, 7, 6)},
        {"w": KERNEL, "b": weights(8)},
    ),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore::bapq_edge.errors.UncalibratedWarning")
def test_products_in_other_forms_become_layers(name, tmp_path):
    product, feeds, constants = CASES[name]
    inputs = {key: (FLOAT, [None] * array.ndim) for key, array in feeds.items()}
    domains = [(MICROSOFT, 1)] if product.domain else []
    model = models.model([product], inputs, {"y": (FLOAT, None)}, constants, domains=domains)
    (wanted,) = models.run(model, feeds)
    bank = build_bank(model, tmp_path / "m.bank", levels=[32, 8], workers=1, progress=False)
    assert [layer.name for layer in Bank.open(bank).manifest.layers] == ["layer"]
    assert bank.kept_in_float == 0
    with bapq_edge.Session(bank, level=32) as session:
        (y,) = session.run(None, feeds)
        np.testing.assert_allclose(y, wanted, rtol=1e-4, atol=1e-4)
        session.set_level(8)
        assert np.linalg.norm(session.run(None, feeds)[0] - wanted) < 0.02 * np.linalg.norm(wanted)


@pytest.mark.parametrize("batch", [4, 1])
@pytest.mark.filterwarnings("ignore::bapq_edge.errors.UncalibratedWarning")
def test_a_stack_of_matrices_becomes_a_layer_each(batch, tmp_path):
    model = models.model(
        [node("MatMul", ["x", "w"], ["y"], "experts")],
        {"x": (FLOAT, [batch, "tokens", 32])},
        {"y": (FLOAT, None)},
        {"w": weights(4, 32, 48)},
    )
    feeds = {"x": weights(batch, 5, 32)}
    (wanted,) = models.run(model, feeds)
    bank = build_bank(model, tmp_path / "m.bank", levels=[32, 8], workers=1, progress=False)
    assert [layer.name for layer in Bank.open(bank).manifest.layers] == [
        f"experts_{number}" for number in range(4)
    ]
    with bapq_edge.Session(bank, level=32) as session:
        np.testing.assert_allclose(session.run(None, feeds)[0], wanted, rtol=1e-4, atol=1e-4)


def test_what_is_too_small_or_of_unknown_rank_stays(tmp_path):
    small = models.model(
        [node("MatMul", ["v", "x"], ["y"]), node("MatMul", ["x", "w"], ["z"], "layer")],
        {"x": (FLOAT, [None, 32])},
        {"y": (FLOAT, None), "z": (FLOAT, None)},
        {"v": weights(4, 4), "w": W},
    )
    bank = build_bank(
        small, tmp_path / "m.bank", calibration={"x": weights(8, 4, 32)}, progress=False, levels=[8]
    )
    feeds = {"x": weights(4, 32)}
    with bapq_edge.Session(bank, level=8) as session:
        np.testing.assert_array_equal(session.run(["y"], feeds)[0], models.run(small, feeds)[0])
