"""What calibration sees of every layer's input, pass by pass."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import TensorProto, helper

from bapq_edge.errors import CalibrationError
from bapq_tools.build_support.spill import Spill
from bapq_tools.calibration import forward_passes, input_statistics
from bapq_tools.calibration.forward_passes import FLOAT as FLOAT_PASS
from bapq_tools.calibration.forward_passes import ForwardPasses
from bapq_tools.calibration.input_statistics import InputStatistics
from bapq_tools.calibration.reference_model import Reference, weight_feeds
from bapq_tools.calibration.samples import load_calibration
from bapq_tools.onnx_graph.layers import find_layers
from support import onnx_models as models
from support.onnx_models import FLOAT, INT64, weights

node = helper.make_node


@pytest.fixture(autouse=True)
def all_samples_are_fitted_to(monkeypatch):
    monkeypatch.setattr(input_statistics, "HELD_OUT", 1000)


def stats_of(model, feeds, tmp_path, workers=1, change=lambda level, layer: 1.0):
    """Statistics by layer; `change` scales the weights in the pass of a level."""
    plan = find_layers(model)
    data = load_calibration(feeds, model.graph.input)

    def source(level, layer):
        factor = 1 if level == FLOAT_PASS else change(level, layer.name)
        return weight_feeds(layer, layer.weight * np.float32(factor), layer.bias)

    reference = Reference(model, plan)
    passes = ForwardPasses(reference, data, (4, 2), source, workers, tmp_path)
    found = {}
    for stage in reference.stages():
        passes.run(stage)
        statistics = InputStatistics(passes, Spill(tmp_path))
        for layer in stage.layers:
            gathered = any(use.operator == "Gather" for use in layer.uses)
            if layer.name in stage.observations and not gathered:
                found |= statistics.of([layer])
            elif gathered:
                found[layer.name] = statistics.gather_counts(layer)
    return found


def assert_statistics(stats, columns):
    """columns: (groups, rows, columns) of the activations that the layer multiplied."""
    columns = columns.astype(np.float64)
    assert len(stats) == len(columns)
    for found, x in zip(stats, columns, strict=True):
        np.testing.assert_allclose(found.mean, x.mean(0), rtol=1e-4, atol=1e-5)
        x = x - x.mean(0)
        gram = x.T @ x / len(x)
        for level in (4, 2):
            np.testing.assert_allclose(
                found.levels[level].grams[0], gram, rtol=1e-3, atol=1e-4 * np.abs(gram).max()
            )


def two_products():
    nodes = [node("MatMul", ["x", "w"], ["h"], "first"), node("Relu", ["h"], ["r"])]
    nodes.append(node("MatMul", ["r", "v"], ["y"], "second"))
    constants = {"w": weights(32, 64), "v": weights(64, 32)}
    shapes = {"x": (FLOAT, ["n", "t", 32])}, {"y": (FLOAT, None)}
    return models.model(nodes, *shapes, constants), constants


def test_products_see_graph_inputs_and_what_is_inside(tmp_path):
    model, constants = two_products()
    x = weights(7, 5, 32)
    stats = stats_of(model, {"x": x}, tmp_path)
    assert_statistics(stats["first"], x.reshape(1, -1, 32))
    assert_statistics(stats["second"], np.maximum(x @ constants["w"], 0).reshape(1, -1, 64))


def test_a_pass_sees_what_its_quantized_layers_leave_behind(tmp_path):
    """Level 2's first layer gives twice the output here: its own statistics say so, mostly."""
    model, constants = two_products()
    x = weights(40, 5, 32)
    stats = stats_of(model, {"x": x}, tmp_path, change=lambda level, name: 4 // level)
    (first,), (second,) = stats["first"], stats["second"]
    np.testing.assert_array_equal(first.levels[4].drift, 0)
    h = np.maximum(x @ constants["w"], 0).reshape(-1, 64).astype(np.float64)
    gram = (h - h.mean(0)).T @ (h - h.mean(0)) / len(h)
    share = input_statistics.NEIGHBOUR_SHARE
    for level, factor, other in ((4, 1, 2), (2, 2, 1)):
        mixed = (1 - share) * factor**2 + share * other**2
        np.testing.assert_allclose(second.levels[level].grams[0], mixed * gram, rtol=1e-2, atol=0.1)
        drift = (1 - share) * (1 - factor) * factor + share * (1 - other) * other
        expected = drift * constants["v"].T @ gram
        np.testing.assert_allclose(second.levels[level].drift, expected, rtol=1e-2, atol=0.5)
        mean = (1 - share) * factor + share * other
        np.testing.assert_allclose(second.levels[level].mean, mean * h.mean(0), rtol=1e-4)
    np.testing.assert_allclose(second.mean, h.mean(0), rtol=1e-4)


def test_held_out_samples_are_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(input_statistics, "HELD_OUT", 8)
    model, _ = two_products()
    x = weights(16, 1, 32)
    (first,) = stats_of(model, {"x": x}, tmp_path)["first"]
    fitted = np.delete(x[:, 0], [7, 15], axis=0)
    np.testing.assert_allclose(first.mean, fitted.mean(0), atol=1e-6)
    np.testing.assert_allclose(first.held_out, x[[7, 15], 0] - fitted.mean(0), atol=1e-6)


def test_neither_workers_nor_files_change_the_statistics(tmp_path, monkeypatch):
    model, _ = two_products()
    feeds = {"x": weights(9, 5, 32)}
    once = stats_of(model, feeds, tmp_path)
    monkeypatch.setattr(forward_passes, "_MEMORY_BYTES", 2000)
    for name, (found,) in stats_of(model, feeds, tmp_path, workers=3).items():
        (expected,) = once[name]
        np.testing.assert_array_equal(found.mean, expected.mean)
        np.testing.assert_array_equal(found.levels[4].grams[0], expected.levels[4].grams[0])
    assert list(tmp_path.iterdir())


def test_wide_layers_are_cut_into_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(input_statistics, "_BLOCK_COLUMNS", 400)
    model = models.model(
        [node("MatMul", ["x", "w"], ["y"], "wide")],
        {"x": (FLOAT, ["n", 500])},
        {"y": (FLOAT, None)},
        {"w": weights(500, 32)},
    )
    x = weights(30, 500)
    (found,) = stats_of(model, {"x": x}, tmp_path)["wide"]
    assert [(b.start, b.stop) for b in found.blocks] == [(0, 384), (384, 500)]
    centred = x - x.mean(0)
    for block, gram in zip(found.blocks, found.levels[2].grams, strict=True):
        part = centred[:, block]
        np.testing.assert_allclose(gram, part.T @ part / 30, rtol=1e-3, atol=1e-4)


def im2col(x, kernel, strides, dilations, pads, group):
    """(group, n * outputs, columns) of x (n, c, h, w), in the order (ky, kx, channel)."""
    top, left, bottom, right = pads
    x = np.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right)))
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    rows = []
    for y in range(0, x.shape[2] - reach[0] + 1, strides[0]):
        for z in range(0, x.shape[3] - reach[1] + 1, strides[1]):
            patch = x[:, :, y : y + reach[0] : dilations[0], z : z + reach[1] : dilations[1]]
            split = patch.reshape(len(x), group, -1, *kernel)
            rows.append(split.transpose(1, 0, 3, 4, 2).reshape(group, len(x), -1))
    return np.concatenate(rows, axis=1)


