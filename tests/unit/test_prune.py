"""Static pruning: what becomes zero, what is told of it, and that calibration sees it."""

from __future__ import annotations

import json

import numpy as np
import pytest
from onnx import GraphProto, NodeProto, helper, numpy_helper

from bapq_edge import Session
from bapq_edge.bank.layout import LEVELS
from bapq_edge.bank.reader import Bank
from bapq_edge.cli import main
from bapq_tools import build_bank
from bapq_tools.onnx_graph.fold import fold
from bapq_tools.onnx_graph.ir import HeavyLayer, LayerUse
from bapq_tools.onnx_graph.layers import find_layers
from bapq_tools.quantize.layer_tasks import quantize_layer
from bapq_tools.quantize.options import LayerOptions
from bapq_tools.quantize.prune import prune, prune_layers
from support import onnx_models as models
from support.onnx_models import FLOAT, weights

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
    step = np.repeat(codes.scales[2], 96, axis=1)[:, :256]
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
    report = build_bank(
        model, tmp_path / "a.bank", calibration=x, levels=LEVELS, progress=False, prune_tau=0.01
    )
    assert (report.pruned_rows, report.dropped_rows) == (1, 0)  # no tile is saved
    for level in LEVELS:
        with Session(tmp_path / "a.bank", level=level) as session:
            np.testing.assert_array_equal(session.run(None, x)[0][:, 7], np.full(30, b[7]))


