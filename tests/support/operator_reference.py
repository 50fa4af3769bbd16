"""The operators in NumPy: activations quantized as libbapq states it, products in float64.

`product` also gives the bound within which the native result must lie: float32 rounds each of the
`terms` additions of a sum by at most 2^-24 of the sum of absolute values.
"""

from __future__ import annotations

import numpy as np

ROUNDING = 2.0**-24


def quantize_rows(x: np.ndarray) -> np.ndarray:
    """(m, columns) float32 -> what int8 per row and block of 32 columns leaves of it, float64."""
    m, columns = x.shape
    blocks = -(-columns // 32)
    padded = np.zeros((m, blocks * 32), np.float32)
    padded[:, :columns] = x
    padded = padded.reshape(m, blocks, 32)
    amax = np.abs(padded).max(axis=2, keepdims=True)
    scale = amax / np.float32(127)
    with np.errstate(divide="ignore", invalid="ignore"):
        q = np.rint(padded * (np.float32(127) / amax))
    q = np.where(amax > 0, np.clip(q, -127, 127), 0)
    return (q * scale.astype(np.float64)).reshape(m, -1)[:, :columns]


def quantize_sample(x: np.ndarray) -> tuple[np.ndarray, float]:
    """One sample -> what int8 with a zero point leaves of it, float64, and |scale * zero point|."""
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    if high == low:
        return np.zeros(x.shape), 0.0
    scale = np.float32((high - low) / 254)
    inverse = np.float32(254 / (high - low))
    zero_point = -127 - np.rint(low * float(inverse))
    q = np.clip(np.rint((x * inverse).astype(np.float64) + zero_point), -127, 127)
    return (q - zero_point) * float(scale), abs(float(scale) * zero_point)


def product(
    weights: np.ndarray, x: np.ndarray, offset: float, terms: int
) -> tuple[np.ndarray, np.ndarray]:
    """x (m, columns) times weights (rows, columns): the product and its bound, both (m, rows)."""
    w = weights.astype(np.float64)
    size = np.abs(x) @ np.abs(w).T + offset * np.abs(w).sum(axis=1)
    return x @ w.T, ROUNDING * (terms + 8) * size + 1e-30


def unfold(
    x: np.ndarray,
    kernel: tuple[int, int],
    strides: tuple[int, int],
    pads: tuple[int, int, int, int],
    dilations: tuple[int, int],
) -> np.ndarray:
    """(channels, height, width) -> (out_h, out_w, kernel_h, kernel_w, channels)."""
    top, left, bottom, right = pads
    padded = np.pad(x, ((0, 0), (top, bottom), (left, right)))
    out_h = (padded.shape[1] - (kernel[0] - 1) * dilations[0] - 1) // strides[0] + 1
    out_w = (padded.shape[2] - (kernel[1] - 1) * dilations[1] - 1) // strides[1] + 1
    result = np.empty((out_h, out_w, *kernel, x.shape[0]))
    for ky in range(kernel[0]):
        for kx in range(kernel[1]):
            rows = slice(ky * dilations[0], ky * dilations[0] + (out_h - 1) * strides[0] + 1)
            cols = slice(kx * dilations[1], kx * dilations[1] + (out_w - 1) * strides[1] + 1)
            window = padded[:, rows, cols][:, :: strides[0], :: strides[1]]
            result[:, :, ky, kx, :] = window.transpose(1, 2, 0)
    return result
