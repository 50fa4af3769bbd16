"""What the kernels compute, in NumPy, written from the specification and not from their code.

`Tile.product` is the exact bit model: the same float32 roundings in the same order, with a fused
multiply-add emulated through float64. `Tile.bound` is the distance that these roundings can put
between that model and the real-number product.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

BLOCK = 32
TILE_ROWS = 16
RUN_BLOCKS = 8
F32_UNIT = 2.0**-24
"""Unit roundoff of float32."""
F32_TINY = 2.0**-149
"""Smallest float32 above zero; every rounding may be off by half of it near zero."""

FloatArray = NDArray[np.float32]


def fma(a: FloatArray, b: FloatArray, c: FloatArray) -> FloatArray:
    """Return a*b + c rounded once to float32.

    The product of two float32 is exact in float64. Their sum with c is rounded to odd there (the
    error-free transformation TwoSum tells which way), so that the rounding to float32 sees on
    which side of a tie it lies. (Boldo and Melquiond, Emulation of FMA and correctly rounded
    sums, 2008.)
    """
    product = a.astype(np.float64) * b.astype(np.float64)
    addend = c.astype(np.float64)
    product, addend = np.broadcast_arrays(product, addend)
    total = product + addend
    part = total - product
    error = (product - (total - part)) + (addend - part)
    bits = total.view(np.int64)
    even_inexact = np.isfinite(error) & (error != 0) & (bits & 1 == 0)
    away_from_zero = (error > 0) == (total > 0)
    odd = np.where(even_inexact, np.where(away_from_zero, bits + 1, bits - 1), bits)
    return odd.view(np.float64).astype(np.float32)


def bf16(values: NDArray[np.float64]) -> NDArray[np.uint16]:
    """Return values cut to bfloat16, as stored."""
    return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def from_bf16(stored: NDArray[np.uint16]) -> FloatArray:
    """Return stored bfloat16 as float32."""
    return (stored.astype(np.uint32) << 16).view(np.float32)


def pack_nibbles(codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Pack codes (16, columns) of 0..15 the way planes p4 and r8 are stored."""
    out = []
    for first in range(0, codes.shape[1], 8):
        low, high = codes[:, first : first + 4], codes[:, first + 4 : first + 8]
        out.append((low + 16 * high).astype(np.uint8).ravel())
    return np.concatenate(out)


