"""From a model file to the bank's graph: the same numbers come out, and the weights are gone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from bapq_edge.engine.graph import RUN_INPUT
from bapq_edge.errors import UnsupportedModelError
from bapq_tools.onnx_graph.assemble import assemble
from bapq_tools.onnx_graph.fold import fold
from bapq_tools.onnx_graph.importers.onnx_file import load_model
from bapq_tools.onnx_graph.ir import LayerPlan
from bapq_tools.onnx_graph.layers import find_layers
from support import onnx_models as models
from support.onnx_models import FLOAT, INT32, INT64, weights

node = helper.make_node


def compile_model(source: onnx.ModelProto, folder: Path) -> tuple[bytes, LayerPlan]:
    path = folder / "model.onnx"
    path.write_bytes(source.SerializeToString())
    folded = fold(load_model(path))
    plan = find_layers(folded)
    return assemble(folded, plan), plan


def check(
    source: onnx.ModelProto,
    feeds: Mapping[str, np.ndarray],
    folder: Path,
    layers: int,
    tolerance: float = 2e-6,
) -> tuple[bytes, LayerPlan]:
    """The assembled model computes what the source does, and holds no heavy weight."""
    assembled, plan = compile_model(source, folder)
    expected = models.run(source, feeds)
    found = models.run(models.standard_model(assembled, plan), feeds)
    assert len(expected) == len(found)
    for want, have in zip(expected, found, strict=True):
        assert want.dtype == have.dtype
        assert want.shape == have.shape
        np.testing.assert_allclose(have, want, rtol=0, atol=tolerance * np.abs(want).max())
    assert len(plan.layers) == layers
    assert len(assembled) < 20_000
    names = models.operator_names(assembled)
    assert all(names) and len(set(names)) == len(names), "ORT refuses custom nodes otherwise"
    return assembled, plan


def conv(weight: np.ndarray, inputs: list[str], outputs: list[str], **attributes: object):
    return node("Conv", inputs, outputs, kernel_shape=list(weight.shape[2:]), **attributes)


@pytest.mark.parametrize("opset", [9, 11, 13, 17, 21, models.NEWEST_OPSET])
def test_network_of_every_operator(opset: int, tmp_path: Path) -> None:
    kernel = weights(32, 8, 3, 3)
    source = models.model(
        [
            node("Gather", ["table", "ids"], ["rows"], name="/embed/Gather"),
            node("Reshape", ["rows", "image"], ["x"]),
            conv(kernel, ["x", "kernel", "kernel_bias"], ["c"], pads=[1, 1, 1, 1]),
            node("Relu", ["c"], ["r"]),
            node("GlobalAveragePool", ["r"], ["pool"]),
            node("Flatten", ["pool"], ["flat"]),
            node("Gemm", ["flat", "fc", "fc_bias"], ["hidden"], transB=1),
            node("Tanh", ["hidden"], ["t"]),
            node("MatMul", ["t", "head"], ["logits"]),
            node("Add", ["logits", "head_bias"], ["y"]),
        ],
        {"ids": (INT64, ["batch", 32])},
        {"y": (FLOAT, ["batch", 40])},
        {
            "table": weights(50, 36),
            "image": np.array([-1, 8, 12, 12], np.int64),
            "kernel": kernel,
            "kernel_bias": weights(32),
            "fc": weights(64, 32),
            "fc_bias": weights(64),
            "head": weights(64, 40),
            "head_bias": weights(40),
        },
        opset=opset,
    )
    ids = np.random.default_rng(0).integers(-50, 50, (3, 32))
    assembled, _ = check(source, {"ids": ids}, tmp_path, layers=4)
    kinds = models.operators(assembled)
    assert kinds == [
        "Cast", "bapq.Gather", "Reshape", "bapq.Conv", "GlobalAveragePool", "Flatten",
        "bapq.Gemm", "Tanh", "bapq.MatMul",
    ]  # fmt: skip


def test_borders_and_metadata_survive(tmp_path: Path) -> None:
    source = models.model(
        [node("MatMul", ["x", "w"], ["y"])],
        {"x": (FLOAT, ["batch", "sequence", 32])},
        {"y": (FLOAT, ["batch", "sequence", 40])},
        {"w": weights(32, 40)},
    )
    helper.set_model_props(source, {"labels": "a,b"})
    x = weights(2, 5, 32)
    assembled, _ = check(source, {"x": x}, tmp_path, layers=1)
    built = onnx.load_model_from_string(assembled)
    assert built.graph.input[0] == source.graph.input[0]
    assert list(built.graph.output) == list(source.graph.output)
    assert built.metadata_props == source.metadata_props
    run = built.graph.input[1]
    assert (run.name, run.type.tensor_type.elem_type) == (RUN_INPUT, TensorProto.INT64)
    assert run.type.tensor_type.HasField("shape")
    assert not run.type.tensor_type.shape.dim
    assert [(item.domain, item.version) for item in built.opset_import] == [("", 13), ("bapq", 1)]
    assert compile_model(source, tmp_path)[0] == assembled


@pytest.mark.parametrize("beta", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("bias_shape", [(40,), (1, 40), (1,), (), (4, 1), (4, 40), None])
@pytest.mark.parametrize("opset", [9, 13])
def test_gemm(opset: int, bias_shape: tuple[int, ...] | None, beta: float, tmp_path: Path) -> None:
    if bias_shape is None and opset < 11:
        bias_shape = (40,)
    constants = {"w": weights(32, 40)}
    if bias_shape is not None:
        constants["c"] = weights(*bias_shape)
    source = models.model(
        [
            node("Gemm", ["x", *constants], ["g"], alpha=1.5, beta=beta),
            node("Clip", ["g"], ["y"], min=-1.0, max=2.0)
            if opset < 11
            else node("Relu", ["g"], ["y"]),
        ],
        {"x": (FLOAT, [4, 32])},
        {"y": (FLOAT, None)},
        constants,
        opset=opset,
    )
    assembled, plan = check(source, {"x": weights(4, 32)}, tmp_path, layers=1)
    fused = bias_shape in ((40,), (1, 40), (1,), (), None) or beta == 0
    assert (models.operators(assembled) == ["bapq.Gemm"]) == fused
    assert (plan.layers[0].bias is not None) == (fused and beta != 0 and bias_shape is not None)


def test_gemm_with_computed_bias(tmp_path: Path) -> None:
    source = models.model(
        [
            node("Gemm", ["x", "w", "c"], ["g"], beta=0.5),
            node("Gemm", ["x", "v", "c"], ["h"]),
            node("Add", ["g", "h"], ["y"]),
        ],
        {"x": (FLOAT, ["m", 32]), "c": (FLOAT, ["m", 1])},
        {"y": (FLOAT, ["m", 40])},
        {"w": weights(32, 40), "v": weights(32, 40, seed=1)},
    )
    assembled, _ = check(source, {"x": weights(4, 32), "c": weights(4, 1)}, tmp_path, layers=2)
    assert models.operators(assembled).count("bapq.Gemm") == 2


CONVOLUTIONS = {
    "plain": ((16, 8, 3, 3), {}),
    "pads": ((16, 8, 3, 5), {"pads": [1, 2, 0, 3]}),
    "strides": ((16, 8, 3, 3), {"strides": [2, 3], "pads": [1, 1, 1, 1]}),
    "dilation": ((16, 8, 3, 3), {"dilations": [2, 3]}),
    "groups": ((32, 4, 3, 4), {"group": 2}),
    "depthwise": ((32, 1, 3, 3), {"group": 8, "strides": [2, 1]}),
    "pointwise groups": ((64, 8, 2, 1), {"group": 1, "strides": [1, 2]}),
    "same upper": ((16, 8, 4, 3), {"auto_pad": "SAME_UPPER", "strides": [2, 1]}),
    "same lower": ((16, 8, 4, 3), {"auto_pad": "SAME_LOWER", "strides": [2, 1]}),
    "valid": ((16, 8, 3, 3), {"auto_pad": "VALID"}),
    "1-D": ((32, 8, 5), {"pads": [1, 3], "strides": [2], "dilations": [2]}),
    "1-D groups": ((64, 4, 5), {"group": 2, "pads": [2, 2]}),
    "1-D same": ((32, 8, 4), {"auto_pad": "SAME_LOWER"}),
}


@pytest.mark.parametrize("case", CONVOLUTIONS)
@pytest.mark.parametrize("own_bias", [True, False])
def test_conv(case: str, own_bias: bool, tmp_path: Path) -> None:
    shape, attributes = CONVOLUTIONS[case]
    kernel = weights(*shape)
    space = [1] * (len(shape) - 2)
    bias = weights(shape[0])
    if own_bias:
        nodes = [conv(kernel, ["x", "w", "b"], ["c"], **attributes)]
    else:
        bias = bias.reshape([1, -1, *space])
        nodes = [conv(kernel, ["x", "w"], ["p"], **attributes), node("Add", ["b", "p"], ["c"])]
    source = models.model(
        [*nodes, node("Relu", ["c"], ["y"])],
        {"x": (FLOAT, ["batch", 8, *(f"s{i}" for i in range(len(space)))])},
        {"y": (FLOAT, None)},
        {"w": kernel, "b": bias},
        opset=13,
    )
    assembled, plan = check(source, {"x": weights(2, 8, *[14 for _ in space])}, tmp_path, layers=1)
    depthwise = case == "depthwise"
    assert models.operators(assembled) == ["bapq.DepthwiseConv" if depthwise else "bapq.Conv"]
    assert plan.layers[0].weight.shape == (shape[0], kernel.size // shape[0])


def test_tied_embedding_and_head(tmp_path: Path) -> None:
    source = models.model(
        [
            node("Gather", ["table", "ids"], ["e"]),
            node("Transpose", ["table"], ["head"], perm=[1, 0]),
            node("MatMul", ["e", "head"], ["logits"]),
            node("Add", ["logits", "bias"], ["y"]),
        ],
        {"ids": (INT32, ["batch", "sequence"])},
        {"y": (FLOAT, ["batch", "sequence", 60])},
        {"table": weights(60, 32), "bias": weights(60)},
    )
    ids = np.array([[0, 59, -1, 7], [1, 2, 3, -60]], np.int32)
    _, plan = check(source, {"ids": ids}, tmp_path, layers=1)
    assert [use.operator for use in plan.layers[0].uses] == ["Gather", "MatMul"]
    assert plan.layers[0].bias is not None


@pytest.mark.parametrize("agree", [True, False])
def test_shared_weights_fuse_a_bias_only_when_all_agree(agree: bool, tmp_path: Path) -> None:
    source = models.model(
        [
            node("MatMul", ["x", "w"], ["p"]),
            node("Add", ["p", "b"], ["q"]),
            node("Relu", ["q"], ["r"]),
            node("Gemm", ["x", "wt", "c"], ["s"], transB=1),
            node("Relu", ["s"], ["t"]),
            node("Sub", ["r", "t"], ["y"]),
        ],
        {"x": (FLOAT, [4, 32])},
        {"y": (FLOAT, None), "r": (FLOAT, None)},
        {
            "w": weights(32, 40),
            "wt": weights(32, 40).T.copy(),
            "b": weights(40),
            "c": weights(40, seed=0 if agree else 1),
        },
    )
    assembled, plan = check(source, {"x": weights(4, 32)}, tmp_path, layers=1)
    assert (plan.layers[0].bias is not None) == agree
    assert models.operators(assembled).count("Add") == (0 if agree else 2)


def test_convs_that_share_weights_and_differ_in_bias(tmp_path: Path) -> None:
    kernel = weights(16, 8, 3, 3)
    source = models.model(
        [
            conv(kernel, ["x", "w", "b"], ["p"]),
            conv(kernel, ["x", "w", "c"], ["q"]),
            node("Relu", ["p"], ["r"]),
            node("Mul", ["r", "q"], ["y"]),
        ],
        {"x": (FLOAT, ["n", 8, 9, 9])},
        {"y": (FLOAT, None)},
        {"w": kernel, "b": weights(16), "c": weights(16, seed=1)},
    )
    assembled, plan = check(source, {"x": weights(2, 8, 9, 9)}, tmp_path, layers=1)
    assert plan.layers[0].bias is None
    assert models.operators(assembled).count("Add") == 2


def test_nothing_is_fused_over_a_graph_output(tmp_path: Path) -> None:
    source = models.model(
        [
            node("MatMul", ["x", "w"], ["p"]),
            node("Add", ["p", "b"], ["q"]),
            node("Relu", ["q"], ["y"]),
        ],
        {"x": (FLOAT, [4, 32])},
        {"y": (FLOAT, [4, 40]), "p": (FLOAT, [4, 40])},
        {"w": weights(32, 40), "b": weights(40)},
    )
    assembled, _ = check(source, {"x": weights(4, 32)}, tmp_path, layers=1)
    assert models.operators(assembled) == ["bapq.MatMul", "Add", "Relu"]


def test_bias_used_twice(tmp_path: Path) -> None:
    source = models.model(
        [
            node("MatMul", ["x", "w"], ["p"]),
            node("Add", ["p", "b"], ["q"]),
            node("MatMul", ["x", "v"], ["r"]),
            node("Add", ["r", "b"], ["s"]),
            node("Mul", ["q", "s"], ["t"]),
            node("Sub", ["t", "b"], ["y"]),
        ],
        {"x": (FLOAT, [4, 32])},
        {"y": (FLOAT, [4, 40])},
        {"w": weights(32, 40), "v": weights(32, 40, seed=1), "b": weights(40)},
    )
    assembled, _ = check(source, {"x": weights(4, 32)}, tmp_path, layers=2)
    assert models.operators(assembled) == ["bapq.MatMul", "bapq.MatMul", "Mul", "Sub"]


def test_if_branches_with_weights(tmp_path: Path) -> None:
    then = models.graph(
        [node("MatMul", ["x", "tw"], ["tp"]), node("Relu", ["tp"], ["ty"])],
        {},
        {"ty": (FLOAT, None)},
        {"tw": weights(32, 40)},
        name="then",
    )
    otherwise = models.graph(
        [node("MatMul", ["x", "w"], ["ep"]), node("Add", ["ep", "b"], ["ey"])],
        {},
        {"ey": (FLOAT, None)},
        name="else",
    )
    source = models.model(
        [node("If", ["flag"], ["y"], then_branch=then, else_branch=otherwise)],
        {"x": (FLOAT, ["m", 32]), "flag": (TensorProto.BOOL, [])},
        {"y": (FLOAT, ["m", 40])},
        {"w": weights(32, 40, seed=1), "b": weights(40)},
    )
    for flag in (True, False):
        feeds = {"x": weights(4, 32), "flag": np.array(flag)}
        assembled, plan = check(source, feeds, tmp_path, layers=2)
    assert all(use.is_body for layer in plan.layers for use in layer.uses)
    assert sorted(models.operators(assembled)) == ["If", "bapq.MatMul", "bapq.MatMul"]


def test_loop_body_with_weights_of_the_outer_graph(tmp_path: Path) -> None:
    body = models.graph(
        [
            node("MatMul", ["h", "w"], ["hp"]),
            node("Tanh", ["hp"], ["h_next"]),
            node("Identity", ["go"], ["go_next"]),
        ],
        {"i": (INT64, []), "go": (TensorProto.BOOL, []), "h": (FLOAT, [4, 32])},
        {"go_next": (TensorProto.BOOL, []), "h_next": (FLOAT, [4, 32])},
        name="body",
    )
    source = models.model(
        [
            node("MatMul", ["x", "w"], ["h0"]),
            node("Loop", ["count", "", "h0"], ["y"], body=body),
        ],
        {"x": (FLOAT, [4, 32]), "count": (INT64, [])},
        {"y": (FLOAT, [4, 32])},
        {"w": weights(32, 32)},
    )
    feeds = {"x": weights(4, 32), "count": np.array(3)}
    _, plan = check(source, feeds, tmp_path, layers=1)
    assert [use.is_body for use in plan.layers[0].uses] == [False, True]


def test_constant_nodes_and_constant_indices(tmp_path: Path) -> None:
    source = models.model(
        [
            node("Constant", [], ["w"], value=numpy_helper.from_array(weights(32, 40))),
            node("Constant", [], ["low"], value_float=-0.5),
            node("MatMul", ["x", "w"], ["p"]),
            node("Clip", ["p", "low"], ["y"]),
        ],
        {"x": (FLOAT, [4, 32])},
        {"y": (FLOAT, None)},
    )
    assembled, plan = check(source, {"x": weights(4, 32)}, tmp_path, layers=1)
    assert models.operators(assembled) == ["bapq.MatMul"]
    assert plan.layers[0].uses[0].activation.low == -0.5


def test_half_float_model_keeps_its_borders(tmp_path: Path) -> None:
    half = TensorProto.FLOAT16
    source = models.model(
        [
            node("Gemm", ["x", "w", "b"], ["h"], alpha=0.5),
            node("Relu", ["h"], ["r"]),
            node("MatMul", ["r", "v"], ["y"]),
        ],
        {"x": (half, ["batch", 32])},
        {"y": (half, ["batch", 32])},
        {name: weights(*shape).astype(np.float16)
         for name, shape in (("w", (32, 40)), ("b", (40,)), ("v", (40, 32)))},
    )  # fmt: skip
    x = weights(3, 32).astype(np.float16)
    assembled, _ = check(source, {"x": x}, tmp_path, layers=2, tolerance=2e-3)
    assert models.operators(assembled) == ["Cast", "bapq.Gemm", "bapq.MatMul", "Cast"]


def test_vector_times_matrix(tmp_path: Path) -> None:
    source = models.model(
        [node("MatMul", ["x", "w"], ["p"]), node("Add", ["p", "b"], ["y"])],
        {"x": (FLOAT, [32])},
        {"y": (FLOAT, None)},
        {"w": weights(32, 40), "b": weights(1, 1, 40)},
    )
    assembled, _ = check(source, {"x": weights(32)}, tmp_path, layers=1)
    assert models.operators(assembled) == ["bapq.MatMul", "Add"], "the Add changes the rank"


def test_our_input_name_is_refused(tmp_path: Path) -> None:
    source = models.model(
        [node("MatMul", [RUN_INPUT, "w"], ["y"])],
        {RUN_INPUT: (FLOAT, [4, 32])},
        {"y": (FLOAT, None)},
        {"w": weights(32, 40)},
    )
    with pytest.raises(UnsupportedModelError, match="rename"):
        compile_model(source, tmp_path)


def test_plan_of_another_model_is_refused(tmp_path: Path) -> None:
    source = models.model(
        [node("MatMul", ["x", "w"], ["y"])],
        {"x": (FLOAT, [4, 32])},
        {"y": (FLOAT, None)},
        {"w": weights(32, 40)},
    )
    other = onnx.ModelProto.FromString(source.SerializeToString())
    with pytest.raises(ValueError, match="another model"):
        assemble(other, find_layers(source))
