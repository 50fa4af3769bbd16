"""Codes of a layer and the bytes of its tile records: pack, unpack, dequantize. NumPy only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .layout import (
    BLOCK_COLUMNS,
    PLANES,
    TILE_ROWS,
    Level,
    Plane,
    TileGeometry,
    blocks_of,
    tiles_of,
)

__all__ = [
    "LayerCodes",
    "check_values",
    "dequantize",
    "from_bf16",
    "join_rows",
    "pack_chunk",
    "to_bf16",
    "unpack_chunk",
]

_CODES_PER_BYTE: dict[Plane, int] = {"p4": 2, "r8": 2, "m1": 8, "s1": 8}
_WORDS_PER_BLOCK: dict[Plane, int] = {"f32": 32, "p4": 4, "r8": 4, "m1": 1, "s1": 1}
"""32-bit words of a row's codes in a block"""


@dataclass
class LayerCodes:
    """A quantized layer (or a run of its rows), before packing and after unpacking."""

    weight: NDArray[np.float32] | None = None
    """(rows, columns): the values of plane f32."""
    codes: dict[Plane, NDArray[np.uint8]] = field(default_factory=dict)
    """(rows, columns): codes of p4, r8 (0..15), s1, m1 (0..1), of the planes that are there."""
    scales: dict[Level, NDArray[np.float32]] = field(default_factory=dict)
    """(rows, scale groups): scales of levels 4, 2, 1; each value is exactly a bf16."""
    bias: dict[Level, NDArray[np.float32]] = field(default_factory=dict)
    """(rows,): bias of every level that a plane completes; empty when the layer has none."""

    def of_rows(self, rows: NDArray[Any] | slice) -> LayerCodes:
        """Pick some of the rows, by their numbers."""
        return LayerCodes(
            None if self.weight is None else self.weight[rows],
            {plane: values[rows] for plane, values in self.codes.items()},
            {level: values[rows] for level, values in self.scales.items()},
            {level: values[rows] for level, values in self.bias.items()},
        )


def to_bf16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Round float32 to bfloat16, half to even; the result is the upper half of the float32."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    rounded = (bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)
    quiet_nan = (bits >> np.uint32(16)) | np.uint32(0x40)
    return np.where(np.isnan(values), quiet_nan, rounded).astype(np.uint16)


