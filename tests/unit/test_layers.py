"""Which nodes become layers, what is fused into them, what stays and why."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
import pytest
from onnx import helper

from bapq_edge.errors import ModelError, NoHeavyLayerError
from bapq_tools.onnx_graph.ir import Activation, LayerPlan
from bapq_tools.onnx_graph.layers import find_layers
from support import onnx_models as models
from support.onnx_models import FLOAT, INT64, weights

node = helper.make_node
UNBOUNDED = float("inf")


def plan_of(
    nodes: Sequence[onnx.NodeProto], constants: dict[str, np.ndarray], opset: int = 13
) -> LayerPlan:
    inputs = {"x": (FLOAT, None), "ids": (INT64, ["n"])}
    outputs = {nodes[-1].output[0]: (FLOAT, None)}
    return find_layers(models.model(nodes, inputs, outputs, constants, opset=opset))


HEAVY = node("MatMul", ["x", "heavy"], ["heavy_out"])


def kept_reason(kept: onnx.NodeProto, **constants: np.ndarray) -> tuple[int, str]:
    """Weights and reason of the node, which stands in a model that has one heavy layer."""
    plan = plan_of([HEAVY, kept], {"heavy": weights(64, 64), **constants})
    assert len(plan.layers) == 1
    (found,) = plan.kept_in_float
    assert found.operator == kept.op_type
    return found.weights, found.reason


KEPT = [
    (node("MatMul", ["x", "w"], ["y"]), (32, 31), "fewer than 1024"),
    (node("Gather", ["w", "ids"], ["y"]), (10, 10), "fewer than 1024"),
    (node("Conv", ["x", "w"], ["y"], group=28), (28, 1, 3, 3), "fewer than 256"),
    (node("Conv", ["x", "w"], ["y"]), (8, 8, 3, 3, 3), "3-D convolution"),
    (node("Conv", ["x", "w", "x"], ["y"]), (16, 8, 3, 3), "its bias is computed"),
    (node("ConvTranspose", ["x", "w"], ["y"]), (16, 8, 3, 3), "transposed convolution"),
    (node("MatMul", ["x", "w"], ["y"]), (2, 32, 32), "3 dimensions"),
    (node("MatMul", ["w", "x"], ["y"]), (32, 32), "left"),
    (node("Gemm", ["w", "x"], ["y"]), (32, 32), "left"),
    (node("Gemm", ["x", "w"], ["y"], transA=1), (32, 32), "transposed"),
    (node("Gather", ["w", "ids"], ["y"], axis=1), (32, 32), "another axis"),
    (node("LSTM", ["x", "w", "x"], ["y"], hidden_size=8), (1, 32, 40), "recurrent"),
    (node("Add", ["x", "w"], ["y"]), (1, 64, 64), "no chunk operator for Add"),
]


@pytest.mark.parametrize("kept, shape, reason", KEPT, ids=[f"{k[0].op_type} {k[2]}" for k in KEPT])
def test_kept_in_float(kept: onnx.NodeProto, shape: tuple[int, ...], reason: str) -> None:
    count, found = kept_reason(kept, w=weights(*shape))
    assert count == np.prod(shape)
    assert reason in found


def test_a_depthwise_convolution_is_a_layer_of_its_own_kind() -> None:
    """Even where its weights equal those of another convolution, which has another layout."""
    plan = plan_of(
        [
            node("Conv", ["x", "w"], ["a"], group=2),
            node("Conv", ["x", "v"], ["b"], group=1),
            node("Conv", ["x", "w"], ["c"], group=2, strides=[2, 2]),
            node("Concat", ["a", "b", "c"], ["y"], axis=1),
        ],
        {"w": (shared := weights(40, 1, 3, 3)), "v": shared},
    )
    kinds = [[use.operator for use in layer.uses] for layer in plan.layers]
    assert kinds == [["DepthwiseConv", "DepthwiseConv"]]
    assert [layer.depthwise for layer in plan.layers] == [True]
    assert plan.layers[0].weight.shape == (40, 9)
    assert [(kept.operator, kept.weights) for kept in plan.kept_in_float] == [("Conv", 360)]


def test_kept_for_their_type() -> None:
    wide = weights(32, 40).astype(np.float64)
    assert kept_reason(node("MatMul", ["x", "w"], ["y"]), w=wide) == (
        1280,
        "its weights are float64",
    )
    bytes_ = np.ones((32, 40), np.int8)
    integer = node("MatMulInteger", ["x", "w"], ["y"])
    assert kept_reason(integer, w=bytes_) == (1280, "already quantized, in a form of its own")


def test_a_quantized_model_is_told_so() -> None:
    with pytest.raises(NoHeavyLayerError, match=r"quantized already: 1280 weights .* QDQ form"):
        plan_of([node("MatMulInteger", ["x", "w"], ["y"])], {"w": np.ones((32, 40), np.int8)})


def test_all_tensors_of_a_recurrent_node_count() -> None:
    shapes = {"w": (1, 256, 32), "r": (1, 256, 64), "b": (1, 512)}
    lstm = node("LSTM", ["x", *shapes], ["y"], hidden_size=64)
    count, reason = kept_reason(lstm, **{name: weights(*shape) for name, shape in shapes.items()})
    assert count == 256 * 32 + 256 * 64 + 512
    assert reason == "recurrent operator of fewer than 65536 weights for its state"


def test_kept_by_another_domain() -> None:
    other = node("LinearRegressor", ["x"], ["y"], domain="ai.onnx.ml", coefficients=[1.0] * 2000)
    assert kept_reason(other) == (2000, "operator of domain ai.onnx.ml")


def test_small_constants_are_not_worth_a_line() -> None:
    plan = plan_of([HEAVY, node("Mul", ["heavy_out", "g"], ["y"])],
                   {"heavy": weights(64, 64), "g": weights(64)})  # fmt: skip
    assert plan.kept_in_float == []


def test_a_fused_bias_is_not_kept_however_long_it_is() -> None:
    plan = plan_of(
        [node("MatMul", ["x", "w"], ["h"]), node("Add", ["h", "b"], ["y"])],
        {"w": weights(8, 2000), "b": weights(2000)},
    )
    assert plan.layers[0].bias is not None
    assert plan.kept_in_float == []


def test_no_heavy_layer() -> None:
    with pytest.raises(NoHeavyLayerError, match=r"'/fc/MatMul', has 992 weights .* least 1024"):
        plan_of([node("MatMul", ["x", "w"], ["y"], name="/fc/MatMul")], {"w": weights(32, 31)})
    with pytest.raises(NoHeavyLayerError, match="no MatMul, Gemm, Conv or Gather"):
        plan_of([node("Relu", ["x"], ["y"])], {})


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_must_be_finite(value: float) -> None:
    weight = weights(32, 40)
    weight[3, 7] = weight[5, 9] = value
    with pytest.raises(ModelError, match=r"'w' of MatMul node 'fc' .* 2 of 40 rows, .* row 7"):
        plan_of([node("MatMul", ["x", "w"], ["y"], name="fc")], {"w": weight})


def test_lookup_table_with_infinities_stays() -> None:
    mask = np.triu(np.full((40, 40), -np.inf, np.float32), 1)
    assert "NaN or infinity" in kept_reason(node("Gather", ["m", "ids"], ["y"]), m=mask)[1]


def test_infinite_bias_stays_an_add() -> None:
    bias = weights(40)
    bias[0] = -np.inf
    plan = plan_of(
        [node("MatMul", ["x", "w"], ["p"]), node("Add", ["p", "b"], ["y"])],
        {"w": weights(32, 40), "b": bias},
    )
    assert plan.layers[0].bias is None


@pytest.mark.parametrize(
    "source, expected",
    [
        ("/layer1/conv/Conv", "layer1.conv"),
        ("/layer1/conv/Conv_3", "layer1.conv"),
        ("/layer1/conv/Conv_fused", "layer1.conv.Conv_fused"),
        ("MatMul_12", "MatMul_12"),
        ("", "y"),
        ("a b;c:0", "a_b_c.0"),
        ("../..", "Conv"),
        ("x" * 100, "x" * 80),
    ],
)
def test_layer_names(source: str, expected: str) -> None:
    plan = plan_of([node("Conv", ["x", "w"], ["y"], name=source)], {"w": weights(16, 8, 3, 3)})
    assert plan.layers[0].name == expected


def test_layer_names_are_unique_even_without_case() -> None:
    names = ["n" * 90, "N" * 90, "n" * 80]
    nodes = [node("MatMul", ["x", f"w{i}"], [f"y{i}"], name=n) for i, n in enumerate(names)]
    plan = plan_of(nodes, {f"w{i}": weights(32, 40, seed=i) for i in range(3)})
    found = [layer.name for layer in plan.layers]
    assert found == ["n" * 80, "N" * 78 + "_2", "n" * 78 + "_3"]


def test_canonical_matrix() -> None:
    kernel, matrix = weights(16, 8, 3, 5), weights(32, 40)
    plan = plan_of(
        [
            node("Conv", ["x", "k"], ["c"]),
            node("MatMul", ["x", "m"], ["p"]),
            node("Gemm", ["x", "g"], ["q"], alpha=2.0),
            node("Gemm", ["x", "h"], ["r"], transB=1),
            node("Gather", ["t", "ids"], ["y"]),
        ],
        {"k": kernel, "m": matrix, "g": matrix, "h": matrix, "t": 3 * matrix},
    )
    conv, product, scaled, transposed, table = (layer.weight for layer in plan.layers)
    rows, y, x, channel = 5, 2, 4, 3
    assert conv[rows, (y * 5 + x) * 8 + channel] == kernel[rows, channel, y, x]
    np.testing.assert_array_equal(product, matrix.T)
    np.testing.assert_array_equal(scaled, 2 * matrix.T)
    np.testing.assert_array_equal(transposed, matrix)
    np.testing.assert_array_equal(table, 3 * matrix)
    assert all(layer.weight.flags.c_contiguous for layer in plan.layers)
    assert [layer.initializers for layer in plan.layers] == [(n,) for n in "kmght"]


def activation_after(*behind: onnx.NodeProto, opset: int = 13, **constants: float) -> Activation:
    values = {key: np.array(value, np.float32) for key, value in constants.items()}
    plan = plan_of(
        [node("MatMul", ["x", "w"], ["a"]), *behind, node("Tanh", [behind[-1].output[0]], ["y"])],
        {"w": weights(32, 40), **values},
        opset,
    )
    assert plan.layers[0].uses[0].output == behind[-1].output[0]
    return plan.layers[0].uses[0].activation


def test_activations() -> None:
    relu, clip = node("Relu", ["a"], ["b"]), node("Clip", ["b", "low", "high"], ["c"])
    old_clip = node("Clip", ["a"], ["b"], max=6.0)
    assert activation_after(relu) == Activation(0.0, UNBOUNDED)
    assert activation_after(old_clip, opset=9) == Activation(-UNBOUNDED, 6.0)
    assert activation_after(relu, clip, low=-1, high=3) == Activation(0.0, 3.0)
    assert activation_after(relu, clip, low=1, high=3) == Activation(1.0, 3.0)
    assert activation_after(relu, clip, low=-4, high=-3) == Activation(-3.0, -3.0)
    crossed = node("Clip", ["a", "low", "high"], ["b"])  # ONNX: everything becomes the maximum
    assert activation_after(crossed, low=3, high=1) == Activation(1.0, 1.0)
    only_high = node("Clip", ["a", "", "high"], ["b"])
    assert activation_after(only_high, high=1) == Activation(-UNBOUNDED, 1.0)


def test_clip_with_computed_bounds_stays() -> None:
    plan = plan_of(
        [
            node("MatMul", ["x", "w"], ["a"]),
            node("ReduceMax", ["x"], ["m"], keepdims=0),
            node("Clip", ["a", "", "m"], ["y"]),
        ],
        {"w": weights(32, 40)},
    )
    assert plan.layers[0].uses[0].output == "a"


def test_output_that_a_body_reads_is_not_fused() -> None:
    branch = models.graph([node("Neg", ["a"], ["t"])], {}, {"t": (FLOAT, None)})
    plan = plan_of(
        [
            node("MatMul", ["x", "w"], ["a"]),
            node("Relu", ["a"], ["r"]),
            node("ReduceMax", ["x"], ["m"], keepdims=0),
            node("Cast", ["m"], ["flag"], to=9),
            node("If", ["flag"], ["s"], then_branch=branch, else_branch=branch),
            node("Add", ["r", "s"], ["y"]),
        ],
        {"w": weights(32, 40)},
    )
    assert plan.layers[0].uses[0].output == "a"


@pytest.mark.parametrize(
    "shape, fused",
    [
        ((40,), True),
        ((1, 40), True),
        ((1, 1, 40), True),
        ((1, 1, 1, 40), False),
        ((), True),
        ((3, 40), False),
        ((3, 1), False),
    ],
)
def test_bias_shapes_of_a_matmul(shape: tuple[int, ...], fused: bool) -> None:
    source = models.model(
        [node("MatMul", ["x", "w"], ["p"]), node("Add", ["b", "p"], ["y"])],
        {"x": (FLOAT, ["n", 3, 32])},
        {"y": (FLOAT, None)},
        {"w": weights(32, 40), "b": weights(*shape)},
    )
    (layer,) = find_layers(source).layers
    assert (layer.bias is not None) == fused
    if fused:
        want = np.broadcast_to(weights(*shape).reshape(-1), 40)
        np.testing.assert_array_equal(layer.bias, want)
        assert layer.initializers == ("w", "b")


@pytest.mark.parametrize(
    "rows, shape, fused",
    [
        (16, (16, 1, 1), True),
        (16, (1, 16, 1, 1), True),
        (16, (1,), True),
        (16, (16,), False),
        (16, (16, 1), False),
        (16, (1, 1, 1, 1, 1), False),
        (1, (5,), False),
    ],
)
def test_bias_shapes_behind_a_conv(rows: int, shape: tuple[int, ...], fused: bool) -> None:
    nodes = [node("Conv", ["x", "w"], ["p"]), node("Add", ["p", "b"], ["y"])]
    plan = plan_of(nodes, {"w": weights(rows, 128, 3, 3), "b": weights(*shape)})
    assert (plan.layers[0].bias is not None) == fused


def test_execution_order_and_places() -> None:
    body = models.graph([node("MatMul", ["x", "b"], ["t"])], {}, {"t": (FLOAT, None)})
    plan = plan_of(
        [
            node("MatMul", ["x", "a"], ["p"], name="first"),
            node("Cast", ["ids"], ["flag"], to=9),
            node("If", ["flag"], ["q"], then_branch=body, else_branch=body),
            node("MatMul", ["q", "c"], ["y"], name="last"),
        ],
        {name: weights(40, 40, seed=i) for i, name in enumerate("abc")},
    )
    assert [layer.name for layer in plan.layers] == ["first", "t", "last"]
    assert [use.is_body for layer in plan.layers for use in layer.uses] == [0, 1, 1, 0]
