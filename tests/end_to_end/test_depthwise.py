"""Depthwise convolutions: every kernel family, level and shape against NumPy, bit for bit."""

from __future__ import annotations

from dataclasses import replace
from itertools import product as combinations

import numpy as np
import pytest

from bapq_edge import Session
from bapq_edge.bank.codes import dequantize
from bapq_edge.bank.layout import LEVELS
from bapq_edge.errors import BapqError
from support.banks import NO_CLIP, graph_bytes, node, random_codes, write_bank
from support.internals import adopt, plan_of, store_of
from support.kernel_reference import fma
from support.operators import SCALE_COLUMNS, Conv, conv_attributes, describe, same_pads

STEPS = 13


def depthwise(channels, size, kernel, multiplier=1, **options):
    return Conv(channels, channels * multiplier, size, kernel, group=channels, **options)


ROUND = (1, 1, 1, 1)
CASES = [
    *(depthwise(3, (9, width), (3, 3), pads=ROUND) for width in (1, 3, 4, 5, 7, 8, 9, 17, 31)),
    *(depthwise(2, (rows, 12), (3, 3), pads=ROUND) for rows in (1, 2, 3, 5, 6, 7)),
    *(
        depthwise(17, (9, 10), (side, side), pads=(side // 2,) * 4, strides=(stride, stride))
        for side, stride in combinations((3, 5, 7), (1, 2, 3))
    ),
    depthwise(16, (9, 13), (3, 3), strides=(2, 1), pads=(0, 1, 1, 0)),
    depthwise(33, (7, 12), (3, 3), strides=(1, 2), pads=(0, 2, 1, 0)),
    depthwise(3, (15, 15), (3, 3), dilations=(2, 2), pads=(2, 2, 2, 2)),
    depthwise(3, (15, 15), (5, 5), dilations=(1, 2), pads=(2, 4, 2, 4), strides=(1, 2)),
    depthwise(5, (15, 18), (3, 3), dilations=(1, 3), strides=(2, 2), pads=(1, 3, 1, 3)),
    depthwise(20, (1, 40), (1, 3), pads=(0, 1, 0, 1)),
    depthwise(20, (40, 1), (3, 1), pads=(1, 0, 1, 0), strides=(2, 1)),
    depthwise(40, (9, 9), (1, 1), strides=(2, 2)),
    depthwise(6, (9, 9), (2, 4), pads=(0, 3, 1, 0)),
    depthwise(2, (8, 9), (6, 7), pads=(5, 6, 5, 6)),
    depthwise(2, (3, 3), (3, 3), pads=(4, 5, 6, 7), strides=(4, 5)),
    depthwise(7, (7, 8), (4, 3), strides=(2, 2), auto_pad=1),
    depthwise(7, (7, 8), (4, 3), strides=(2, 2), auto_pad=2),
    depthwise(11, (7, 7), (3, 3), multiplier=3, pads=ROUND, clip=(0.0, 6.0), batch=3),
    depthwise(70, (5, 5), (3, 3), pads=ROUND, chunk_rows=16, batch=2, clip=(-0.5, NO_CLIP)),
    depthwise(1, (70, 100), (3, 3), pads=ROUND),  # more than one band of rows
    depthwise(1, (90, 101), (5, 5), pads=(2, 2, 2, 2), strides=(2, 2), multiplier=2),
    depthwise(3, (4, 5), (9, 15), pads=(4, 7, 4, 7)),  # several scales per row
]


def graph_of(case, shape=("h", "w"), **attributes):
    operator = node("DepthwiseConv", "x", "y", **conv_attributes(case) | attributes)
    outer = [f"o{axis}" for axis in shape]
    return graph_bytes([operator], ["n", case.channels, *shape], ["n", case.rows, *outer])


def make_bank(path, case, rng, shape=("h", "w")):
    columns = case.kernel[0] * case.kernel[1]
    codes = random_codes(rng, case.rows, columns, SCALE_COLUMNS, True)
    description = describe(case.rows, columns, case.chunk_rows, True, STEPS)
    layer = ("conv", "DepthwiseConv", codes, description)
    return codes, write_bank(path, graph_of(case, shape), [layer])


def reference(case, x, codes, level):
    """One fused multiply-add per tap, in order, from the bias on; then the clip."""
    pads = same_pads(case) if case.auto_pad else case.pads
    weight = dequantize(codes, level, STEPS, SCALE_COLUMNS)
    top, left, bottom, right = pads
    x = np.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right)))
    x = np.repeat(x, case.rows // case.channels, axis=1)
    out = [
        (size - (kernel - 1) * dilation - 1) // stride + 1
        for size, kernel, dilation, stride in zip(
            x.shape[2:], case.kernel, case.dilations, case.strides, strict=True
        )
    ]
    acc = np.broadcast_to(
        codes.bias[level].reshape(-1, 1, 1), (case.batch, case.rows, *out)
    ).astype(np.float32)
    for k, (ky, kx) in enumerate(combinations(*map(range, case.kernel))):
        rows, columns = (
            slice(tap * dilation, tap * dilation + (count - 1) * stride + 1, stride)
            for tap, dilation, count, stride in zip(
                (ky, kx), case.dilations, out, case.strides, strict=True
            )
        )
        acc = fma(x[:, :, rows, columns], weight[:, k].reshape(-1, 1, 1), acc)
    low, high = (np.float32(bound) for bound in case.clip)
    acc = np.where(acc < low, low, acc)
    return np.where(acc > high, high, acc)


def assert_same_bits(found, expected):
    np.testing.assert_array_equal(found.view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_matches_numpy_bit_for_bit_at_every_level(use_isa, tmp_path, case):
    rng = np.random.default_rng(case.channels * case.rows)
    codes, bank = make_bank(tmp_path / "b.bank", case, rng)
    x = rng.standard_normal((case.batch, case.channels, *case.size)).astype(np.float32)
    with Session(bank, threads=2) as session:
        for level in LEVELS:
            session.set_level(level)
            (y,) = session.run(None, {"x": x})
            assert_same_bits(y, reference(case, x, codes, level))


def test_a_line_is_an_image_of_height_one(tmp_path):
    case = depthwise(20, (1, 25), (1, 5), pads=(0, 2, 0, 2), strides=(1, 2))
    codes, bank = make_bank(tmp_path / "b.bank", case, np.random.default_rng(1), ["l"])
    x = np.random.default_rng(2).standard_normal((2, 20, 25)).astype(np.float32)
    with Session(bank, level=4) as session:
        (y,) = session.run(None, {"x": x})
    expected = reference(replace(case, batch=2), x[:, :, None], codes, 4)
    assert_same_bits(y, expected[:, :, 0])


def test_rows_may_be_reordered_dropped_and_skipped_and_levels_differ_by_chunk(use_isa, tmp_path):
    case = depthwise(30, (7, 9), (3, 3), multiplier=2, pads=ROUND, batch=2, clip=(-1.0, 1.0))
    rng = np.random.default_rng(3)
    columns, rows, stored = 9, 60, 53
    codes = random_codes(rng, rows, columns, SCALE_COLUMNS, True)
    order = rng.permutation(rows)
    order[stored:].sort()
    bias = rng.standard_normal(rows - stored).astype(np.float32)
    description = describe(rows, columns, 16, True, STEPS) | {
        "stored_rows": stored,
        "reordered": True,
        "row_order": order.astype(np.uint32),
        "dropped_bias": bias,
    }
    layer = ("conv", "DepthwiseConv", codes.of_rows(order[:stored]), description)
    x = rng.standard_normal((2, 30, 7, 9)).astype(np.float32)
    values = rng.standard_normal(stored).astype(np.float32)
    levels = np.array([8, 0, 2, 1], np.uint8)
    with Session(write_bank(tmp_path / "b.bank", graph_of(case), [layer]), threads=2) as session:
        region = store_of(session).add_region(values)
        adopt(session, replace(plan_of(session), levels=levels, region=region))
        (y,) = session.run(None, {"x": x})
    for place, row in enumerate(order):
        level = int(levels[place // 16]) if place < stored else 0
        if level:
            expected = reference(case, x, codes, level)[:, row]
        else:
            value = values[place] if place < stored else bias[place - stored]
            expected = np.full((2, 7, 9), np.clip(value, -1, 1))
        assert_same_bits(y[:, row], expected)


def test_a_value_that_is_no_number_reaches_its_windows_only(use_isa, tmp_path):
    case = depthwise(4, (9, 9), (3, 3), pads=ROUND)
    _, bank = make_bank(tmp_path / "b.bank", case, np.random.default_rng(4))
    x = np.random.default_rng(5).standard_normal((1, 4, 9, 9)).astype(np.float32)
    x[0, 2, 4, 8] = np.nan
    with Session(bank, level=8) as session:
        (y,) = session.run(None, {"x": x})
    touched = np.zeros(y.shape, bool)
    touched[0, 2, 3:6, 7:9] = True
    np.testing.assert_array_equal(np.isnan(y), touched)


HOSTILE = [
    ({"group": 8}, "16 channels in 8 groups"),
    ({"group": 0}, "group is 0, it can be from 1 to 16"),
    ({"kernel_h": 5}, "its weights have 9 columns"),
    ({"kernel_h": 1, "kernel_w": 9}, None),
    ({"kernel_h": 1 << 32, "kernel_w": 1 << 32}, "is 4294967296, it can be from 1 to 1048576"),
    ({"kernel_h": -3, "kernel_w": -3}, "is -3, it can be from 1 to 1048576"),
    ({"stride_h": 0}, "is 0, it can be from 1 to 1048576"),
    ({"stride_w": 1 << 62}, "it can be from [01] to 1048576"),
    ({"dilation_h": 1 << 62}, "it can be from [01] to 1048576"),
    ({"dilation_w": 0}, "is 0, it can be from 1 to 1048576"),
    ({"pad_top": -1}, "is -1, it can be from 0 to 1048576"),
    ({"pad_right": (1 << 63) - 1}, "it can be from [01] to 1048576"),
    ({"dilation_w": 1 << 20}, "smaller than its window"),
]


@pytest.mark.parametrize("attributes, message", HOSTILE, ids=str)
def test_attributes_that_do_not_fit_are_refused(tmp_path, attributes, message):
    case = depthwise(16, (8, 12), (3, 3))
    codes = random_codes(np.random.default_rng(6), 16, 9, SCALE_COLUMNS, True)
    layer = ("conv", "DepthwiseConv", codes, describe(16, 9, 16, True, STEPS))
    bank = write_bank(tmp_path / "b.bank", graph_of(case, **attributes), [layer])
    x = np.zeros((1, 16, 8, 12), np.float32)
    with Session(bank) as session:
        if message is None:
            session.run(None, {"x": x})
            return
        with pytest.raises(BapqError, match=message):
            session.run(None, {"x": x})


@pytest.mark.parametrize(
    "graph_operator, layer_operator",
    [("Conv", "DepthwiseConv"), ("DepthwiseConv", "Conv"), ("MatMul", "DepthwiseConv")],
)
def test_a_layer_in_another_layout_is_refused(tmp_path, graph_operator, layer_operator):
    case = depthwise(16, (9, 9), (3, 3))
    codes = random_codes(np.random.default_rng(7), 16, 9, SCALE_COLUMNS, True)
    attributes = conv_attributes(case)
    if graph_operator == "MatMul":
        attributes = {k: attributes[k] for k in ("layer", "use_bias", "clip_low", "clip_high")}
    graph = graph_bytes(
        [node(graph_operator, "x", "y", **attributes)], ["n", "c", "h", 9], ["n", "r", "p", "q"]
    )
    layer = ("conv", layer_operator, codes, describe(16, 9, 16, True, STEPS))
    with (
        Session(write_bank(tmp_path / "b.bank", graph, [layer])) as session,
        pytest.raises(BapqError, match="only DepthwiseConv reads a depthwise layer"),
    ):
        session.run(None, {"x": np.zeros((1, 16, 9, 9), np.float32)})
