"""Means and costs of rows, against what the graph's tensors and weights say."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import helper, numpy_helper, parser

from bapq_edge.bank.boundary import Precision
from bapq_edge.bank.reader import Bank
from bapq_tools import build_bank
from bapq_tools.row_skipping.contributions import contributions
from bapq_tools.row_skipping.downstream_weights import DownstreamWeights


def model_of(text, **weights):
    """A model of one input x and one output y, by its nodes."""
    graph = parser.parse_graph(
        f"g (float[n, {text[0]}] x) => (float[n, {text[1]}] y) {{{text[2]}}}"
    )
    graph.initializer.extend(numpy_helper.from_array(w, name) for name, w in weights.items())
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def bank_of(tmp_path, model):
    return Bank.open(build_bank(model, tmp_path / "m.bank", levels=(32,), progress=False))


def normal(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


def test_means_are_of_what_the_next_layer_reads_and_costs_of_what_it_makes_of_it(tmp_path):
    rng = np.random.default_rng(0)
    w1, w2, w3 = normal(rng, 40, 48), normal(rng, 48, 32), normal(rng, 32, 4)
    text = (40, 4, "h = MatMul(x, w1) r = Relu(h) k = MatMul(r, w2) y = MatMul(k, w3)")
    bank = bank_of(tmp_path, model_of(text, w1=w1, w2=w2, w3=w3))
    x, regions = normal(rng, 70, 40), rng.integers(0, 2, 70)
    found = contributions(bank, Precision(32), [{"x": row[None]} for row in x], regions, 3)
    assert len(found) == 2  # the third is too small for a bank
    hidden = np.maximum(x @ w1, 0).astype(np.float64)
    for layer, values, reads in zip(found, (hidden, hidden @ w2), (w2, w3), strict=True):
        mean, cost = found[layer].mean, found[layer].cost
        for region in (0, 1):
            mine = values[regions == region]
            np.testing.assert_allclose(mean[region], mine.mean(0), rtol=1e-4, atol=1e-5)
            expected = mine.var(0) * np.square(reads, dtype=np.float64).sum(1)
            np.testing.assert_allclose(cost[region], expected, rtol=1e-3)
        assert not mean[2].any() and not cost[2].any()


def test_a_convolution_counts_every_position(tmp_path):
    rng = np.random.default_rng(1)
    w1, w2 = normal(rng, 32, 4, 3, 3), normal(rng, 40, 8, 1, 1)
    text = (
        "4, 6, 5",
        "40, 4, 3",
        "h = Conv(x, w1) r = Relu(h) y0 = Conv<group=4>(r, w2) y = Relu(y0)",
    )
    bank = bank_of(tmp_path, model_of(text, w1=w1, w2=w2))
    x = normal(rng, 3, 4, 6, 5)
    found = contributions(bank, Precision(32), [{"x": one[None]} for one in x], np.zeros(3, int), 1)
    (layer,) = found  # the other one's output is the model's
    windows = np.lib.stride_tricks.sliding_window_view(x, (3, 3), axis=(2, 3))
    values = np.maximum(np.einsum("nchwij,rcij->nhwr", windows, w1), 0).reshape(-1, 32)
    np.testing.assert_allclose(found[layer].mean[0], values.mean(0), rtol=1e-4)
    reads = np.square(w2).reshape(4, 10, 8).sum(1).reshape(-1)
    np.testing.assert_allclose(found[layer].cost[0], values.var(0) * reads, rtol=1e-3)


def test_a_depthwise_layer_is_looked_through(tmp_path):
    rng = np.random.default_rng(4)
    w1, w2, w3 = normal(rng, 32, 40, 1, 1), normal(rng, 32, 1, 3, 3), normal(rng, 40, 32, 1, 1)
    text = (
        "40, 6, 5",
        "40, 6, 5",
        "h = Conv(x, w1) r = Relu(h) k = Conv<group=32, pads=[1,1,1,1]>(r, w2) y0 = Conv(k, w3) "
        "y = Relu(y0)",
    )
    bank = bank_of(tmp_path, model_of(text, w1=w1, w2=w2, w3=w3))
    assert [layer.operators for layer in bank.manifest.layers][1] == ("DepthwiseConv",)
    x = normal(rng, 3, 40, 6, 5)
    found = contributions(bank, Precision(32), [{"x": one[None]} for one in x], np.zeros(3, int), 1)
    first, depthwise = found
    assert bank.layer(first).operators == ("Conv",)
    values = np.maximum(np.einsum("nchw,rc->nhwr", x, w1[:, :, 0, 0]), 0).reshape(-1, 32)
    reads = np.square(w3).sum((0, 2, 3))
    gain = np.square(w2).sum((1, 2, 3))
    np.testing.assert_allclose(found[first].cost[0], values.var(0) * gain * reads, rtol=1e-3)
    assert (found[depthwise].cost[0] > 0).all()


SHARED = "h = MatMul(x, w) k = MatMul(h, w) y = Relu(k)"
GATHERED = "i = Cast<to=7>(x) h = Gather(w, i) y = ReduceSum<keepdims=0>(h, axis)"


def test_layers_that_cannot_be_skipped_are_left_out(tmp_path):
    rng = np.random.default_rng(2)
    feeds, regions = [{"x": np.ones((1, 32), np.float32)}], np.zeros(1, int)
    shared = bank_of(tmp_path, model_of((32, 32, SHARED), w=normal(rng, 32, 32)))
    assert len(shared.manifest.layers) == 1
    assert contributions(shared, Precision(32), feeds, regions, 1) == {}
    weights = {"w": normal(rng, 64, 32), "axis": np.array([1])}
    gathered = bank_of(tmp_path, model_of((32, 32, GATHERED), **weights))
    assert gathered.manifest.layers[0].operators == ("Gather",)
    assert contributions(gathered, Precision(32), feeds, regions, 1) == {}


READERS = [  # nodes behind x (n, 8, 4, 4), squared weights that read its channels
    ("y = Conv(x, a)", lambda w: w["a"].sum((0, 2, 3))),
    ("p = MaxPool<kernel_shape=[2,2]>(x) y = Conv(p, a)", lambda w: w["a"].sum((0, 2, 3))),
    ("g = GlobalAveragePool(x) f = Flatten(g) y = Gemm<transB=1>(f, c)", lambda w: w["c"].sum(0)),
    ("f = Flatten(x) y = MatMul(f, d)", lambda w: w["d"].reshape(8, 16, 5).sum((1, 2))),
    (
        "k = Conv<group=8, pads=[1,1,1,1]>(x, b) r = Clip(k) y = Conv(r, a)",
        lambda w: w["b"].sum((1, 2, 3)) * w["a"].sum((0, 2, 3)),
    ),
    (
        "k = Conv(x, a) r = Add(x, x) l = Conv(r, a) y = Add(k, l)",
        lambda w: 2 * w["a"].sum((0, 2, 3)),
    ),
    ("y = Softmax(x)", lambda w: np.ones(8)),
]


@pytest.mark.parametrize(("nodes", "expected"), READERS)
def test_how_strongly_channels_are_read(tmp_path, nodes, expected):
    rng = np.random.default_rng(3)
    weights = {
        "a": normal(rng, 8, 8, 1, 1),
        "b": normal(rng, 8, 1, 3, 3),
        "c": normal(rng, 5, 8),
        "d": normal(rng, 128, 5),
    }
    squares = {name: np.square(w, dtype=np.float64) for name, w in weights.items()}
    model = model_of(("8, 4, 4", "k", nodes), **weights)
    bank = bank_of(tmp_path, model_of((32, 32, SHARED), w=normal(rng, 32, 32)))
    found = DownstreamWeights(bank, model.graph).strength("x", 8)
    np.testing.assert_allclose(found, expected(squares), rtol=1e-6)