def pack_bits(codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Pack codes (16, columns) of 0 and 1 the way planes s1 and m1 are stored."""
    out = []
    for first in range(0, codes.shape[1], BLOCK):
        block = np.zeros((TILE_ROWS, 4), np.uint8)
        for j in range(8):
            block += codes[:, first + 4 * j : first + 4 * j + 4] << j
        out.append(block.ravel())
    return np.concatenate(out)


@dataclass(frozen=True)
class Panel:
    """Activation rows as the kernels take them."""

    q: NDArray[np.int8]
    """(m, blocks*32)"""
    scale: FloatArray
    """(m, blocks), or (1, 1) for all"""
    sum: FloatArray
    """(m, blocks)"""
    x: FloatArray
    """(m, blocks*32), level 32 only"""
    zero_point: int = 0

    @property
    def uniform(self) -> bool:
        """Whether one scale is that of all rows and blocks."""
        return self.scale.size == 1


@dataclass(frozen=True)
class Tile:
    """16 rows of a layer at one level."""

    level: int
    planes: tuple[NDArray[np.uint8], ...]
    """(16, blocks*32) codes of p4 and r8, p4, s1 and m1, or s1"""
    scale: NDArray[np.uint16]
    """(scale groups, 16) bf16"""
    scale_blocks: int
    residual_steps: int
    weight: FloatArray
    """(16, blocks*32), level 32 only"""
    padding: int = 0
    """Columns of the last block past the layer's; their codes are 0"""

    @property
    def blocks(self) -> int:
        """Blocks of 32 columns."""
        return self.weight.shape[1] // BLOCK

    def packed(self) -> list[NDArray[np.uint8]]:
        """Return the code bytes that `bapq_tile.code` points at."""
        if self.level == 32:
            return [np.ascontiguousarray(self.weight.T).view(np.uint8)]
        pack = pack_nibbles if self.level in (8, 4) else pack_bits
        return [pack(plane) for plane in self.planes]

    def codes(self) -> tuple[NDArray[np.int64], float]:
        """Return the joined codes (16, columns) and the code that stands for weight 0."""
        plane = [p.astype(np.int64) for p in self.planes]
        steps = self.residual_steps
        if self.level == 8:
            return steps * plane[0] + plane[1], 7.5 * (steps + 1)
        if self.level == 2:
            return 2 * plane[0] + plane[1], 1.5
        return plane[0], 7.5 if self.level == 4 else 0.5

    def steps(self) -> FloatArray:
        """Return d (blocks, 16): the float32 weight step of every block."""
        d = from_bf16(self.scale)[np.arange(self.blocks) // self.scale_blocks]
        if self.level == 8:
            d = d * (np.float32(1) / np.float32(self.residual_steps))
        return d

    def product(self, panel: Panel) -> FloatArray:
        """Return out (m, 16), bit for bit."""
        m = panel.x.shape[0]
        acc = np.zeros((m, TILE_ROWS), np.float32)
        if self.level == 32:
            for k in range(self.blocks * BLOCK):
                acc = fma(panel.x[:, k, None], self.weight[None, :, k], acc)
            return acc
        codes, zero = self.codes()
        d = self.steps()
        offset = np.zeros(TILE_ROWS, np.float32)
        for first, end in self.runs(panel):
            columns = slice(first * BLOCK, end * BLOCK)
            weights = codes[:, columns] - zero
            bracket = (panel.q[:, columns].astype(np.float64) @ weights.T).astype(np.float32)
            step = d[first] * panel.scale[:, 0 if panel.uniform else first, None]
            acc = fma(step, bracket, acc)
            if panel.zero_point:
                own = weights[:, : self.blocks * BLOCK - self.padding - first * BLOCK]
                shift = (-panel.zero_point * own.sum(axis=1)).astype(np.float32)
                offset = fma(step[0], shift, offset)
        return acc + offset if panel.zero_point else acc

    def runs(self, panel: Panel) -> list[tuple[int, int]]:
        """Return first and end block of every run: one block, or up to 8 that share scales."""
        if not panel.uniform:
            return [(b, b + 1) for b in range(self.blocks)]
        starts = [b for b in range(self.blocks) if b % self.scale_blocks % RUN_BLOCKS == 0]
        return list(zip(starts, [*starts[1:], self.blocks], strict=True))

    def real_product(self, panel: Panel) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return the product in float64, and a bound on the kernels' distance from it.

        Each run has at most four roundings (1/residual_steps, times scale, times the activation
        scale, fma) and the partial sums at most one more per run that follows, and the last sum:
        relative to the sum of the magnitudes that are added, (blocks + 4) * 2^-24, plus half the
        smallest float32 for every rounding near zero (times the bracket where it is multiplied
        afterwards). The offset adds a magnitude of its own.
        """
        if self.level == 32:
            x, w = panel.x.astype(np.float64), self.weight.astype(np.float64)
            columns = x.shape[1]
            magnitude = np.abs(x) @ np.abs(w).T
            return x @ w.T, 1.01 * columns * F32_UNIT * magnitude + columns * F32_TINY
        codes, zero = self.codes()
        scale = from_bf16(self.scale).astype(np.float64)
        d = scale[np.arange(self.blocks) // self.scale_blocks]
        if self.level == 8:
            d = d / self.residual_steps
        total = np.zeros((panel.x.shape[0], TILE_ROWS))
        bound = np.zeros_like(total)
        for b in range(self.blocks):
            columns = slice(b * BLOCK, (b + 1) * BLOCK)
            weights = codes[:, columns] - zero
            xs = panel.scale[:, 0 if panel.uniform else b, None].astype(np.float64)
            own = weights[:, : self.blocks * BLOCK - self.padding - b * BLOCK]
            q = panel.q[:, columns].astype(np.float64)
            for bracket in (q @ weights.T, -float(panel.zero_point) * own.sum(axis=1)[None]):
                term = bracket * d[b] * xs
                total += term
                bound += 1.01 * (self.blocks + 4) * F32_UNIT * np.abs(term)
                bound += F32_TINY * (1 + np.abs(bracket) * (1 + xs))
        return total, bound


def quantize_row(x: FloatArray) -> tuple[NDArray[np.int8], FloatArray, FloatArray]:
    """Return q (blocks*32,), scale (blocks,), sum (blocks,) of x (n,), bit for bit."""
    blocks = -(-len(x) // BLOCK)
    padded = np.zeros(blocks * BLOCK, np.float32)
    padded[: len(x)] = x
    q = np.zeros(blocks * BLOCK, np.int8)
    scale = np.zeros(blocks, np.float32)
    for b in range(blocks):
        block = padded[b * BLOCK : (b + 1) * BLOCK]
        amax = np.abs(block).max()
        if not np.isfinite(amax):
            scale[b] = np.nan
        elif amax > 0:
            scale[b] = amax / np.float32(127)
            lift = np.float32(2.0**100 if amax < 2.0**-100 else 1)
            codes = np.rint(block * lift * (np.float32(127) / (amax * lift)))
            q[b * BLOCK : (b + 1) * BLOCK] = np.clip(codes, -127, 127).astype(np.int8)
    return q, scale, q.reshape(blocks, BLOCK).sum(axis=1, dtype=np.int64).astype(np.float32)