def test_rows_that_pruning_empties_are_not_stored(tmp_path):
    """The answers are those of a bank that stores the zeros, bit by bit."""
    kernels, v, w = weights(48, 4, 3, 3), weights(48, 90), weights(90, 40)
    b, c = weights(90), weights(48)
    small_channels, small_rows = np.arange(0, 48, 2), np.arange(50, 85)
    kernels[small_channels] *= 1e-3
    v[:, small_rows] *= 1e-3
    nodes = [
        node("Conv", ["x", "k", "c"], ["channels"], "conv", pads=[1, 1, 1, 1]),
        node("ReduceMean", ["channels"], ["m"], axes=[2, 3], keepdims=0),
        node("Gemm", ["m", "v", "b"], ["hidden"], "fc"),
        node("MatMul", ["hidden", "w"], ["y"], "out"),
    ]
    outputs = {"channels": ["n", 48, "h", "w"], "hidden": ["n", 90], "y": ["n", 40]}

    def model(kernels, v):
        return models.model(
            nodes,
            {"x": (FLOAT, ["n", 4, 6, 6])},
            {name: (FLOAT, shape) for name, shape in outputs.items()},
            {"k": kernels, "c": c, "v": v, "b": b, "w": w},
        )

    def pruned(w):
        return np.where(np.abs(w) < 0.01 * np.abs(w).max(), np.copysign(np.float32(0), w), w)

    x = {"x": weights(20, 4, 6, 6)}
    recipe = {
        "layers": {
            "conv": {"prune_tau": 0.01},
            "fc": {"prune_tau": 0.01, "levels": [32, 4]},
        }
    }
    by_hand = model(pruned(kernels), pruned(v))
    report = build_bank(
        model(kernels, v),
        tmp_path / "a.bank",
        calibration=x,
        levels=LEVELS,
        workers=1,
        progress=False,
        recipe=recipe,
    )
    recipe["layers"] = {"fc": {"levels": [32, 4]}}
    whole = build_bank(
        by_hand,
        tmp_path / "b.bank",
        calibration=x,
        levels=LEVELS,
        workers=1,
        progress=False,
        recipe=recipe,
    )
    assert (report.pruned_rows, report.dropped_rows, whole.dropped_rows) == (59, 59, 0)
    bank = Bank.open(tmp_path / "a.bank")
    assert [layer.stored_rows for layer in bank.manifest.layers] == [24, 55, 40]
    sizes = [
        sum(file.stat().st_size for file in (tmp_path / name).rglob("*") if file.is_file())
        for name in ("a.bank", "b.bank")
    ]
    assert sizes[0] < sizes[1]
    for level in LEVELS:
        with Session(tmp_path / "a.bank", level=level) as session:
            found = dict(zip(outputs, session.run(list(outputs), x), strict=True))
        with Session(tmp_path / "b.bank", level=level) as session:
            expected = dict(zip(outputs, session.run(list(outputs), x), strict=True))
        for name in outputs:
            np.testing.assert_array_equal(found[name], expected[name], f"{name} at {level}")
        biases = c[small_channels, None, None] + np.zeros((20, 1, 6, 6), np.float32)
        np.testing.assert_array_equal(found["channels"][:, small_channels], biases)
        np.testing.assert_array_equal(
            found["hidden"][:, small_rows], np.tile(b[small_rows], (20, 1))
        )
        if level == 32:
            for value, reference in zip(found.values(), models.run(by_hand, x), strict=True):
                np.testing.assert_allclose(value, reference, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("operator", "zero_rows", "levels", "stored"),
    [
        ("MatMul", 20, LEVELS, 28),
        ("MatMul", 15, LEVELS, 48),  # no tile is saved
        ("MatMul", 20, (1,), 48),  # the tables take more bytes than the tile
        ("MatMul", 48, LEVELS, 1),
        ("Gather", 20, LEVELS, 48),  # rows are found by their number
    ],
)
def test_rows_are_stored_where_they_must_or_cost_nothing(
    tmp_path, operator, zero_rows, levels, stored
):
    table = weights(48, 32)
    table[:zero_rows] = 0
    x = {"x": weights(30, 32)} if operator == "MatMul" else {"x": np.arange(48)}
    inputs, w = (["x", "w"], table.T) if operator == "MatMul" else (["w", "x"], table)
    source = models.model(
        [node(operator, inputs, ["y"], "layer")],
        {"x": (FLOAT, ["n", 32]) if operator == "MatMul" else (models.INT64, ["n"])},
        {"y": (FLOAT, None)},
        {"w": w},
    )
    out = tmp_path / "a.bank"
    report = build_bank(
        source, out, calibration=x, levels=levels, workers=1, progress=False, prune_tau=1e-6
    )
    assert (report.pruned_rows, report.dropped_rows) == (zero_rows, 48 - stored)
    assert Bank.open(out).manifest.layers[0].stored_rows == stored
    with Session(out) as session:
        y = session.run(None, x)[0]
    y = y.T if operator == "MatMul" else y
    assert np.abs(y[:zero_rows]).max() < 1e-30 and y[zero_rows:].all()


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
    report = build_bank(
        model(kernels, v),
        out,
        calibration=x,
        levels=LEVELS,
        workers=1,
        progress=False,
        recipe=recipe,
        prune_tau=0.1,
    )
    by_hand = model(pruned(kernels, 0.1), pruned(v, 0.3))
    with Session(out, level=32) as session:
        np.testing.assert_allclose(session.run(None, x)[0], models.run(by_hand, x)[0], rtol=1e-4)
    left = {
        name: np.count_nonzero(pruned(w, tau))
        for name, w, tau in (("conv", kernels, 0.1), ("fc", v, 0.3))
    }
    assert report.remaining_ratio == {"conv": left["conv"] / 1440, "fc": left["fc"] / 1920}
    assert report.remaining_ratio_in_all == pytest.approx(sum(left.values()) / 3360)
    again = build_bank(
        by_hand, tmp_path / "b.bank", calibration=x, levels=LEVELS, workers=1, progress=False
    )
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
        f"weights left by pruning: {ratio:.3f} of all, 0 rows are zero, 0 of them not stored; "
        f"per layer: fc {ratio:.3f}"
    )
    assert line in printed.out.splitlines()
    assert main([*command, "--quiet", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["remaining_ratio"] == {"fc": pytest.approx(ratio)}
