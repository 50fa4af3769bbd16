"""Static pruning: what becomes zero, what is told of it, and that calibration sees it."""

from __future__ import annotations

import json

import numpy as np
import pytest
from onnx import GraphProto, NodeProto, helper, numpy_helper
from unit import models
from unit.models import FLOAT, weights

from bapq_edge import Session
from bapq_edge.bank.layout import LEVELS
from bapq_edge.bank.reader import Bank
from bapq_edge.cli import main
from bapq_tools.build import build
from bapq_tools.passes.fold import fold
from bapq_tools.passes.ir import HeavyLayer, LayerOptions, LayerUse
from bapq_tools.passes.layers import find_layers
from bapq_tools.passes.prune import prune, prune_layers
from bapq_tools.passes.quantize import quantize_layer

node = helper.make_node


def layer(weight, bias=None):
    use = LayerUse(NodeProto(), (), "MatMul", "x", "y", GraphProto(), False)
    return HeavyLayer("layer", np.asarray(weight, np.float32), bias, (use,), ())


def test_small_weights_beside_the_largest_become_zero():
    w = layer([[4, -0.3, 0.5, 0.4], [-0.2, 0.1, 0, -0.39], [1, 1, 1, -1]])
    report = prune(w, 0.1)
    expected = [[4, 0, 0.5, np.float32(0.4)], [0, 0, 0, 0], [1, 1, 1, -1]]
    np.testing.assert_array_equal(w.weight, expected)
    assert (report.weights, report.remaining) == (12, 7)
    assert report.remaining_ratio == 7 / 12
    np.testing.assert_array_equal(report.zero_rows, [False, True, False])


def test_a_zero_keeps_its_sign_and_so_its_low_code():
    """All zeros as one code would be an error that adds up: half a step times the inputs' sum."""
    w, x = weights(32, 256), np.abs(weights(200, 256))
    pruned = layer(w.copy())
    prune(pruned, 0.2)
    codes = quantize_layer(pruned, None, LayerOptions(LEVELS)).codes
    np.testing.assert_array_equal(codes.codes["s1"], w >= 0)
    zero = pruned.weight == 0
    assert 0.3 < zero.mean() < 0.7
    step = np.repeat(codes.scales[2], 64, axis=1)
    error = np.where(zero, (codes.codes["s1"] - np.float32(0.5)) * step, 0)
    grown = np.abs(x @ error.T).mean() / np.abs(x @ np.abs(error).T).mean()
    assert grown < 0.2


def test_a_zero_row_gives_its_bias_at_every_level(tmp_path):
    w, b = weights(64, 48), weights(48)
    w[:, 7] *= 1e-3
    model = models.model(
        [node("Gemm", ["x", "w", "b"], ["y"], "fc")],
        {"x": (FLOAT, ["n", 64])},
        {"y": (FLOAT, ["n", 48])},
        {"w": w, "b": b},
    )
    x = {"x": weights(30, 64)}
    report = build(model, tmp_path / "a.bank", x, LEVELS, progress=False, prune_tau=0.01)
    assert report.pruned_rows == 1
    for level in LEVELS:
        with Session(tmp_path / "a.bank", level=level) as session:
            np.testing.assert_array_equal(session.run(None, x)[0][:, 7], np.full(30, b[7]))


def test_a_recipe_prunes_one_layer_and_the_model_stays_as_it_is():
    """Another node computes with the weights too, unpruned."""
    nodes = [
        node("MatMul", ["x", "w"], ["h"], "first"),
        node("MatMul", ["h", "v"], ["p"], "second"),
        node("Mul", ["p", "v"], ["y"]),
    ]
    constants = {"w": weights(32, 40), "v": weights(40, 40)}
    x, y = {"x": (FLOAT, [40, 32])}, {"y": (FLOAT, [40, 40])}
    folded = fold(models.model(nodes, x, y, constants))
    plan = find_layers(folded)
    options = {"first": LayerOptions((8,)), "second": LayerOptions((8,), {}, 0.2)}
    reports = prune_layers(plan, options)
    assert set(reports) == {"second"}
    v = constants["v"]
    expected = np.where(np.abs(v) < 0.2 * np.abs(v).max(), 0, v)
    np.testing.assert_array_equal(plan.layers[0].weight, constants["w"].T)
    np.testing.assert_array_equal(plan.layers[1].weight, expected.T)
    after = {t.name: numpy_helper.to_array(t) for t in folded.graph.initializer}
    np.testing.assert_array_equal(after["v"], v)


