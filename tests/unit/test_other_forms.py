"""Lookups, sums and convolutions in other forms become layers, and give the same numbers."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.reference
import pytest
from onnx import helper

import bapq_edge
from bapq_edge.bank.reader import Bank
from bapq_edge.errors import RunInputError
from bapq_tools import build_bank
from support import onnx_models as models
from support.onnx_models import FLOAT, INT64, weights

pytestmark = pytest.mark.filterwarnings("ignore::bapq_edge.errors.UncalibratedWarning")

node = helper.make_node


def check(layer, feeds, constants, tmp_path, *, opset=17, fixed=False):
    """Build a bank of one layer and hold it against ONNX Runtime.

    Where that has its own idea of SAME_UPPER and SAME_LOWER, against the reference of ONNX, which
    in turn knows no groups.
    """
    types = {np.dtype(np.float32): FLOAT, np.dtype(np.int64): INT64}
    model = models.model(
        [layer],
        {k: (types[v.dtype], v.shape if fixed else [None] * v.ndim) for k, v in feeds.items()},
        {"y": (FLOAT, None)},
        constants,
        opset=opset,
    )
    if any(item.name == "auto_pad" for item in layer.attribute):
        (wanted,) = onnx.reference.ReferenceEvaluator(model).run(None, feeds)
    else:
        (wanted,) = models.run(model, feeds)
    bank = tmp_path / "m.bank"
    report = build_bank(model, bank, levels=[32, 8], workers=1, progress=False)
    assert [entry.name for entry in Bank.open(bank).manifest.layers] == ["layer"]
    assert report.kept_in_float == 0
    with bapq_edge.Session(bank, level=32) as session:
        (have,) = session.run(None, feeds)
        assert have.shape == wanted.shape
        np.testing.assert_allclose(have, wanted, rtol=1e-4, atol=1e-4)
        session.set_level(8)
        assert np.linalg.norm(session.run(None, feeds)[0] - wanted) < 0.02 * np.linalg.norm(wanted)
    return bank


INDICES = np.array([[3, 0, -1], [5, 2, 1]])


@pytest.mark.parametrize("indices", [INDICES, INDICES[0], np.array(-2)], ids=["2-D", "1-D", "0-D"])
@pytest.mark.parametrize(
    "shape, axis",
    [
        ((8, 200), 0),
        ((200, 8), 1),
        ((200, 8), -1),
        ((8, 20, 30), 0),
        ((20, 8, 30), 1),
        ((5, 40, 8), 2),
    ],
)
def test_a_lookup_along_any_axis_is_one_of_rows(shape, axis, indices, tmp_path):
    layer = node("Gather", ["w", "i"], ["y"], "layer", axis=axis)
    check(layer, {"i": indices}, {"w": weights(*shape)}, tmp_path)


@pytest.mark.parametrize("begin, end, step", [(0, 7, 1), (-9, 1000, 2), (30, -35, -1)])
def test_rows_that_are_cut_out_are_looked_up(begin, end, step, tmp_path):
    """Positions, of which a transformer takes as many as there are tokens."""
    layer = node("Slice", ["w", "begin", "end", "axis", "step"], ["y"], "layer")
    constants = {"w": weights(40, 30), "axis": np.array([0]), "step": np.array([step])}
    feeds = {"begin": np.array([begin]), "end": np.array([end])}
    check(layer, feeds, constants, tmp_path)


@pytest.mark.parametrize("opset", [12, 17])
@pytest.mark.parametrize(
    "shape, depth", [((40, 30), 1), ((8, 9, 30), 2), ((8, 9, 30), 1), ((4, 5, 6, 7, 8), 3)]
)
def test_a_lookup_by_several_indices_is_one_of_rows(shape, depth, opset, tmp_path):
    rng = np.random.default_rng(0)
    sizes = shape[:depth]
    indices = rng.integers([-size for size in sizes], sizes, (3, 5, depth))
    layer = node("GatherND", ["w", "i"], ["y"], "layer")
    constants = {"w": weights(*shape)}
    model_indices = {"i": indices}
    bank = check(layer, model_indices, constants, tmp_path, opset=opset, fixed=True)
    for wrong in (sizes[-1], -sizes[-1] - 1):
        indices[1, 2, -1] = wrong
        with (
            bapq_edge.Session(bank) as session,
            pytest.raises(RunInputError, match="is outside a table of"),
        ):
            session.run(None, {"i": indices})


@pytest.mark.parametrize(
    "equation, x, w",
    [
        ("bsd,df->bsf", (2, 5, 32), (32, 48)),
        ("bsd,fd->bsf", (2, 5, 32), (48, 32)),
        ("bsd,dhk->bshk", (2, 5, 32), (32, 4, 12)),
        ("bshk,hkd->bsd", (2, 5, 4, 8), (4, 8, 40)),
        ("bsd , dhk -> bhsk", (2, 5, 32), (32, 4, 12)),
        ("bds,df->fbs", (2, 32, 5), (32, 48)),
        ("d,df", (32,), (32, 48)),
        ("fd,bd->bf", (48, 32), (3, 32)),
    ],
)
def test_a_sum_over_shared_letters_is_a_product(equation, x, w, tmp_path):
    left = equation.startswith("fd")
    constants = {"w": weights(*(x if left else w))}
    feeds = {"x": weights(*(w if left else x))}
    layer = node("Einsum", ["w", "x"] if left else ["x", "w"], ["y"], "layer", equation=equation)
    check(layer, feeds, constants, tmp_path)


TRANSPOSED = {  # x, w, attributes
    "stride of the kernel": ((2, 16, 5, 6), (16, 20, 2, 2), {"strides": [2, 2]}),
    "4 taps, stride 2": ((1, 16, 5, 6), (16, 8, 4, 4), {"strides": [2, 2], "pads": [1] * 4}),
    "3 taps, stride 2": (
        (1, 16, 5, 6),
        (16, 8, 3, 3),
        {"strides": [2, 2], "pads": [1] * 4, "output_padding": [1, 1]},
    ),
    "stride 1": ((1, 16, 5, 6), (16, 8, 3, 3), {"pads": [1, 0, 1, 2]}),
    "stride 1, wide pads": ((1, 16, 9, 9), (16, 8, 3, 3), {"pads": [3, 3, 3, 3]}),
    "dilated": ((1, 16, 5, 6), (16, 8, 3, 3), {"dilations": [2, 1]}),
    "dilated, stride 2": (
        (1, 16, 5, 6),
        (16, 8, 3, 3),
        {"dilations": [2, 2], "strides": [2, 2], "pads": [1, 2, 0, 1]},
    ),
    "stride above the kernel": (
        (1, 16, 5, 6),
        (16, 32, 2, 2),
        {"strides": [3, 3], "output_padding": [2, 0]},
    ),
    "pads above the stride": ((1, 16, 9, 9), (16, 8, 5, 5), {"strides": [2, 2], "pads": [4] * 4}),
    "groups": ((2, 16, 5, 6), (16, 8, 4, 4), {"strides": [2, 2], "pads": [1] * 4, "group": 4}),
    "depthwise": ((2, 64, 5, 6), (64, 1, 4, 4), {"strides": [2, 2], "pads": [1] * 4, "group": 64}),
    "SAME_UPPER": ((1, 16, 5, 6), (16, 8, 3, 3), {"strides": [2, 2], "auto_pad": "SAME_UPPER"}),
    "SAME_LOWER": ((1, 16, 5, 6), (16, 8, 3, 3), {"strides": [2, 2], "auto_pad": "SAME_LOWER"}),
    "uneven strides": ((2, 16, 5, 6), (16, 8, 3, 4), {"strides": [1, 2], "pads": [1, 1, 1, 1]}),
    "1-D": ((2, 16, 9), (16, 8, 16), {"strides": [8], "pads": [4, 4]}),
    "1-D, odd": ((2, 16, 9), (16, 8, 11), {"strides": [4], "pads": [2, 3], "output_padding": [2]}),
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("case", TRANSPOSED)
def test_a_transposed_convolution_is_a_plain_one(case, bias, tmp_path):
    x, w, attributes = TRANSPOSED[case]
    constants = {"w": weights(*w)}
    if bias:
        constants["b"] = weights(w[1] * attributes.get("group", 1))
    layer = node("ConvTranspose", ["x", *constants], ["y"], "layer", **attributes)
    check(layer, {"x": weights(*x)}, constants, tmp_path, fixed=case.startswith("uneven"))


@pytest.mark.parametrize(
    "attributes",
    [
        {},
        {"pads": [1, 1, 1, 1, 1, 1]},
        {"pads": [0, 1, 0, 1, 0, 2], "strides": [2, 1, 2]},
        {"dilations": [2, 1, 1], "pads": [2, 0, 0, 1, 0, 0]},
    ],
    ids=str,
)
def test_a_3_d_convolution_is_one_of_stacked_images(attributes, tmp_path):
    layer = node("Conv", ["x", "w", "b"], ["y"], "layer", **attributes)
    constants = {"w": weights(16, 4, 3, 3, 3), "b": weights(16)}
    check(layer, {"x": weights(2, 4, 7, 6, 5)}, constants, tmp_path)


KEPT = {
    "3-D convolution in groups": (
        node("Conv", ["x", "w"], ["k"], "kept", group=2),
        (2, 8, 5, 5, 5),
        (16, 4, 3, 3, 3),
    ),
    "transposed convolution with output_shape": (
        node("ConvTranspose", ["x", "w"], ["k"], "kept", output_shape=[9, 9], strides=[2, 2]),
        (2, 16, 4, 4),
        (16, 8, 3, 3),
    ),
    "no chunk operator for Einsum": (
        node("Einsum", ["x", "w"], ["k"], "kept", equation="bij,bjk->bik"),
        (2, 5, 32),
        (2, 32, 20),
    ),
}


@pytest.mark.parametrize("reason", KEPT)
def test_what_has_no_such_form_stays_with_its_reason(reason, tmp_path):
    kept, x, w = KEPT[reason]
    model = models.model(
        [kept, node("MatMul", ["v", "m"], ["y"], "layer")],
        {"x": (FLOAT, x), "v": (FLOAT, [None, 32])},
        {"k": (FLOAT, None), "y": (FLOAT, None)},
        {"w": weights(*w), "m": weights(32, 40)},
    )
    feeds = {"x": weights(*x), "v": weights(3, 32)}
    bank = tmp_path / "m.bank"
    build_bank(model, bank, levels=[8], workers=1, progress=False)
    (entry,) = Bank.open(bank).manifest.kept_in_float
    assert entry.reason.startswith(reason)
    with bapq_edge.Session(bank) as session:
        np.testing.assert_array_equal(session.run(["k"], feeds)[0], models.run(model, feeds)[0])


@pytest.mark.parametrize("turned", ["Gemm", "Transpose", "FusedMatMul", "Gather", "Einsum"])
def test_a_table_that_is_also_the_last_product_is_stored_once(turned, tmp_path):
    """Tied embeddings: the rows that a lookup reads are the outputs of the product."""
    nodes = [node("Gather", ["w", "i"], ["e"], "embed")]
    if turned == "Gemm":
        nodes.append(node("Gemm", ["e", "w"], ["y"], "head", transB=1))
    elif turned == "Transpose":
        nodes += [node("Transpose", ["w"], ["t"]), node("MatMul", ["e", "t"], ["y"], "head")]
    elif turned == "Einsum":
        nodes.append(node("Einsum", ["e", "w"], ["y"], "head", equation="nd,vd->nv"))
    elif turned == "Gather":
        nodes += [
            node("Transpose", ["w"], ["t"]),
            node("Gather", ["t", "i"], ["u"], "columns", axis=1),
            node("MatMul", ["e", "u"], ["y"]),
        ]
    else:
        nodes.append(
            node("FusedMatMul", ["e", "w"], ["y"], "head", domain="com.microsoft", transB=1)
        )
    model = models.model(
        nodes,
        {"i": (INT64, ["n"])},
        {"y": (FLOAT, None)},
        {"w": weights(60, 32)},
        domains=[("com.microsoft", 1)],
    )
    feeds = {"i": np.array([3, 0, 59])}
    bank = tmp_path / "m.bank"
    build_bank(model, bank, levels=[32, 8], workers=1, progress=False)
    assert len(Bank.open(bank).manifest.layers) == 1
    with bapq_edge.Session(bank, level=32) as session:
        np.testing.assert_allclose(
            session.run(None, feeds)[0], models.run(model, feeds)[0], rtol=1e-4, atol=1e-4
        )
