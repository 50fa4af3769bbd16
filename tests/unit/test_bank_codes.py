"""Tile records against the words of docs/reference/bank_format.md, byte by byte."""

from __future__ import annotations

import struct

import numpy as np
import pytest

from bapq_edge.bank.codes import (
    LayerCodes,
    dequantize,
    from_bf16,
    join_rows,
    pack_chunk,
    to_bf16,
    unpack_chunk,
)
from bapq_edge.bank.layout import LEVELS, PLANES, SCALED_PLANES, TileGeometry
from support.bank_samples import RAGGED, Shape, assert_same_codes, random_codes

WINDOWS = (Shape(16, 9), Shape(40, 25, has_bias=False), Shape(5, 49))
"""of depthwise kernels"""


def geometry_of(plane, shape, depthwise=False):
    scale_columns = shape.scale_columns if plane in SCALED_PLANES else 0
    return TileGeometry(plane, shape.columns, scale_columns, shape.has_bias, depthwise)


def expected_record(plane, shape, codes, tile, depthwise):
    """One tile record, element by element, as the specification says it."""
    blocks = 0 if depthwise else -(-shape.columns // 32)
    taps = shape.columns if depthwise else 0
    level = PLANES[plane]

    def code(row, column):
        row += 16 * tile
        inside = row < shape.rows and column < shape.columns
        array = codes.weight if plane == "f32" else codes.codes[plane]
        return array[row, column] if inside else 0

    record = b""
    for b in range(blocks):
        if plane == "f32":
            for column in range(32):
                record += struct.pack("<16f", *(code(r, 32 * b + column) for r in range(16)))
        elif plane in ("p4", "r8"):
            for p in range(4):
                for r in range(16):
                    for c in range(4):
                        low, high = 32 * b + 8 * p + c, 32 * b + 8 * p + 4 + c
                        record += bytes([int(code(r, low)) | int(code(r, high)) << 4])
        else:
            for r in range(16):
                for c in range(4):
                    record += bytes([sum(int(code(r, 32 * b + 4 * j + c)) << j for j in range(8))])
    per_byte = {"f32": 1, "p4": 2, "r8": 2}.get(plane, 8)
    for k in range(0, taps, per_byte):
        for r in range(16):
            if plane == "f32":
                record += struct.pack("<f", code(r, k))
            else:
                bits = 8 // per_byte
                record += bytes([sum(int(code(r, k + i)) << i * bits for i in range(per_byte))])
    if plane in SCALED_PLANES:
        for group in range(-(-shape.columns // shape.scale_columns)):
            for r in range(16 * tile, 16 * tile + 16):
                scale = codes.scales[level][r, group] if r < shape.rows else 0
                record += struct.pack("<f", scale)[2:]
    if shape.has_bias:
        for r in range(16 * tile, 16 * tile + 16):
            record += struct.pack("<f", codes.bias[level][r] if r < shape.rows else 0)
    return record + bytes(-len(record) % 64)


@pytest.mark.parametrize("depthwise", [False, True])
@pytest.mark.parametrize("plane", PLANES)
@pytest.mark.parametrize("shape", (*RAGGED, *WINDOWS), ids=str)
def test_packed_bytes_follow_the_specification(plane, shape, depthwise):
    codes = random_codes(shape)
    geometry = geometry_of(plane, shape, depthwise)
    data = pack_chunk(geometry, codes, slice(0, shape.rows))
    tiles = range(-(-shape.rows // 16))
    assert data == b"".join(expected_record(plane, shape, codes, t, depthwise) for t in tiles)
    assert len(data) == len(tiles) * geometry.record_bytes


@pytest.mark.parametrize("depthwise", [False, True])
@pytest.mark.parametrize("shape", (*RAGGED, *WINDOWS), ids=str)
def test_unpacking_chunks_gives_the_codes_back(shape, depthwise):
    codes = random_codes(shape)
    parts = []
    for plane in PLANES:
        geometry = geometry_of(plane, shape, depthwise)
        for start in range(0, shape.rows, shape.chunk_rows):
            rows = slice(start, min(start + shape.chunk_rows, shape.rows))
            data = pack_chunk(geometry, codes, rows)
            parts.append(unpack_chunk(geometry, rows.stop - rows.start, data))
    assert_same_codes(join_rows(parts), codes)


@pytest.mark.parametrize("depthwise", [False, True])
@pytest.mark.parametrize("plane", PLANES)
def test_every_bit_of_padding_is_checked(plane, depthwise):
    """Flipping a bit must either change what is unpacked or be refused, never neither."""
    shape = RAGGED[2]
    geometry = geometry_of(plane, shape, depthwise)
    good = pack_chunk(geometry, random_codes(shape), slice(16, 17))
    refused = 0
    for position in np.random.default_rng(0).permutation(8 * len(good))[:2000]:
        data = bytearray(good)
        data[position // 8] ^= 1 << position % 8
        try:
            codes = unpack_chunk(geometry, 1, bytes(data))
        except ValueError:
            refused += 1
        else:
            assert pack_chunk(geometry, codes, slice(0, 1)) == bytes(data)
    assert refused > 1000  # one row of 16 and 33 columns of 64 are in use


@pytest.mark.parametrize("residual_steps", [8, 11, 16])
def test_dequantize_follows_the_formulas(residual_steps):
    shape = RAGGED[4]
    codes = random_codes(shape)
    group = np.arange(shape.columns) // shape.scale_columns
    p4, r8, s1, m1 = (codes.codes[plane].astype(float) for plane in ("p4", "r8", "s1", "m1"))
    s4, s2, s1_scale = (codes.scales[level].astype(float)[:, group] for level in (4, 2, 1))
    expected = {
        32: codes.weight,
        8: s4 * (p4 - 7.5) + s4 / residual_steps * (r8 - 7.5),
        4: s4 * (p4 - 7.5),
        2: s2 * (2 * s1 + m1 - 1.5),
        1: s1_scale * (s1 - 0.5),
    }
    scale_columns = {level: shape.scale_columns for level in (4, 2, 1)}
    for level in LEVELS:
        weight = dequantize(codes, level, residual_steps, scale_columns)
        assert weight.dtype == np.float32
        np.testing.assert_allclose(weight, expected[level], rtol=2e-7, atol=1e-15)


def test_level_8_without_overlap_is_plain_8_bit():
    """At 16 residual steps the two planes are the high and the low half of one byte."""
    p4, r8 = np.divmod(np.arange(256, dtype=np.uint8)[None], 16)
    codes = LayerCodes(codes={"p4": p4, "r8": r8}, scales={4: np.full((1, 8), 16, np.float32)})
    weight = dequantize(codes, 8, 16, {4: 32})
    np.testing.assert_array_equal(weight[0], np.arange(256) - 127.5)


def test_bf16_rounds_half_to_even():
    one, ulp = 1.0, 2.0**-7
    values = np.float32(
        [one, one + ulp / 2, one + ulp * 3 / 2, one + ulp * 0.51, -one - ulp / 2, 0.0, -0.0, 1e-40]
    )
    expected = np.float32([one, one, one + 2 * ulp, one + ulp, -one, 0.0, -0.0])
    np.testing.assert_array_equal(from_bf16(to_bf16(values))[:7], expected)
    assert to_bf16(np.float32([-0.0]))[0] == 0x8000
    assert to_bf16(np.float32([3.4e38]))[0] == 0x7F80
    assert to_bf16(np.float32([np.inf]))[0] == 0x7F80
    nan_bits = np.uint32([0x7F800001, 0xFFFFFFFF]).view(np.float32)
    assert np.isnan(from_bf16(to_bf16(nan_bits))).all()


def test_every_finite_bf16_survives():
    bits = np.arange(65536, dtype=np.uint32).astype(np.uint16)
    bits = bits[np.isfinite(from_bf16(bits))]
    np.testing.assert_array_equal(to_bf16(from_bf16(bits)), bits)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"codes": ("p4", np.full((17, 33), 16, np.uint8))}, "code 16, allowed is 0..15"),
        ({"codes": ("p4", np.zeros((17, 32), np.uint8))}, "expected (rows, 33)"),
        ({"codes": ("p4", np.zeros((17, 33), np.int64))}, "expected uint8"),
        ({"scales": (4, np.full((17, 1), 1.001, np.float32))}, "which bf16 cannot represent"),
        ({"scales": (4, np.full((17, 1), np.nan, np.float32))}, "not finite"),
        ({"scales": (4, np.ones((17, 2), np.float32))}, "expected (17, 1)"),
        ({"scales": (4, np.ones((17, 1)))}, "expected float32"),
        ({"bias": (4, np.ones((17, 1), np.float32))}, "expected (17,)"),
    ],
)
def test_packing_refuses_values_that_do_not_fit(change, words):
    shape = RAGGED[2]
    codes = random_codes(shape)
    for name, (key, value) in change.items():
        getattr(codes, name)[key] = value
    with pytest.raises(ValueError) as caught:
        pack_chunk(geometry_of("p4", shape), codes, slice(0, 17))
    assert words in str(caught.value)


def test_packing_names_what_is_absent():
    shape = RAGGED[2]
    with pytest.raises(ValueError, match="codes of p4 are absent"):
        pack_chunk(geometry_of("p4", shape), random_codes(shape, levels=(32,)), slice(0, 17))
