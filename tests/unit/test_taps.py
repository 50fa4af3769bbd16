"""Cuts of a bank's graph: where they may be, and that both halves do what the whole does."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from bapq_edge.bank.boundary import Precision
from bapq_edge.bank.reader import Bank
from bapq_edge.engine.graph import RUN_INPUT
from bapq_edge.errors import NoTapError
from bapq_tools.boundary.runner import Runner
from bapq_tools.boundary.taps import BankGraph
from support.banks import graph_bytes, node, write_bank
from support.streaming import BANKS, LINEAR, RELU, inputs, layer

LAYERS = [
    layer("stem", "Gemm", 32, 96),
    layer("wide", "Gemm", 400, 32),
    layer("last", "Gemm", 64, 400),
]


def bank_of(path, nodes, layers=LAYERS):
    return Bank.open(write_bank(path, graph_bytes(nodes, ["n", 96], ["n", 64]), layers))


@pytest.fixture
def plain(tmp_path):
    """x -> stem -> Relu -> wide -> last; a mask made of x is read on both sides of the stem."""
    zero = numpy_helper.from_array(np.zeros(1, np.float32))
    return bank_of(
        tmp_path / "m.bank",
        [
            helper.make_node("Constant", [], ["zero"], value=zero),
            helper.make_node("ReduceMean", ["x"], ["mean"], keepdims=1, axes=[1]),
            helper.make_node("Max", ["mean", "zero"], ["mask"]),
            helper.make_node("Add", ["x", "mask"], ["masked"]),
            node("Gemm", "masked", "s", layer=0, **LINEAR),
            helper.make_node("Relu", ["s"], ["h"]),
            node("Gemm", "h", "w", layer=1, **RELU),
            helper.make_node("Add", ["w", "mask"], ["v"]),
            node("Gemm", "v", "y", layer=2, **LINEAR),
        ],
    )


def halves_agree(bank, cut, x):
    """Whether head and body answer what the whole does; their models."""
    head, body = BankGraph(bank).split(cut)
    runner, precision = Runner(bank), Precision(level=4)
    try:
        outs = ["y"]
        (whole,) = runner.run(
            bank.graph_bytes(), precision, outs, [x], lambda f: f[0], lambda: None
        )
        (tap,) = runner.run(head, precision, [cut.tap], [x], lambda f: f[0], lambda: None)
        feed = {**x, cut.tap: tap}
        (again,) = runner.run(body, precision, outs, [feed], lambda f: f[0], lambda: None)
    finally:
        runner.close()
    np.testing.assert_array_equal(whole, again)
    return (onnx.load_model_from_string(half) for half in (head, body))


def test_the_last_tensor_of_each_number_of_layers_is_a_tap(plain):
    cuts = BankGraph(plain).cuts()
    assert [(cut.tap, cut.head_layers) for cut in cuts] == [("masked", 0), ("h", 1)]
    assert cuts[1].share == pytest.approx(32 * 96 / (32 * 96 + 400 * 32 + 64 * 400))


def test_halves_answer_as_the_whole_does_and_read_only_what_they_need(plain):
    x = {"x": np.random.default_rng(0).standard_normal((1, 96)).astype(np.float32)}
    none, stem = BankGraph(plain).cuts()
    head, body = halves_agree(plain, stem, x)
    assert {i.name for i in head.graph.input} == {"x", RUN_INPUT}
    # The mask is cheap: the body makes it again.
    assert {i.name for i in body.graph.input} == {"h", "x", RUN_INPUT}
    assert [n.op_type for n in head.graph.node][-2:] == ["Gemm", "Relu"]
    assert {o.domain: o.version for o in body.opset_import} == {"": 13, "bapq": 1}
    head, _ = halves_agree(plain, none, x)
    assert {i.name for i in head.graph.input} == {"x"}  # no operator of ours, no ticket


@pytest.mark.parametrize("kind", sorted(BANKS))
def test_cuts_of_every_graph_answer_as_the_whole_does(tmp_path, kind):
    bank = Bank.open(BANKS[kind](tmp_path / "m.bank"))
    graph, name = BankGraph(bank), "x"
    found = []
    for each in graph.model.graph.node:
        try:
            found.append(graph.cut(each.output[0]))
        except NoTapError:
            continue
    (x, *_) = inputs(kind)
    for cut in found:
        if cut.head_layers:  # of the others some are no floats
            halves_agree(bank, cut, {name: x[:1]})
    assert [(cut.tap, cut.head_layers) for cut in found if cut.head_layers] == {
        "chain": [("h1", 1), ("h2", 2)],
        "tied": [],  # its table is read on both sides
        "branches": [("h", 4), ("sum", 6)],  # two tensors pass every other cut
        "choice": [("h", 2)],  # both branches are before it
        "mobile": [("h", 1), ("d", 2)],
    }[kind]


def test_a_residual_passes_a_tap_by(tmp_path):
    bank = bank_of(
        tmp_path / "m.bank",
        [
            node("Gemm", "x", "s", layer=0, **LINEAR),
            node("Gemm", "s", "w", layer=1, **RELU),
            helper.make_node("ReduceMean", ["s"], ["m"], keepdims=1, axes=[1]),
            helper.make_node("Add", ["w", "m"], ["v"]),
            node("Gemm", "v", "y", layer=2, **LINEAR),
        ],
    )
    graph = BankGraph(bank)
    assert [cut.tap for cut in graph.cuts()] == ["s"]
    with pytest.raises(NoTapError, match="tap 'w' does not cut the graph in two"):
        graph.cut("w")
    with pytest.raises(NoTapError, match="tap 'y' does not cut"):  # nothing is left behind it
        graph.cut("y")
    with pytest.raises(NoTapError, match=r"tap 'nothing' is no tensor.*'s'"):
        graph.cut("nothing")


def test_a_tensor_that_says_nothing_of_a_later_layer_is_no_tap(tmp_path):
    bank = bank_of(
        tmp_path / "m.bank",
        [
            helper.make_node("ReduceMean", ["x"], ["mean"], keepdims=1, axes=[1]),
            node("Gemm", "x", "s", layer=0, **LINEAR),
            node("Gemm", "s", "w", layer=1, **RELU),
            helper.make_node("Add", ["w", "mean"], ["v"]),
            node("Gemm", "v", "y", layer=2, **LINEAR),
        ],
    )
    assert [cut.tap for cut in BankGraph(bank).cuts()] == ["s"]
    with pytest.raises(NoTapError):
        BankGraph(bank).cut("mean")


def test_layers_that_are_read_row_by_row_weigh_nothing(tmp_path):
    layers = [layer("table", "Gather", 5000, 64), layer("fc", "MatMul", 64, 64)]
    nodes = [node("Gather", "x", "h", layer=0), node("MatMul", "h", "y", layer=1, **RELU)]
    graph = graph_bytes(nodes, ["n", "m"], ["n", "m", 64], TensorProto.INT64)
    bank = Bank.open(write_bank(tmp_path / "m.bank", graph, layers))
    (cut,) = BankGraph(bank).cuts()
    assert (cut.tap, cut.share) == ("h", 0.0)
    halves_agree(bank, cut, {"x": np.array([[1, 4999, 7]])})