def test_the_answers_are_those_of_the_pruned_model(tmp_path):
    """A convolution and a product, one of them by its recipe only."""
    kernels, v = weights(40, 4, 3, 3), weights(40, 48)
    nodes = [
        node("Conv", ["x", "w"], ["h"], "conv", pads=[1, 1, 1, 1]),
        node("Relu", ["h"], ["r"]),
        node("ReduceMean", ["r"], ["m"], axes=[2, 3], keepdims=0),
        node("MatMul", ["m", "v"], ["y"], "fc"),
    ]

    def model(w, v):
        borders = {"x": (FLOAT, ["n", 4, 6, 6])}, {"y": (FLOAT, ["n", 48])}
        return models.model(nodes, *borders, {"w": w, "v": v})

    def pruned(w, tau):
        zero = np.copysign(np.float32(0), w)
        return np.where(np.abs(w) < np.float32(tau) * np.abs(w).max(), zero, w)

    x = {"x": weights(10, 4, 6, 6)}
    recipe = {"layers": {"fc": {"prune_tau": 0.3}}}
    out = tmp_path / "a.bank"
    report = build(model(kernels, v), out, x, LEVELS, 1, False, recipe, 0.1)
    by_hand = model(pruned(kernels, 0.1), pruned(v, 0.3))
    with Session(out, level=32) as session:
        np.testing.assert_allclose(session.run(None, x)[0], models.run(by_hand, x)[0], rtol=1e-4)
    left = {
        name: np.count_nonzero(pruned(w, tau))
        for name, w, tau in (("conv", kernels, 0.1), ("fc", v, 0.3))
    }
    assert report.remaining_ratio == {"conv": left["conv"] / 1440, "fc": left["fc"] / 1920}
    assert report.remaining_ratio_in_all == pytest.approx(sum(left.values()) / 3360)
    again = build(by_hand, tmp_path / "b.bank", x, LEVELS, 1, False)
    assert again.remaining_ratio == {} and again.remaining_ratio_in_all == 1
    layers = Bank.open(out).manifest.layers, Bank.open(tmp_path / "b.bank").manifest.layers
    for one, two in zip(*layers, strict=True):
        assert one.relative_error[8] == pytest.approx(two.relative_error[8])


def test_command_reports_what_is_left(tmp_path, capsys):
    model = models.model(
        [node("MatMul", ["x", "w"], ["y"], "fc")],
        {"x": (FLOAT, ["n", 32])},
        {"y": (FLOAT, ["n", 64])},
        {"w": weights(32, 64)},
    )
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    np.savez(tmp_path / "x.npz", x=weights(20, 32))
    command = ["build", str(tmp_path / "m.onnx"), "--calibration", str(tmp_path / "x.npz")]
    command += ["-o", str(tmp_path / "a.bank"), "--prune-tau", "0.1"]
    assert main(command) == 0
    printed = capsys.readouterr()
    w = np.abs(weights(32, 64))
    ratio = np.mean(w >= np.float32(0.1) * w.max())
    line = (
        f"weights left by pruning: {ratio:.3f} of all, 0 rows are zero; per layer: fc {ratio:.3f}"
    )
    assert line in printed.out.splitlines()
    assert main([*command, "--quiet", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["remaining_ratio"] == {"fc": pytest.approx(ratio)}