@pytest.mark.parametrize(
    ("kernel", "strides", "dilations", "pads", "group"),
    [
        ((3, 3), (1, 1), (1, 1), (1, 1, 1, 1), 1),
        ((3, 3), (2, 2), (1, 1), (0, 1, 2, 0), 2),
        ((5, 2), (3, 1), (1, 2), (4, 0, 4, 3), 4),
        ((1, 1), (2, 3), (1, 1), (0, 0, 0, 0), 1),
        ((3, 3), (1, 2), (4, 3), (4, 3, 4, 3), 1),
        ((7, 7), (1, 1), (2, 2), (9, 9, 9, 9), 1),  # some positions meet padding alone
    ],
)
def test_convolutions_see_what_an_im2col_would(kernel, strides, dilations, pads, group, tmp_path):
    shape = (64, 16 // group, *kernel)
    top, left, bottom, right = pads
    attributes = {
        "kernel_shape": kernel,
        "strides": strides,
        "dilations": dilations,
        "pads": [top, left, bottom, right],
        "group": group,
    }
    model = models.model(
        [node("Conv", ["x", "w"], ["y"], "conv", **attributes)],
        {"x": (FLOAT, ["n", 16, 7, 9])},
        {"y": (FLOAT, None)},
        {"w": weights(*shape)},
    )
    x = weights(3, 16, 7, 9) + 1
    found = stats_of(model, {"x": x}, tmp_path)["conv"]
    assert_statistics(found, im2col(x, kernel, strides, dilations, pads, group))


@pytest.mark.parametrize("auto_pad", ["SAME_UPPER", "SAME_LOWER", "VALID"])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_automatic_padding(auto_pad, stride, tmp_path):
    w, x = weights(64, 8, 4, 4), weights(2, 8, 9, 10) + 1
    model = models.model(
        [node("Conv", ["x", "w"], ["y"], "conv", auto_pad=auto_pad, strides=[stride] * 2)],
        {"x": (FLOAT, ["n", 8, 9, 10])},
        {"y": (FLOAT, None)},
        {"w": w},
    )
    (found,) = stats_of(model, {"x": x}, tmp_path)["conv"]
    # The mean of the output follows from the mean of the input exactly.
    (y,) = models.run(model, {"x": x})
    matrix = w.transpose(0, 2, 3, 1).reshape(64, -1)
    np.testing.assert_allclose(matrix @ found.mean, y.mean((0, 2, 3)), rtol=1e-3, atol=1e-4)


def test_one_dimensional_convolution(tmp_path):
    w, x = weights(64, 8, 3), weights(4, 8, 11) + 1
    model = models.model(
        [node("Conv", ["x", "w"], ["y"], "conv", pads=[2, 0], strides=[2])],
        {"x": (FLOAT, ["n", 8, 11])},
        {"y": (FLOAT, None)},
        {"w": w},
    )
    expected = im2col(x[:, :, None], (1, 3), (1, 2), (1, 1), (0, 2, 0, 0), 1)
    assert_statistics(stats_of(model, {"x": x}, tmp_path)["conv"], expected)


def test_tied_weights_count_once_and_gathered_rows_are_counted(tmp_path):
    table = weights(40, 32)
    nodes = [
        node("MatMul", ["x", "w"], ["h"], "once"),
        node("MatMul", ["h", "w"], ["g"], "twice"),
        node("Gather", ["table", "ids"], ["row"], "embedding"),
        node("MatMul", ["g", "transposed"], ["y"], "head"),
    ]
    w = weights(32, 32)
    model = models.model(
        nodes,
        {"x": (FLOAT, ["n", 32]), "ids": (INT64, ["n"])},
        {"y": (FLOAT, None), "row": (FLOAT, None)},
        {"w": w, "table": table, "transposed": np.ascontiguousarray(table.T)},
    )
    x = weights(6, 32)
    stats = stats_of(model, {"x": x, "ids": np.array([0, 0, 1, 5, 5, 5])}, tmp_path)
    assert set(stats) == {"once", "embedding"}
    assert_statistics(stats["once"], x[None])
    assert stats["embedding"][:7].tolist() == [2, 1, 0, 0, 0, 3, 0]


def test_layers_inside_bodies_count_the_samples_that_run_them(tmp_path):
    body = models.graph(
        [node("MatMul", ["x", "w"], ["inner"], "inside")], {}, {"inner": (FLOAT, None)}
    )
    other = models.graph([node("Identity", ["x"], ["same"])], {}, {"same": (FLOAT, None)})
    model = models.model(
        [
            node("If", ["c"], ["h"], then_branch=body, else_branch=other),
            node("MatMul", ["h", "v"], ["y"], "outside"),
        ],
        {"x": (FLOAT, ["n", 32]), "c": (TensorProto.BOOL, [])},
        {"y": (FLOAT, None)},
        {"w": weights(32, 32), "v": weights(32, 64)},
    )
    x = weights(4, 32)
    stats = stats_of(model, {"x": x, "c": np.array([True, False, True, False])}, tmp_path)
    assert set(stats) == {"inside", "outside"}
    assert_statistics(stats["inside"], x[None, ::2])
    inner = np.where(np.array([[True], [False], [True], [False]]), x @ weights(32, 32), x)
    assert_statistics(stats["outside"], inner[None])


def test_sample_that_the_model_refuses_is_named(tmp_path):
    model = models.model(
        [node("Gather", ["w", "ids"], ["h"]), node("MatMul", ["h", "v"], ["y"], "product")],
        {"ids": (INT64, ["n"])},
        {"y": (FLOAT, None)},
        {"w": weights(40, 32), "v": weights(32, 64)},
    )
    with pytest.raises(CalibrationError, match="fails on calibration sample 2") as caught:
        stats_of(model, {"ids": np.array([1, 2, 99])}, tmp_path)
    assert "\n" not in str(caught.value)


def test_model_that_runs_on_no_sample_is_to_blame(tmp_path):
    model = models.model(
        [node("Reshape", ["x", "shape"], ["h"]), node("MatMul", ["h", "v"], ["y"], "product")],
        {"x": (FLOAT, ["n", 30])},
        {"y": (FLOAT, None)},
        {"shape": np.array([-1, 32]), "v": weights(32, 64)},
    )
    with pytest.raises(CalibrationError, match=r"on none of the 3 calibration samples.*reshape"):
        stats_of(model, {"x": weights(3, 30)}, tmp_path)


def test_activation_that_overflows_is_named(tmp_path):
    model = models.model(
        [node("Exp", ["x"], ["e"]), node("MatMul", ["e", "w"], ["y"], "product")],
        {"x": (FLOAT, ["n", 32])},
        {"y": (FLOAT, None)},
        {"w": weights(32, 64)},
    )
    x = weights(3, 32)
    x[1, 5] = 1000
    with pytest.raises(CalibrationError, match="sample 1 gives layer product"):
        stats_of(model, {"x": x}, tmp_path)
