"""Batches: what is known of their samples, and samples taken out of them."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

import bapq_tools
from bapq_edge.adaptive.batches import BatchTaker
from bapq_edge.bank.manifest import Batched
from bapq_edge.bank.reader import Bank
from bapq_tools.boundary.batches import find_batched
from bapq_tools.boundary.study import Study

RNG = np.random.default_rng(0)
X = RNG.standard_normal((90, 64)).astype(np.float32)


def study_of(folder, nodes, outputs, *, batch="n"):
    """A study of a product and what follows it."""
    weights = numpy_helper.from_array(RNG.standard_normal((64, 32)).astype(np.float32), "w")
    model = helper.make_model(
        helper.make_graph(
            [helper.make_node("MatMul", ["x", "w"], ["h"]), *nodes],
            "m",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, 64])],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
            [weights, numpy_helper.from_array(np.array([1, 32], np.int64), "one")],
        ),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,
    )
    bank = folder / "m.bank"
    bapq_tools.build_bank(model, bank, calibration={"x": X[:64]}, progress=False)
    return Study(
        Bank.open(bank), {"x": X[64:]}, model, agreement="cosine", judge=outputs[0], progress=False
    )


@pytest.mark.parametrize(
    ("nodes", "outputs", "batch", "expected"),
    [
        ([("Relu", ["h"], ["y"], {})], ["y"], "n", (("x",), ("y",))),
        # A mean over the batch ties its samples together; the other output's are apart.
        (
            [
                ("ReduceMean", ["h"], ["m"], {"axes": [0], "keepdims": 1}),
                ("Sub", ["h", "m"], ["z"], {}),
                ("Relu", ["h"], ["y"], {}),
            ],
            ["y", "z"],
            "n",
            (("x",), ("y",)),
        ),
        ([("Reshape", ["h", "one"], ["y"], {})], ["y"], "n", None),  # runs for one sample only
        ([("Relu", ["h"], ["y"], {})], ["y"], 1, None),
    ],
)
def test_samples_that_do_not_touch_each_other_are_found(tmp_path, nodes, outputs, batch, expected):
    made = [helper.make_node(kind, *names, **more) for kind, *names, more in nodes]
    with study_of(tmp_path, made, outputs, batch=batch) as study:
        assert find_batched(study) == (None if expected is None else Batched(*expected))


def test_a_batch_is_taken_apart_only_where_all_of_it_is_known():
    taker = BatchTaker(Batched(("x", "y"), ("a",)))
    feed = {"x": X[:3], "y": [1, 2, 3], "scale": np.float32(2)}
    outputs = {"a": X[:3]}
    part = taker.take(feed, outputs, [2])
    np.testing.assert_array_equal(part["x"], X[2:3])
    assert part["y"].tolist() == [3] and part["scale"] == 2
    assert taker.take(feed, outputs, [2, 0, 1]) is None  # all of it
    assert taker.take({**feed, "y": [1, 2]}, outputs, [2]) is None
    assert taker.take({**feed, "y": 1}, outputs, [2]) is None
    assert taker.take(feed, {"a": X[:2]}, [1]) is None
    assert taker.take(feed, {**outputs, "b": X[:3]}, [1]) is None
    assert BatchTaker(None).take(feed, outputs, [2]) is None


def test_answers_of_another_shape_are_not_put_back():
    outputs = {"a": np.zeros((3, 4), np.float32), "b": np.zeros(3, np.int64)}
    again = {"a": np.ones((1, 4), np.float32), "b": np.array([7])}
    for name, value in (("a", np.ones((1, 1), np.float32)), ("a", np.ones((1, 4)))):
        assert not BatchTaker.put_back(outputs, [1], {**again, name: value})
    assert not outputs["a"].any() and not outputs["b"].any()
    assert BatchTaker.put_back(outputs, [1], again)
    assert outputs["a"].sum(1).tolist() == [0, 4, 0] and outputs["b"].tolist() == [0, 7, 0]
