"""What follows a product and is fused into its operator, and what is not; with the numbers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
import pytest
from onnx import helper

from bapq_tools.onnx_graph.assemble import assemble, split_residuals
from bapq_tools.onnx_graph.ir import LayerPlan
from bapq_tools.onnx_graph.layers import find_layers
from support import onnx_models as models
from support.onnx_models import FLOAT, weights

node = helper.make_node
W = weights(32, 40)


def built(
    behind: Sequence[onnx.NodeProto],
    outputs: Sequence[str] = ("y",),
    opset: int = 13,
    domains: Sequence[tuple[str, int]] = (),
    **constants: object,
) -> tuple[onnx.ModelProto, LayerPlan]:
    """A model of a product x W = a, (n, 40), and these nodes behind it; and its plan."""
    model = models.model(
        [node("MatMul", ["x", "w"], ["a"]), *behind],
        {"x": (FLOAT, ["n", 32]), "r": (FLOAT, ["n", 40])},
        {name: (FLOAT, None) for name in outputs},
        {"w": W} | {key: np.array(value, np.float32) for key, value in constants.items()},
        opset=opset,
        domains=domains,
    )
    return model, find_layers(model)


def assert_same_answers(
    model: onnx.ModelProto, plan: LayerPlan, assembled: bytes | None = None
) -> None:
    """The operators, spelled out, give what the model gives."""
    rng = np.random.default_rng(0)
    feed = {name: 3 * rng.standard_normal((5, n)) for name, n in (("x", 32), ("r", 40))}
    feed = {name: value.astype(np.float32) for name, value in feed.items()}
    wanted = models.run(model, feed)
    assembled = assemble(model, plan) if assembled is None else assembled
    found = models.run(models.standard_model(assembled, plan), feed)
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-5)


def gelu_halved_first(x: str, y: str) -> tuple[list[onnx.NodeProto], dict[str, float]]:
    nodes, constants = models.chain(x, y, ("Mul", 0.70710677), ("Erf",), ("Add", 1.0))
    nodes[-1].output[0] = "e"
    nodes += [node("Mul", [x, "half"], ["h"]), node("Mul", ["h", "e"], [y])]
    return nodes, {**constants, "half": 0.5}


SPELLED = [
    ("silu", models.silu),
    ("hard_swish", models.hard_swish),
    ("hard_swish", models.hard_swish_clipped),
    ("gelu", models.gelu),
    ("gelu", gelu_halved_first),
    ("gelu_tanh", models.gelu_tanh),
]


@pytest.mark.parametrize("name, spell", SPELLED)
def test_functions(name, spell) -> None:
    nodes, constants = spell("a", "y")
    model, plan = built(nodes, **constants)
    (use,) = plan.layers[0].uses
    assert (use.function, use.output) == (name, "y")
    assert models.operators(assemble(model, plan)) == ["bapq.MatMul"]
    assert_same_answers(model, plan)


@pytest.mark.parametrize("name, spell", SPELLED)
def test_functions_whose_middle_somebody_reads_stay(name, spell) -> None:
    nodes, constants = spell("a", "y")
    for seen in ("a", nodes[0].output[0]):
        model, plan = built(nodes, ("y", seen), **constants)
        (use,) = plan.layers[0].uses
        assert (use.function, use.output) == (None, "a")
        assert_same_answers(model, plan)


@pytest.mark.parametrize(
    "name, opset, function, domain",
    [
        ("HardSwish", 14, "hard_swish", ""),
        ("Gelu", 20, "gelu", ""),
        ("Gelu", 13, "gelu", "com.microsoft"),
        ("FastGelu", 13, "gelu_tanh", "com.microsoft"),
    ],
)
def test_functions_of_one_node(name, opset, function, domain) -> None:
    domains = [(domain, 1)] if domain else []
    _, plan = built([node(name, ["a"], ["y"], domain=domain)], opset=opset, domains=domains)
    assert plan.layers[0].uses[0].function == function


def test_functions_that_are_another_stay() -> None:
    wide = node("HardSigmoid", ["a"], ["s"], alpha=0.2)
    for nodes in (
        [wide, node("Mul", ["a", "s"], ["y"])],
        [node("Sigmoid", ["a"], ["y"])],
        [node("Sigmoid", ["a"], ["s"]), node("Mul", ["r", "s"], ["y"])],
        [node("FastGelu", ["a", "b"], ["y"], domain="com.microsoft")],
    ):
        domains = [("com.microsoft", 1)]
        _, plan = built(nodes, domains=domains, b=np.zeros(40))
        assert plan.layers[0].uses[0].output == "a"


@pytest.mark.parametrize(
    "opset, clip",
    [
        (10, [node("Clip", ["s"], ["c"], min=0.0, max=6.0)]),
        (13, [node("Relu", ["s"], ["t"]), node("Min", ["six", "t"], ["c"])]),
    ],
)
def test_hard_swish_clipped_otherwise(opset, clip) -> None:
    shifted, behind = node("Add", ["three", "a"], ["s"]), node("Div", ["c", "six"], ["d"])
    nodes = [shifted, *clip, behind, node("Mul", ["d", "a"], ["y"])]
    model, plan = built(nodes, opset=opset, three=3, six=6)
    assert plan.layers[0].uses[0].function == "hard_swish"
    assert_same_answers(model, plan)


@pytest.mark.parametrize("bound", [20, 65504, 1e30])
def test_functions_behind_a_wide_clip_stay(bound) -> None:
    """The clip is none of the function, though both agree where most values are."""
    nodes, constants = models.silu("b", "y")
    clip = node("Clip", ["a", "low", "high"], ["b"])
    model, plan = built([clip, *nodes], low=-bound, high=bound, **constants)
    (use,) = plan.layers[0].uses
    assert (use.function, use.activation.high, use.output) == (None, np.float32(bound), "b")
    assert_same_answers(model, plan)


@pytest.mark.parametrize("operator", ["Add", "Sum"])
def test_residual_with_a_clip(operator) -> None:
    for inputs in (["a", "r"], ["r", "a"]):
        nodes = [node(operator, inputs, ["s"]), node("Relu", ["s"], ["y"])]
        model, plan = built(nodes)
        (use,) = plan.layers[0].uses
        assert (use.residual, use.activation.low, use.output) == ("r", 0.0, "y")
        assert models.operators(assemble(model, plan)) == ["bapq.MatMul"]
        assert_same_answers(model, plan)


def test_residual_behind_a_function() -> None:
    nodes, constants = models.silu("a", "f")
    model, plan = built([*nodes, node("Add", ["r", "f"], ["y"])], **constants)
    (use,) = plan.layers[0].uses
    assert (use.function, use.residual, use.output) == ("silu", "r", "y")
    assert_same_answers(model, plan)


def test_sums_that_are_no_residual() -> None:
    """The product itself, a tensor of another or an unknown shape; and a sum of three."""
    column = node("ReduceMean", ["r"], ["m"], axes=[1])
    unknown = node("Reshape", ["r", "shape"], ["m"])
    for nodes in (
        [node("Add", ["a", "a"], ["y"])],
        [column, node("Add", ["a", "m"], ["y"])],
        [node("Cast", ["t"], ["shape"], to=7), unknown, node("Add", ["a", "m"], ["y"])],
        [node("Sum", ["a", "r", "r"], ["y"])],
    ):
        _, plan = built(nodes, t=[-1, 40])
        assert plan.layers[0].uses[0].residual == ""
    _, plan = built([node("Add", ["a", "r"], ["y"])], ("y", "a"))
    assert plan.layers[0].uses[0].residual == ""


def test_of_two_products_one_takes_their_sum() -> None:
    """And stands where the sum stood, behind the other one."""
    nodes = [node("MatMul", ["r", "v"], ["b"]), node("Add", ["a", "b"], ["y"])]
    model, plan = built(nodes, v=weights(40, 40))
    first, second = (layer.uses[0] for layer in plan.layers)
    assert (first.residual, first.output, second.residual, second.output) == ("b", "y", "", "b")
    order = [n.output[0] for n in onnx.load_model_from_string(assemble(model, plan)).graph.node]
    assert order == ["b", "y"]
    assert_same_answers(model, plan)


def test_sums_put_back_behind_their_operators() -> None:
    nodes = [node("Add", ["a", "r"], ["s"]), node("Relu", ["s"], ["y"])]
    model, plan = built(nodes)
    assembled = onnx.load_model_from_string(assemble(model, plan))
    split_residuals(assembled.graph)
    assert models.operators(assembled) == ["bapq.MatMul", "Add", "Max", "Min"]
    assert_same_answers(model, plan, assembled.SerializeToString())
