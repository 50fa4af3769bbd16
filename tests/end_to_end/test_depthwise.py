"""Depthwise convolutions: every kernel family, level and ragged shape against NumPy, bit for bit."""

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
from support.internals import adopt, plan_of
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
        depthwise(17, (14, 15), (side, side), pads=(side // 2,) * 4, strides=(stride, stride))
        for side, stride in combinations((3, 5, 7), (1, 2, 3))
    ),
    depthwise(16, (20, 21), (3, 3), strides=(2, 1), pads=(0, 1, 1, 0)),
    depthwise(33, (20, 21), (3, 3), strides=(1, 2), pads=(0, 2, 1, 0)),
    depthwise(18, (15, 15), (3, 3), dilations=(2, 2), pads=(2, 2, 2, 2)),
    depthwise(18, (15, 15), (5, 5), dilations=(1, 2), pads=(2, 4, 2, 4), strides=(1, 2)),
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
    depthwise(100, (6, 6), (3, 3), pads=ROUND, chunk_rows=16, batch=2, clip=(-0.5, NO_CLIP)),
    depthwise(3, (150, 130), (3, 3), pads=ROUND),  # more than one band of rows
    depthwise(3, (150, 131), (5, 5), pads=(2, 2, 2, 2), strides=(2, 2), multiplier=2),
    depthwise(1 + 16, (5, 5), (9, 15), pads=(4, 7, 4, 7)),  # several scales per row
]


def make_bank(path, case, rng, **layer):
    columns = case.kernel[0] * case.kernel[1]
    codes = random_codes(rng, case.rows, columns, SCALE_COLUMNS, True)
    graph = graph_bytes(
        [node("DepthwiseConv", "x", "y", **conv_attributes(case))],
        ["n", case.channels, "h", "w"],
        ["n", case.rows, "oh", "ow"],
    )
    description = describe(case.rows, columns, case.chunk_rows, True, STEPS) | layer
    return codes, write_bank(path, graph, [("conv", "DepthwiseConv", codes, description)])


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
