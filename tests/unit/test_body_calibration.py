"""Layers inside If, Loop and Scan bodies are calibrated as often as they run."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

import bapq_edge
from bapq_edge.bank.reader import Bank
from bapq_edge.errors import UncalibratedWarning
from bapq_tools import build_bank
from support import onnx_models as models
from support.onnx_models import FLOAT, INT64, weights

node = helper.make_node
COLUMNS = 32


def constant(name, value, dtype):
    return node("Constant", [], [name], value=numpy_helper.from_array(np.array(value, dtype)))


def product_graph(source="x", target="inner", **inputs):
    """A body with a constant of its own beside a product whose weight it holds too."""
    return models.graph(
        [
            node("Mul", [source, "half"], ["halved"]),
            node("MatMul", ["halved", "w"], [target], "inside"),
        ],
        inputs,
        {target: (FLOAT, None)},
        {"half": np.float32([0.5]), "w": weights(COLUMNS, 64)},
    )


def other_branch():
    nodes = [constant("zeros", np.zeros((1, 64)), np.float32)]
    nodes.append(node("Identity", ["zeros"], ["nothing"]))
    return models.graph(nodes, {}, {"nothing": (FLOAT, None)}, name="else")


def branching():
    """An If on an input: one branch holds the layer."""
    then = product_graph()
    return models.model(
        [node("If", ["c"], ["y"], then_branch=then, else_branch=other_branch())],
        {"x": (FLOAT, ["n", COLUMNS]), "c": (TensorProto.BOOL, [])},
        {"y": (FLOAT, None)},
    )


def looping(branch=False):
    """A Loop over a growing prefix of x: 1 row in the first iteration, 2 in the second, ...

    With `branch`, odd iterations take the branch without the layer.
    """
    nodes = [
        node("Add", ["i", "one"], ["next"]),
        node("Reshape", ["next", "flat"], ["end"]),
        node("Slice", ["x", "start", "end", "start"], ["prefix"]),
    ]
    constants = {
        "one": np.array(1, np.int64),
        "flat": np.array([1], np.int64),
        "start": np.array([0], np.int64),
    }
    product = [
        node("MatMul", ["prefix", "w"], ["inner"], "inside"),
        node("ReduceMean", ["inner"], ["mean"], axes=[0], keepdims=1),
    ]
    if branch:
        constants["two"] = np.array(2, np.int64)
        then = models.graph(product, {}, {"mean": (FLOAT, None)}, {"w": weights(COLUMNS, 64)})
        nodes += [
            node("Mod", ["i", "two"], ["odd"]),
            node("Cast", ["odd"], ["is_odd"], to=TensorProto.BOOL),
            node("Not", ["is_odd"], ["even"]),
            node("If", ["even"], ["part"], then_branch=then, else_branch=other_branch()),
        ]
    else:
        constants["w"] = weights(COLUMNS, 64)
        nodes += [*product, node("Identity", ["mean"], ["part"])]
    nodes += [
        node("Add", ["sum", "part"], ["new_sum"]),
        node("Identity", ["go"], ["still"]),
        node("ReduceMax", ["part"], ["peak"], keepdims=0),
    ]
    body = models.graph(
        nodes,
        {"i": (INT64, []), "go": (TensorProto.BOOL, []), "sum": (FLOAT, None)},
        {"still": (TensorProto.BOOL, []), "new_sum": (FLOAT, None), "peak": (FLOAT, None)},
        constants,
        name="body",
    )
    return models.model(
        [
            node("Shape", ["x"], ["shape"]),
            node("Gather", ["shape", "zero"], ["times"]),
            node("Loop", ["times", "", "first"], ["y", "peaks"], body=body),
        ],
        {"x": (FLOAT, ["rows", COLUMNS])},
        {"y": (FLOAT, None), "peaks": (FLOAT, None)},
        {"zero": np.array(0, np.int64), "first": np.zeros((1, 64), np.float32)},
    )


def scanning(branch=False):
    """A Scan over the rows of x; a product of each row, with `branch` inside of an If."""
    product = [node("MatMul", ["row2d", "w"], ["inner"], "inside")]
    constants = {"shape": np.array([1, COLUMNS], np.int64)}
    nodes = [node("Reshape", ["row", "shape"], ["row2d"])]
    if branch:
        then = models.graph(product, {}, {"inner": (FLOAT, None)}, {"w": weights(COLUMNS, 64)})
        constants["zero"] = np.array([0], np.float32)
        nodes += [
            node("ReduceMax", ["row"], ["peak"], keepdims=1),
            node("Greater", ["peak", "zero"], ["positive"]),
            node("If", ["positive"], ["part"], then_branch=then, else_branch=other_branch()),
        ]
    else:
        constants["w"] = weights(COLUMNS, 64)
        nodes += [*product, node("Identity", ["inner"], ["part"])]
    nodes += [node("Add", ["sum", "part"], ["new_sum"]), node("Identity", ["part"], ["seen"])]
    body = models.graph(
        nodes,
        {"sum": (FLOAT, None), "row": (FLOAT, None)},
        {"new_sum": (FLOAT, None), "seen": (FLOAT, None)},
        constants,
        name="body",
    )
    return models.model(
        [node("Scan", ["first", "x"], ["y", "all"], body=body, num_scan_inputs=1)],
        {"x": (FLOAT, ["rows", COLUMNS])},
        {"y": (FLOAT, None), "all": (FLOAT, None)},
        {"first": np.zeros((1, 64), np.float32)},
    )


def few_directions(count):
    """Inputs that only a calibrated rounding can make use of: 4 directions of 32."""
    rng = np.random.default_rng(1)
    mixed = rng.standard_normal((count, 4)) @ rng.standard_normal((4, COLUMNS))
    return mixed.astype(np.float32)


def error_of(model, feeds, tmp_path):
    """The error of the layer `inside` at level 2."""
    bank = build_bank(model, tmp_path / "m.bank", calibration=feeds, workers=1, progress=False)
    (layer,) = Bank.open(bank).manifest.layers
    assert layer.name == "inside"
    return layer.relative_error[2]


def outside():
    return models.model(
        [node("MatMul", ["x", "w"], ["y"], "inside")],
        {"x": (FLOAT, ["n", COLUMNS])},
        {"y": (FLOAT, None)},
        {"w": weights(COLUMNS, 64)},
    )


@pytest.mark.parametrize(
    ("model", "samples"),
    [
        (branching(), "rows"),
        (looping(), "sets"),
        (looping(branch=True), "sets"),
        (scanning(), "sets"),
    ],
    ids=["if", "loop", "if_in_loop", "scan"],
)
def test_a_product_in_a_body_is_rounded_as_well_as_one_outside(model, samples, tmp_path):
    x = few_directions(240)
    feeds = {"x": x if samples == "rows" else x.reshape(40, 6, COLUMNS)}
    if "c" in [item.name for item in model.graph.input]:
        feeds["c"] = np.arange(240) % 3 > 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        inside = error_of(model, feeds, tmp_path)
    alike = error_of(outside(), {"x": x}, tmp_path)
    assert inside < 1.3 * alike
    one = {name: array[1:2] if samples == "rows" else array[1] for name, array in feeds.items()}
    if "c" in one:
        one["c"] = np.array(True)
    expected = models.run(model, one)
    build_bank(model, tmp_path / "m.bank", calibration=feeds, workers=1, progress=False)
    with bapq_edge.Session(tmp_path / "m.bank", level=8) as session:
        for found, wanted in zip(session.run(None, one), expected, strict=True):
            assert np.abs(found - wanted).max() < 0.05 * np.abs(wanted).max()


def test_layers_of_one_body_see_what_those_before_them_leave_behind(tmp_path):
    def bodied(nested):
        nodes = [
            node("MatMul", ["x", "w"], ["h"], "first"),
            node("MatMul", ["h", "v"], ["y"], "second"),
        ]
        constants = {"w": weights(COLUMNS, 64), "v": weights(64, 64)}
        inputs = {"x": (FLOAT, ["n", COLUMNS])}
        if nested:
            then = models.graph(nodes, {}, {"y": (FLOAT, None)}, constants)
            nodes = [node("If", ["c"], ["z"], then_branch=then, else_branch=other_branch())]
            constants, inputs = {}, inputs | {"c": (TensorProto.BOOL, [])}
        outputs = {"z" if nested else "y": (FLOAT, None)}
        return models.model(nodes, inputs, outputs, constants)

    feeds = {"x": few_directions(200)}
    errors = []
    for nested in (False, True):
        given = feeds | ({"c": np.ones(200, bool)} if nested else {})
        bank = build_bank(
            bodied(nested), tmp_path / "m.bank", calibration=given, workers=1, progress=False
        )
        layers = Bank.open(bank).manifest.layers
        errors.append([layer.relative_error for layer in layers])
    assert errors[0] == errors[1]


def test_a_branch_that_no_sample_takes_is_named(tmp_path):
    feeds = {"x": few_directions(20), "c": np.zeros(20, bool)}
    with pytest.warns(UncalibratedWarning, match="1 layer, which no calibration sample.*: inside"):
        error_of(branching(), feeds, tmp_path)


def test_a_body_that_cannot_be_looked_into_is_named(tmp_path):
    feeds = {"x": few_directions(60).reshape(10, 6, COLUMNS)}
    with pytest.warns(UncalibratedWarning, match="1 layer, inside bodies that.*: inside"):
        error_of(scanning(branch=True), feeds, tmp_path)


def test_gathered_rows_are_counted_in_bodies_too(tmp_path):
    then = models.graph(
        [node("Gather", ["table", "ids"], ["rows"], "embedding")],
        {},
        {"rows": (FLOAT, None)},
        {"table": weights(64, COLUMNS)},
    )
    other = models.graph(
        [constant("none", np.zeros((1, COLUMNS)), np.float32), node("Identity", ["none"], ["no"])],
        {},
        {"no": (FLOAT, None)},
    )
    model = models.model(
        [node("If", ["c"], ["y"], then_branch=then, else_branch=other)],
        {"ids": (INT64, ["n"]), "c": (TensorProto.BOOL, [])},
        {"y": (FLOAT, None)},
    )
    feeds = {"ids": np.arange(10) % 3, "c": np.arange(10) % 2 == 0}
    bank = build_bank(model, tmp_path / "m.bank", calibration=feeds, workers=1, progress=False)
    assert Bank.open(bank).manifest.layers[0].name == "embedding"
