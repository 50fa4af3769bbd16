"""The rows that a layer's weight matrix multiplies, out of an activation."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..onnx_graph.ir import ConvGeometry


def rows_of(
    inputs: Sequence[np.ndarray],
    conv: ConvGeometry | None,
    width: int,
    limit: int,
    seed: int,
) -> np.ndarray:
    """Pick at most `limit` of the rows, (n, width), that a layer's matrix multiplies.

    `inputs` has one array for each time that the layer runs; empty ones give no row. Of arrays of
    equal shapes, equal seeds pick the same rows.
    """
    inputs = [x for x in inputs if x.size]
    if len(inputs) > limit:
        inputs = [inputs[index] for index in _pick(len(inputs), limit, seed)]
    parts = [np.empty((0, width), np.float32)]
    for x in inputs:
        with np.errstate(over="ignore", invalid="ignore"):
            if conv is not None:
                parts.append(_conv_rows(x, conv, limit // len(inputs), seed))
                continue
            rows = x.reshape(-1, x.shape[-1])
            parts.append(rows[_pick(len(rows), limit // len(inputs), seed)])
    return np.concatenate(parts)


def _pick(count: int, limit: int, seed: int) -> np.ndarray:
    if count <= limit:
        return np.arange(count)
    return np.sort(np.random.default_rng(seed).choice(count, limit, replace=False))


def _conv_rows(x: np.ndarray, conv: ConvGeometry, limit: int, seed: int) -> np.ndarray:
    """Rows of the matrix that im2col builds.

    x: (n, channels, [height,] width); result: (rows, groups * columns), the columns of a group in
    the order (ky, kx, channel of the group), zeros where the kernel reaches into the padding.
    """
    if x.ndim == 3:
        x = x[:, :, None, :]
    count, channels = x.shape[:2]
    top, rows_out = _windows(x.shape[2], conv, 0)
    left, columns_out = _windows(x.shape[3], conv, 1)
    picked = _pick(count * rows_out * columns_out, limit, seed)
    image, position = np.divmod(picked, max(rows_out * columns_out, 1))
    oy, ox = np.divmod(position, max(columns_out, 1))
    ky, kx = np.arange(conv.kernel[0]), np.arange(conv.kernel[1])
    iy = (oy * conv.strides[0] - top)[:, None] + ky * conv.dilations[0]  # (rows, ky)
    ix = (ox * conv.strides[1] - left)[:, None] + kx * conv.dilations[1]
    inside = ((iy >= 0) & (iy < x.shape[2]))[:, :, None] & ((ix >= 0) & (ix < x.shape[3]))[:, None]
    iy, ix = iy.clip(0, x.shape[2] - 1), ix.clip(0, x.shape[3] - 1)
    values = x[image[:, None, None], :, iy[:, :, None], ix[:, None, :]]  # (rows, ky, kx, channels)
    values = values * inside[..., None]
    shape = (len(picked), len(ky), len(kx), conv.group, channels // conv.group)
    result: np.ndarray = values.reshape(shape).transpose(0, 3, 1, 2, 4).reshape(len(picked), -1)
    return result


def _windows(size: int, conv: ConvGeometry, axis: int) -> tuple[int, int]:
    """The padding before an axis, and the number of outputs along it."""
    stride = conv.strides[axis]
    reach = (conv.kernel[axis] - 1) * conv.dilations[axis] + 1
    before, after = conv.pads[axis], conv.pads[axis + 2]
    if conv.auto_pad != "NOTSET":
        pad = max(0, (-(-size // stride) - 1) * stride + reach - size)
        small, large = pad // 2, pad - pad // 2
        before, after = (small, large) if conv.auto_pad == "SAME_UPPER" else (large, small)
    return before, max(0, (size + before + after - reach) // stride + 1)
