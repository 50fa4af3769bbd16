"""The operators' cases, and what NumPy expects of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bapq_edge.bank.codes import dequantize
from support.banks import NO_CLIP
from support.operator_reference import product, quantize_rows, quantize_sample, unfold

SCALE_COLUMNS = {4: 32, 2: 64, 1: 128}


def describe(rows, columns, chunk_rows, has_bias, residual_steps=15):
    return {
        "rows": rows,
        "columns": columns,
        "chunk_rows": chunk_rows,
        "residual_steps": residual_steps,
        "scale_columns": SCALE_COLUMNS,
        "has_bias": has_bias,
    }


def finish(y, bias, low, high):
    if bias is not None:
        y = y + bias.astype(np.float64)
    return np.clip(y, low, high)


def assert_within(result, expected, bound):
    assert result.shape == expected.shape
    assert np.isfinite(result).all()
    # Bias and clipping are one more rounding, of the result itself.
    excess = np.abs(result - expected) - bound - 2.0**-23 * np.abs(expected) - 1e-6 * bound
    assert (excess <= 0).all()


def matmul_reference(x, codes, level, residual_steps=15):
    """x (m, columns) times the layer at a level: the product and its bound, both (m, rows)."""
    weights = dequantize(codes, level, residual_steps, SCALE_COLUMNS)
    seen = x.astype(np.float64) if level == 32 else quantize_rows(x)
    terms = x.shape[1] if level == 32 else -(-x.shape[1] // 32)
    return product(weights, seen, 0.0, terms)


@dataclass(frozen=True)
class Conv:
    channels: int
    rows: int
    size: tuple[int, int]
    kernel: tuple[int, int]
    strides: tuple[int, int] = (1, 1)
    pads: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilations: tuple[int, int] = (1, 1)
    group: int = 1
    auto_pad: int = 0
    chunk_rows: int = 32
    batch: int = 1
    clip: tuple[float, float] = (-NO_CLIP, NO_CLIP)
    positive: bool = False


def same_pads(case):
    total = []
    for size, stride, kernel, dilation in zip(
        case.size, case.strides, case.kernel, case.dilations, strict=True
    ):
        out = -(-size // stride)
        total.append(max((out - 1) * stride + (kernel - 1) * dilation + 1 - size, 0))
    small = [t // 2 for t in total]
    large = [t - s for t, s in zip(total, small, strict=True)]
    before, after = (small, large) if case.auto_pad == 1 else (large, small)
    return (before[0], before[1], after[0], after[1])


def conv_reference(case, x, codes, level):
    pads = same_pads(case) if case.auto_pad else case.pads
    weights = dequantize(codes, level, 15, SCALE_COLUMNS)
    outputs, bounds = [], []
    for sample in x:
        seen, offset = (sample.astype(np.float64), 0.0) if level == 32 else quantize_sample(sample)
        windows = unfold(seen, case.kernel, case.strides, pads, case.dilations)
        channels, rows = case.channels // case.group, case.rows // case.group
        parts = []
        for g in range(case.group):
            mine = windows[..., g * channels : (g + 1) * channels]
            flat = mine.reshape(windows.shape[0] * windows.shape[1], -1)
            terms = flat.shape[1] if level == 32 else -(-flat.shape[1] // 32)
            parts.append(product(weights[g * rows : (g + 1) * rows], flat, offset, terms))
        shape = (case.rows, windows.shape[0], windows.shape[1])
        outputs.append(np.concatenate([p[0] for p in parts], axis=1).T.reshape(shape))
        bounds.append(np.concatenate([p[1] for p in parts], axis=1).T.reshape(shape))
    return np.stack(outputs), np.stack(bounds)


def conv_attributes(case):
    return {
        "layer": 0,
        "use_bias": 1,
        "clip_low": case.clip[0],
        "clip_high": case.clip[1],
        "group": case.group,
        "kernel_h": case.kernel[0],
        "kernel_w": case.kernel[1],
        "stride_h": case.strides[0],
        "stride_w": case.strides[1],
        "pad_top": case.pads[0],
        "pad_left": case.pads[1],
        "pad_bottom": case.pads[2],
        "pad_right": case.pads[3],
        "dilation_h": case.dilations[0],
        "dilation_w": case.dilations[1],
        "auto_pad": case.auto_pad,
    }