def from_bf16(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """Widen bfloat16 bits to float32, exactly."""
    return (np.asarray(bits).astype(np.uint32) << np.uint32(16)).view(np.float32)


def check_values(plane: Plane, code: NDArray[Any], scale: NDArray[np.float32] | None) -> None:
    """Raise ValueError unless the codes fit the plane and every scale is a finite bf16."""
    if plane != "f32":
        top = (1 << 8 // _CODES_PER_BYTE[plane]) - 1
        if code.size and int(code.max()) > top:
            raise ValueError(f"plane {plane} holds the code {int(code.max())}, allowed is 0..{top}")
    if scale is not None and not np.isfinite(scale).all():
        raise ValueError(f"plane {plane} holds a scale that is not finite")
    if scale is not None and (np.ascontiguousarray(scale).view(np.uint32) & 0xFFFF).any():
        inexact = float(scale[(np.ascontiguousarray(scale).view(np.uint32) & 0xFFFF) != 0][0])
        raise ValueError(f"plane {plane} holds the scale {inexact!r}, which bf16 cannot represent")


def pack_chunk(geometry: TileGeometry, codes: LayerCodes, rows: slice) -> bytes:
    """Pack a run of rows of one plane into tile records.

    `codes` holds whole layers, `rows` picks the chunk. Raises ValueError where shapes, types or
    values do not fit the geometry.
    """
    plane, level = geometry.plane, PLANES[geometry.plane]
    source = codes.weight if plane == "f32" else codes.codes.get(plane)
    code = _rows_of(source, rows, f"codes of {plane}", np.float32 if plane == "f32" else np.uint8)
    count = len(code)
    if count == 0 or code.shape != (count, geometry.columns):
        raise ValueError(f"codes of {plane} are {code.shape}, expected (rows, {geometry.columns})")
    scale = bias = None
    if geometry.scale_groups:
        scale = _rows_of(codes.scales.get(level), rows, f"scales of level {level}", np.float32)
        if scale.shape != (count, geometry.scale_groups):
            raise ValueError(
                f"scales of level {level} are {scale.shape}, "
                f"expected {(count, geometry.scale_groups)}"
            )
    if geometry.has_bias:
        bias = _rows_of(codes.bias.get(level), rows, f"bias of level {level}", np.float32)
        if bias.shape != (count,):
            raise ValueError(f"bias of level {level} is {bias.shape}, expected {(count,)}")
    check_values(plane, code, scale)

    tiles = tiles_of(count)
    records = np.zeros((tiles, geometry.record_bytes), np.uint8)
    end = geometry.code_bytes
    pack = _pack_taps if geometry.depthwise else _pack_blocks
    records[:, :end] = pack(plane, code, tiles)
    if scale is not None:
        begin, end = end, end + geometry.scale_bytes
        bits = _padded(to_bf16(scale), tiles * TILE_ROWS, geometry.scale_groups)
        records[:, begin:end] = (
            bits.astype("<u2")
            .reshape(tiles, TILE_ROWS, -1)
            .transpose(0, 2, 1)  # (tiles, scale groups, rows)
            .reshape(tiles, -1)
            .view(np.uint8)
        )
    if bias is not None:
        begin, end = end, end + geometry.bias_bytes
        padded = _padded(bias[:, None], tiles * TILE_ROWS, 1).astype("<f4")
        records[:, begin:end] = padded.reshape(tiles, TILE_ROWS).view(np.uint8)
    return records.tobytes()


def unpack_chunk(geometry: TileGeometry, rows: int, data: bytes) -> LayerCodes:
    """Inverse of `pack_chunk` for a chunk of `rows` rows: the fields of this one plane.

    Raises ValueError where the size is wrong, a scale is not finite or padding is not zero.
    """
    plane, level = geometry.plane, PLANES[geometry.plane]
    tiles = tiles_of(rows)
    if len(data) != tiles * geometry.record_bytes:
        raise ValueError(
            f"a chunk of {rows} rows has {len(data)} bytes, "
            f"expected {tiles * geometry.record_bytes}"
        )
    records = np.frombuffer(data, np.uint8).reshape(tiles, geometry.record_bytes)
    result = LayerCodes()
    end = geometry.code_bytes
    unpack = _unpack_taps if geometry.depthwise else _unpack_blocks
    codes = unpack(plane, np.ascontiguousarray(records[:, :end]))[:rows, : geometry.columns]
    if plane == "f32":
        result.weight = codes.astype(np.float32)
    else:
        result.codes[plane] = codes.copy()
    if geometry.scale_groups:
        begin, end = end, end + geometry.scale_bytes
        bits = (
            np.ascontiguousarray(records[:, begin:end])
            .view("<u2")
            .reshape(tiles, geometry.scale_groups, TILE_ROWS)
            .transpose(0, 2, 1)
            .reshape(tiles * TILE_ROWS, -1)
        )
        result.scales[level] = from_bf16(bits[:rows])
    if geometry.has_bias:
        begin, end = end, end + geometry.bias_bytes
        bias = np.ascontiguousarray(records[:, begin:end]).view("<f4").reshape(-1)
        result.bias[level] = bias[:rows].astype(np.float32)
    # Packing is one to one except for padding, which it zeroes: any difference is padding.
    if pack_chunk(geometry, result, slice(0, rows)) != data:
        raise ValueError(f"padding of plane {plane} is not zero")
    return result


def join_rows(parts: list[LayerCodes]) -> LayerCodes:
    """Merge planes of the same rows and stack runs of rows: the inverse of cutting into chunks.

    Parts that hold the same field are stacked in the order given.
    """
    weights = [part.weight for part in parts if part.weight is not None]

    def stack(name: str) -> dict[Any, Any]:
        runs: dict[Any, list[NDArray[Any]]] = {}
        for part in parts:
            for key, array in getattr(part, name).items():
                runs.setdefault(key, []).append(array)
        return {key: np.concatenate(arrays) for key, arrays in runs.items()}

    return LayerCodes(
        np.concatenate(weights) if weights else None, stack("codes"), stack("scales"), stack("bias")
    )


def dequantize(
    codes: LayerCodes, level: Level, residual_steps: int, scale_columns: Mapping[Level, int]
) -> NDArray[np.float32]:
    """Weights at a level, (rows, columns) float32: the reference of the numerics.

    `scale_columns` gives the columns per scale of levels 4, 2 and 1 (`Layer.scale_columns`).
    code - zero is exact; the only roundings are scale * (1/residual_steps) and the product.
    """
    if level == 32:
        if codes.weight is None:
            raise ValueError("plane f32 is absent")
        return codes.weight
    scaled: Level = 4 if level == 8 else level
    scale = codes.scales[scaled]
    if level == 8:
        code = codes.codes["p4"].astype(np.float32) * np.float32(residual_steps)
        code += codes.codes["r8"]
        zero = 7.5 * (residual_steps + 1)
        scale = scale * (np.float32(1) / np.float32(residual_steps))
    elif level == 4:
        code, zero = codes.codes["p4"].astype(np.float32), 7.5
    elif level == 2:
        code, zero = codes.codes["s1"].astype(np.float32) * np.float32(2), 1.5
        code += codes.codes["m1"]
    else:
        code, zero = codes.codes["s1"].astype(np.float32), 0.5
    code -= np.float32(zero)
    code *= np.repeat(scale, scale_columns[scaled], axis=1)[:, : code.shape[1]]
    return code


def _rows_of(array: NDArray[Any] | None, rows: slice, what: str, dtype: Any) -> NDArray[Any]:
    if array is None:
        raise ValueError(f"{what} are absent")
    if array.dtype != dtype:
        raise ValueError(f"{what} are {array.dtype}, expected {np.dtype(dtype).name}")
    return array[rows]


def _padded(array: NDArray[Any], rows: int, columns: int) -> NDArray[Any]:
    """Zero-pad to (rows, columns), contiguous."""
    if array.shape == (rows, columns):
        return np.ascontiguousarray(array)
    padded = np.zeros((rows, columns), array.dtype)
    padded[: array.shape[0], : array.shape[1]] = array
    return padded


def _pack_blocks(plane: Plane, code: NDArray[Any], tiles: int) -> NDArray[np.uint8]:
    """(rows, columns) codes -> (tiles, bytes): blocks of 32 columns, four columns side by side."""
    blocks = blocks_of(code.shape[1])
    words = _code_words(plane, _padded(code, tiles * TILE_ROWS, blocks * BLOCK_COLUMNS))
    return (
        words.reshape(tiles, TILE_ROWS, blocks, -1)
        .transpose(0, 2, 3, 1)  # (tiles, blocks, words, rows)
        .reshape(tiles, -1)
        .view(np.uint8)
    )


def _unpack_blocks(plane: Plane, packed: NDArray[np.uint8]) -> NDArray[Any]:
    """Inverse of `_pack_blocks`: (rows, columns) with all padding."""
    words = (
        packed.view(np.uint32)
        .reshape(len(packed), -1, _WORDS_PER_BLOCK[plane], TILE_ROWS)
        .transpose(0, 3, 1, 2)  # (tiles, rows, blocks, words)
        .reshape(len(packed) * TILE_ROWS, -1)
    )
    return words.view("<f4") if plane == "f32" else _split_words(plane, words)


def _pack_taps(plane: Plane, code: NDArray[Any], tiles: int) -> NDArray[np.uint8]:
    """(rows, taps) codes -> (tiles, bytes): as many taps as a byte holds, 16 rows side by side."""
    per_unit = _CODES_PER_BYTE.get(plane, 1)
    padded = _padded(code, tiles * TILE_ROWS, -(-code.shape[1] // per_unit) * per_unit)
    units = padded.astype("<f4" if plane == "f32" else np.uint8)
    if plane != "f32":
        shifts = np.arange(per_unit, dtype=np.uint8) * np.uint8(8 // per_unit)
        split = units.reshape(len(units), -1, per_unit) << shifts
        units = np.bitwise_or.reduce(split, axis=2)
    turned = units.reshape(tiles, TILE_ROWS, -1).transpose(0, 2, 1)  # (tiles, units, rows)
    return turned.reshape(tiles, -1).view(np.uint8)


def _unpack_taps(plane: Plane, packed: NDArray[np.uint8]) -> NDArray[Any]:
    """Inverse of `_pack_taps`: (rows, taps) with all padding."""
    values: NDArray[Any] = packed.view("<f4") if plane == "f32" else packed
    turned = values.reshape(len(packed), -1, TILE_ROWS).transpose(0, 2, 1)
    units = turned.reshape(len(packed) * TILE_ROWS, -1)
    if plane == "f32":
        return units
    bits = 8 // _CODES_PER_BYTE[plane]
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    split = units[..., None] >> shifts & np.uint8((1 << bits) - 1)
    return split.reshape(len(units), -1)


def _code_words(plane: Plane, code: NDArray[Any]) -> NDArray[np.uint32]:
    """(rows, columns) codes -> (rows, words): four bytes are four neighbouring columns.

    Whole 32-bit words are shifted; a code never crosses its byte, so the byte order is irrelevant.
    """
    if plane == "f32":
        return code.astype("<f4", copy=False).view(np.uint32)
    per_byte = _CODES_PER_BYTE[plane]
    words = code.view(np.uint32).reshape(len(code), -1, per_byte)
    packed = words[..., 0].copy()
    for i in range(1, per_byte):
        packed |= words[..., i] << np.uint32(i * (8 // per_byte))
    return packed


def _split_words(plane: Plane, words: NDArray[np.uint32]) -> NDArray[np.uint8]:
    """Inverse of `_code_words` for code planes."""
    per_byte = _CODES_PER_BYTE[plane]
    bits = 8 // per_byte
    mask = np.uint32(((1 << bits) - 1) * 0x01010101)
    split = np.empty((*words.shape, per_byte), np.uint32)
    for i in range(per_byte):
        split[..., i] = (words >> np.uint32(i * bits)) & mask
    return split.reshape(len(words), -1).view(np.uint8)
