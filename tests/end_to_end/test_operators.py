"""Our operators inside ONNX Runtime against NumPy: every level, kernel family and ragged shape."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from onnx import TensorProto, helper

from bapq_edge import Session
from bapq_edge.bank.codes import LayerCodes, dequantize
from bapq_edge.bank.layout import LEVELS
from bapq_edge.errors import BankFormatError, RunInputError
from support.banks import NO_CLIP, graph_bytes, node, random_codes, write_bank
from support.internals import adopt, plan_of
from support.kernel_library import open_library
from support.operators import (
    SCALE_COLUMNS,
    Conv,
    assert_within,
    conv_attributes,
    conv_reference,
    describe,
    finish,
    matmul_reference,
)

MATMULS = [  # m, columns, rows, chunk_rows, bias, clip, residual_steps
    (1, 32, 16, 16, False, None, 15),
    (1, 1, 1, 16, True, None, 15),
    (3, 33, 17, 16, True, (0.0, NO_CLIP), 8),
    (7, 100, 50, 32, True, (0.0, 6.0), 13),
    (17, 129, 70, 48, False, (-1.0, 1.0), 16),
    (65, 384, 40, 16, True, None, 15),
    (130, 64, 200, 64, True, None, 12),
]


@pytest.mark.parametrize("case", MATMULS, ids=str)
def test_matmul_matches_numpy_at_every_level(use_isa, tmp_path, case):
    m, columns, rows, chunk_rows, has_bias, clip, steps = case
    rng = np.random.default_rng(columns * rows)
    codes = random_codes(rng, rows, columns, SCALE_COLUMNS, has_bias)
    low, high = clip or (-NO_CLIP, NO_CLIP)
    graph = graph_bytes(
        [node("MatMul", "x", "y", layer=0, use_bias=int(has_bias), clip_low=low, clip_high=high)],
        ["n", "m", columns],
        ["n", "m", rows],
    )
    description = describe(rows, columns, chunk_rows, has_bias, steps)
    bank = write_bank(tmp_path / "b.bank", graph, [("fc", "MatMul", codes, description)])
    x = (rng.standard_normal((2, m, columns)) * 3).astype(np.float32)
    flat = x.reshape(-1, columns)
    with Session(bank, threads=2) as session:
        for level in LEVELS:
            session.set_level(level)
            (y,) = session.run(None, {"x": x})
            expected, bound = matmul_reference(flat, codes, level, steps)
            bias = codes.bias[level] if has_bias else None
            assert_within(y.reshape(-1, rows), finish(expected, bias, low, high), bound)


CONVS = [
    Conv(3, 16, (9, 9), (3, 3), pads=(1, 1, 1, 1)),
    Conv(1, 5, (8, 8), (3, 3), strides=(2, 2), pads=(1, 0, 1, 2)),
    Conv(32, 40, (6, 7), (1, 1)),
    Conv(64, 33, (5, 5), (1, 1), batch=3, positive=True),
    Conv(20, 24, (5, 5), (1, 1), strides=(2, 2)),
    Conv(16, 70, (12, 10), (3, 3), pads=(1, 1, 1, 1), clip=(0.0, NO_CLIP), batch=2),
    Conv(8, 20, (14, 13), (5, 3), strides=(2, 3), pads=(2, 1, 0, 3), dilations=(2, 1)),
    Conv(8, 20, (14, 13), (3, 3), dilations=(1, 2), pads=(2, 2, 2, 2), positive=True),
    Conv(12, 18, (7, 7), (3, 3), group=3, pads=(1, 1, 1, 1), chunk_rows=16),
    Conv(64, 96, (6, 6), (1, 1), group=4),
    Conv(64, 10, (4, 4), (1, 1), group=2, batch=2, clip=(-0.5, 0.5)),
    Conv(6, 9, (7, 8), (4, 3), strides=(2, 2), auto_pad=1),
    Conv(6, 9, (7, 8), (4, 3), strides=(2, 2), auto_pad=2),
    Conv(6, 9, (3, 3), (2, 2), strides=(3, 3), auto_pad=1),
    Conv(256, 16, (3, 3), (3, 3), pads=(1, 1, 1, 1)),
    Conv(4, 16, (30, 30), (3, 3), chunk_rows=16),
]


def conv_bank(path, case, rng):
    """A bank of one convolution, and its codes."""
    columns = case.channels // case.group * case.kernel[0] * case.kernel[1]
    codes = random_codes(rng, case.rows, columns, SCALE_COLUMNS, True)
    graph = graph_bytes(
        [node("Conv", "x", "y", **conv_attributes(case))],
        ["n", case.channels, "h", "w"],
        ["n", case.rows, "oh", "ow"],
    )
    description = describe(case.rows, columns, case.chunk_rows, True)
    return write_bank(path, graph, [("conv", "Conv", codes, description)]), codes


@pytest.mark.parametrize("case", CONVS, ids=str)
def test_conv_matches_numpy_at_every_level(use_isa, tmp_path, case):
    rng = np.random.default_rng(case.channels * case.rows)
    bank, codes = conv_bank(tmp_path / "b.bank", case, rng)
    x = rng.standard_normal((case.batch, case.channels, *case.size)).astype(np.float32)
    x = np.abs(x) if case.positive else x
    with Session(bank, threads=2) as session:
        for level in LEVELS:
            session.set_level(level)
            (y,) = session.run(None, {"x": x})
            expected, bound = conv_reference(case, x, codes, level)
            bias = codes.bias[level].reshape(-1, 1, 1)
            assert_within(y, finish(expected, bias, *case.clip), bound)


FUSED = [  # function, whether a tensor is added, clip
    (1, False, (-NO_CLIP, NO_CLIP)),
    (2, True, (-NO_CLIP, NO_CLIP)),
    (3, True, (0.0, NO_CLIP)),
    (4, False, (-0.1, 0.5)),
    (0, True, (0.0, 1.0)),
]


def fused(product, function, residual, clip):
    """What an operator makes of a product with its bias, (..., rows), to the bit."""
    tiles = np.zeros((product.size // product.shape[-1], -(-product.shape[-1] // 16) * 16))
    tiles = tiles.astype(np.float32)
    tiles[:, : product.shape[-1]] = product.reshape(-1, product.shape[-1])
    if function:
        best = open_library().best()
        tiles = best.apply(function, None, tiles.reshape(-1, 16)).reshape(tiles.shape)
    y = tiles[:, : product.shape[-1]].reshape(product.shape)
    return np.clip(y + residual, *np.float32(clip))


@pytest.mark.parametrize("function, adds, clip", FUSED)
@pytest.mark.parametrize("m, columns, rows", [(1, 32, 16), (9, 70, 37), (70, 64, 40)])
def test_matmul_with_what_follows_it(use_isa, tmp_path, m, columns, rows, function, adds, clip):
    rng = np.random.default_rng([m, function])
    codes = random_codes(rng, rows, columns, SCALE_COLUMNS, True)
    layer = ("fc", "MatMul", codes, describe(rows, columns, 16, True))
    plain = {"layer": 0, "use_bias": 1, "clip_low": -NO_CLIP, "clip_high": NO_CLIP}
    epilogue = {**plain, "function": function, "clip_low": clip[0], "clip_high": clip[1]}
    nodes = [node("MatMul", "x", "p", **plain)] if adds else []
    nodes.append(node("MatMul", "x", "y", *(["p"] if adds else []), **epilogue))
    alone = graph_bytes([node("MatMul", "x", "y", **plain)], ["m", columns], ["m", rows])
    both = graph_bytes(nodes, ["m", columns], ["m", rows])
    x = rng.standard_normal((m, columns)).astype(np.float32)
    with (
        Session(write_bank(tmp_path / "alone.bank", alone, [layer]), threads=2) as before,
        Session(write_bank(tmp_path / "both.bank", both, [layer]), threads=2) as after,
    ):
        for level in LEVELS:
            before.set_level(level)
            after.set_level(level)
            (p,), (y,) = (session.run(None, {"x": x}) for session in (before, after))
            np.testing.assert_array_equal(y, fused(p, function, p if adds else 0, clip))


@pytest.mark.parametrize("function, adds, clip", FUSED)
@pytest.mark.parametrize(
    "case",
    [
        Conv(32, 21, (7, 9), (1, 1), batch=2),
        Conv(6, 18, (7, 7), (3, 3), group=3, pads=(1, 1, 1, 1), chunk_rows=16),
        Conv(3, 40, (11, 5), (3, 3), strides=(2, 1), chunk_rows=16),
    ],
    ids=str,
)
def test_conv_with_what_follows_it(use_isa, tmp_path, case, function, adds, clip):
    rng = np.random.default_rng([case.rows, function])
    columns = case.channels // case.group * case.kernel[0] * case.kernel[1]
    codes = random_codes(rng, case.rows, columns, SCALE_COLUMNS, True)
    layer = ("c", "Conv", codes, describe(case.rows, columns, case.chunk_rows, True))
    plain = conv_attributes(case)
    epilogue = {**plain, "function": function, "clip_low": clip[0], "clip_high": clip[1]}
    nodes = [node("Conv", "x", "p", **plain)] if adds else []
    nodes.append(node("Conv", "x", "y", *(["p"] if adds else []), **epilogue))
    shapes = ["n", case.channels, "h", "w"], ["n", case.rows, "oh", "ow"]
    alone, both = (graph_bytes(n, *shapes) for n in ([node("Conv", "x", "y", **plain)], nodes))
    x = rng.standard_normal((case.batch, case.channels, *case.size)).astype(np.float32)
    with (
        Session(write_bank(tmp_path / "alone.bank", alone, [layer]), threads=2) as before,
        Session(write_bank(tmp_path / "both.bank", both, [layer]), threads=2) as after,
    ):
        for level in LEVELS:
            before.set_level(level)
            after.set_level(level)
            (p,), (y,) = (session.run(None, {"x": x}) for session in (before, after))
            p, y = np.moveaxis(p, 1, -1), np.moveaxis(y, 1, -1)
            np.testing.assert_array_equal(y, fused(p, function, p if adds else 0, clip))


@pytest.mark.parametrize(
    "keepdims, message",
    [(1, "size 1 on axis 0, the output 2; give inputs the sizes"), (0, "0 axes, the output 2")],
)
def test_a_residual_of_another_shape_is_refused(tmp_path, keepdims, message):
    codes = random_codes(np.random.default_rng(0), 32, 32, SCALE_COLUMNS, False)
    plain = {"layer": 0, "use_bias": 0, "clip_low": -NO_CLIP, "clip_high": NO_CLIP}
    total = helper.make_node("ReduceSum", ["x"], ["sum"], keepdims=keepdims)
    nodes = [total, node("MatMul", "x", "y", "sum", **plain)]
    graph = graph_bytes(nodes, ["m", 32], ["m", 32])
    layer = ("fc", "MatMul", codes, describe(32, 32, 16, False))
    with (
        Session(write_bank(tmp_path / "b.bank", graph, [layer])) as session,
        pytest.raises(RunInputError, match=message),
    ):
        session.run(None, {"x": np.ones((2, 32), np.float32)})


@pytest.mark.parametrize("broken", [{"function": 5}, {"function": -1}, {"clip_low": np.nan}])
def test_a_function_that_is_none_is_refused(tmp_path, broken):
    codes = random_codes(np.random.default_rng(0), 16, 32, SCALE_COLUMNS, False)
    plain = {"layer": 0, "use_bias": 0, "clip_low": -NO_CLIP, "clip_high": NO_CLIP}
    graph = graph_bytes([node("MatMul", "x", "y", **{**plain, **broken})], ["m", 32], ["m", 16])
    layer = ("fc", "MatMul", codes, describe(16, 32, 16, False))
    with pytest.raises(BankFormatError, match="clip or function is none that there is"):
        Session(write_bank(tmp_path / "b.bank", graph, [layer]))


def test_conv_1d_is_an_image_of_height_one(tmp_path):
    rng = np.random.default_rng(5)
    codes = random_codes(rng, 20, 8 * 3, SCALE_COLUMNS, True)
    case = Conv(8, 20, (1, 25), (1, 3), strides=(1, 2), pads=(0, 1, 0, 1))
    graph = graph_bytes(
        [node("Conv", "x", "y", **conv_attributes(case))], ["n", 8, "l"], ["n", 20, "o"]
    )
    bank = write_bank(
        tmp_path / "b.bank", graph, [("c", "Conv", codes, describe(20, 24, 32, True))]
    )
    x = rng.standard_normal((2, 8, 25)).astype(np.float32)
    with Session(bank) as session:
        for level in LEVELS:
            session.set_level(level)
            (y,) = session.run(None, {"x": x})
            expected, bound = conv_reference(case, x[:, :, None, :], codes, level)
            expected = finish(expected, codes.bias[level].reshape(-1, 1, 1), -NO_CLIP, NO_CLIP)
            assert_within(y, expected[:, :, 0, :], bound[:, :, 0, :])


def gather_bank(path, rows=70, columns=50) -> tuple[LayerCodes, object]:
    codes = random_codes(np.random.default_rng(1), rows, columns, SCALE_COLUMNS, False)
    graph = graph_bytes(
        [node("Gather", "x", "y", layer=0)], ["n", "m"], ["n", "m", columns], TensorProto.INT64
    )
    bank = write_bank(
        path / "b.bank", graph, [("table", "Gather", codes, describe(rows, columns, 16, False))]
    )
    return codes, bank


def test_gather_gives_the_rows_of_the_table_exactly(tmp_path):
    codes, bank = gather_bank(tmp_path)
    ids = np.array([[0, 69, 15, 16], [-1, -70, 33, 33]])
    with Session(bank) as session:
        for level in LEVELS:
            session.set_level(level)
            (y,) = session.run(None, {"x": ids})
            np.testing.assert_array_equal(y, dequantize(codes, level, 15, SCALE_COLUMNS)[ids])


def test_gather_refuses_an_index_outside_the_table(tmp_path):
    _, bank = gather_bank(tmp_path)
    with Session(bank) as session:
        for index in (70, -71):
            with pytest.raises(RunInputError, match=rf"layer table: index {index} .* 70 rows"):
                session.run(None, {"x": np.array([[index]])})
        session.run(None, {"x": np.array([[3]])})


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_no_number_makes_its_row_nan_and_leaves_the_others(tmp_path, value):
    rng = np.random.default_rng(2)
    codes = random_codes(rng, 20, 40, SCALE_COLUMNS, True)
    graph = graph_bytes(
        [node("MatMul", "x", "y", layer=0, use_bias=1, clip_low=0.0, clip_high=NO_CLIP)],
        ["n", 40],
        ["n", 20],
    )
    bank = write_bank(
        tmp_path / "b.bank", graph, [("fc", "MatMul", codes, describe(20, 40, 16, True))]
    )
    x = rng.standard_normal((3, 40)).astype(np.float32)
    broken = x.copy()
    broken[1, 37] = value
    with Session(bank) as session:
        for level in (8, 4, 2, 1):
            session.set_level(level)
            (clean,) = session.run(None, {"x": x})
            (y,) = session.run(None, {"x": broken})
            assert np.isnan(y[1]).all()
            np.testing.assert_array_equal(y[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    "case",
    [
        Conv(16, 70, (12, 10), (3, 3), pads=(1, 1, 1, 1), batch=2, chunk_rows=16),
        Conv(32, 40, (6, 7), (1, 1), batch=2),
        Conv(12, 18, (17, 17), (3, 3), group=3, strides=(2, 1), dilations=(1, 2), batch=2),
    ],
    ids=str,
)
def test_a_pixel_that_is_no_number_makes_nan_what_it_touches(use_isa, tmp_path, case, value):
    """As in ONNX Runtime, where a NaN spoils the outputs whose windows, and groups, read it."""
    rng = np.random.default_rng(4)
    bank, codes = conv_bank(tmp_path / "b.bank", case, rng)
    x = rng.standard_normal((case.batch, case.channels, *case.size)).astype(np.float32)
    broken, finite = x.copy(), x.copy()
    broken[1, 2, 5, 4], finite[1, 2, 5, 4] = value, 0
    with Session(bank, threads=2) as session:
        for level in (8, 4, 2, 1):
            session.set_level(level)
            (expected,) = session.run(None, {"x": finite})
            (y,) = session.run(None, {"x": broken})
            marked = np.zeros_like(x)
            marked[1, 2, 5, 4] = 1
            touched = conv_reference(case, marked, codes, level)[0] != 0
            # Codes may be such that a weight is 0: one output of a pixel tells for its group.
            groups = touched.reshape(case.batch, case.group, -1, *touched.shape[2:])
            touched = np.broadcast_to(groups.any(2, keepdims=True), groups.shape).reshape(y.shape)
            assert touched.any() and not touched.all()
            np.testing.assert_array_equal(np.isnan(y), touched)
            np.testing.assert_array_equal(y[~touched], expected[~touched])


@pytest.mark.parametrize("operator", ["MatMul", "Conv"])
def test_infinity_passes_at_level_32(use_isa, tmp_path, operator):
    rng = np.random.default_rng(6)
    codes = random_codes(rng, 20, 40, SCALE_COLUMNS, False)
    attributes = {"layer": 0, "use_bias": 0, "clip_low": -NO_CLIP, "clip_high": NO_CLIP}
    shapes = ["n", 40], ["n", 20]
    if operator == "Conv":
        attributes = conv_attributes(Conv(40, 20, (1, 1), (1, 1))) | {"use_bias": 0}
        shapes = ["n", 40, "h", "w"], ["n", 20, "h", "w"]
    graph = graph_bytes([node(operator, "x", "y", **attributes)], *shapes)
    bank = write_bank(
        tmp_path / "b.bank", graph, [("layer", operator, codes, describe(20, 40, 16, False))]
    )
    x = rng.standard_normal((4, 40)).astype(np.float32)
    x[1, 3], x[2, 3], x[3, 3] = np.inf, -np.inf, np.nan
    with Session(bank, level=32) as session:
        given = x if operator == "MatMul" else x[:, :, None, None]
        y = session.run(None, {"x": given})[0].reshape(4, 20)
    np.testing.assert_array_equal(y[1], np.where(codes.weight[:, 3] > 0, np.inf, -np.inf))
    np.testing.assert_array_equal(y[2], -y[1])
    assert np.isfinite(y[0]).all() and np.isnan(y[3]).all()


def test_levels_can_differ_from_chunk_to_chunk(tmp_path):
    rng = np.random.default_rng(3)
    codes = random_codes(rng, 80, 64, SCALE_COLUMNS, True)
    graph = graph_bytes(
        [node("MatMul", "x", "y", layer=0, use_bias=1, clip_low=-NO_CLIP, clip_high=NO_CLIP)],
        ["n", 64],
        ["n", 80],
    )
    bank = write_bank(
        tmp_path / "b.bank", graph, [("fc", "MatMul", codes, describe(80, 64, 16, True))]
    )
    x = rng.standard_normal((5, 64)).astype(np.float32)
    uniform = {}
    with Session(bank) as session:
        for level in LEVELS:
            session.set_level(level)
            (uniform[level],) = session.run(None, {"x": x})
        mixed_plan = replace(plan_of(session), levels=np.array(LEVELS, np.uint8))
        adopt(session, mixed_plan)
        (mixed,) = session.run(None, {"x": x})
    for chunk, level in enumerate(LEVELS):
        rows = slice(chunk * 16, chunk * 16 + 16)
        np.testing.assert_array_equal(mixed[:, rows], uniform[level][:, rows])
