"""Statistics of the layers' inputs, as error-compensated rounding needs them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from bapq_edge.bank.layout import Level
from bapq_edge.errors import CalibrationError

from ..build_support.spill import OnDisk
from ..onnx_graph.ir import ConvGeometry, HeavyLayer, LevelStats, MatrixStats
from .forward_passes import FLOAT, Chains
from .gram import PANEL, Sums
from .reference_model import observed_use

NEIGHBOUR: dict[Level, Level] = {4: 2, 2: 4, 1: 2}
"""Levels with a chain of their own, and the level that plans mix each with most. Level 8 needs no
chain: it is as good as float."""

NEIGHBOUR_SHARE = 0.2
"""Share of the neighbour's chain in a level's statistics: plans mix levels, so each must cope with
what the other leaves behind. On MiniLM, 0.2 instead of 0 takes level 4 from 0.992 to 0.988, level 2
from 0.871 to 0.874, and random mixes of the two from 0.921 and 0.902 to 0.938 and 0.924; 0.5 takes
level 4 to 0.978."""

HELD_OUT = 8
"""Every eighth sample is held out; with fewer than two such samples none is."""

_BLOCK_COLUMNS = 4608
"""Widest block of columns whose correlations are counted: 3x3 kernels over 512 channels."""

_ROWS = (8192, 16384)
_ROW_WORK = 1 << 36
"""Rows of activations used: as many as make this work (rows x columns²), within bounds."""

_HELD_OUT_ROWS = 1024


class Moments:
    """Statistics of layers whose inputs are at hand.

    One chain after the other is gone through, so that the rows of two of them, the float chain's
    and another's, are in memory at a time. What grows with the square of the columns is on disk.
    """

    def __init__(self, chains: Chains, disk: OnDisk) -> None:
        self._chains = chains
        self._disk = disk

    def of(
        self, layers: Sequence[HeavyLayer], unit: int = PANEL
    ) -> dict[str, list[MatrixStats] | None]:
        """Statistics, by layer name, of layers that multiply the same input (`input_key`).

        One entry per group of their convolution, None where no sample gives a row. Blocks of
        columns are multiples of `unit`, which is one of `PANEL`. Raises CalibrationError where the
        input is not finite.
        """
        columns = layers[0].weight.shape[1]
        exact, held_out = self._rows(layers[0], FLOAT)
        if not len(exact):
            return dict.fromkeys(layer.name for layer in layers)
        groups = [slice(begin, begin + columns) for begin in range(0, exact.shape[1], columns)]
        levels = self._chains.chains[1:]
        rows = {layer.name: len(layer.weight) // len(groups) for layer in layers}
        blocks = _blocks(columns, unit)
        sums = [Sums.zeros(blocks, levels, rows, self._disk) for _ in groups]
        means = {FLOAT: _centre(exact, held_out)}
        apart = {FLOAT: self._disk.put(held_out)}
        for chain in levels:
            x, held_out = self._rows(layers[0], chain)
            means[chain] = _centre(x, held_out)
            apart[chain] = self._disk.put(held_out)
            shares = {level: _shares(level, levels).get(chain, 0.0) for level in levels}
            for number, group in enumerate(groups):
                weights = {
                    layer.name: layer.weight[number * n : (number + 1) * n]
                    for layer, n in zip(layers, rows.values(), strict=True)
                }
                inputs = exact[:, group], x[:, group]
                sums[number].add(*inputs, weights, shares, self._chains.workers)
                self._disk.release()
            del x
        for each in sums:
            each.mirror()
        self._disk.release()
        mixed = {
            level: sum(np.float32(n) * means[chain] for chain, n in _shares(level, levels).items())
            for level in levels
        }
        found: dict[str, list[MatrixStats] | None] = {layer.name: [] for layer in layers}
        for layer, (group, own) in itertools.product(layers, zip(groups, sums, strict=True)):
            seen = {
                level: LevelStats(
                    tuple(own.grams[level]),
                    own.drifts[level, layer.name],
                    mixed[level][group],
                    apart[level][:, group],
                )
                for level in levels
            }
            stats = MatrixStats(blocks, means[FLOAT][group], apart[FLOAT][:, group], seen)
            found[layer.name].append(stats)
        return found

    def gather_counts(self, layer: HeavyLayer) -> np.ndarray:
        """(rows,) float64: how often the samples read each row of a gathered table."""
        rows = len(layer.weight)
        counts = np.zeros(rows)
        for sample in range(self._chains.samples):
            indices = np.asarray(self._chains.input_of(layer, FLOAT, sample)).reshape(-1)
            counts += np.bincount(indices.astype(np.int64) % rows, minlength=rows)
        return counts

    def _rows(self, layer: HeavyLayer, chain: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows that a chain's samples give the layer, (rows, groups * columns) float32.

        Those to fit to and those held out; picked alike in every chain.
        """
        samples = self._chains.samples
        held = range(HELD_OUT - 1, samples, HELD_OUT) if samples >= 2 * HELD_OUT else range(0)
        columns, conv = layer.weight.shape[1], observed_use(layer).conv
        width = columns * (conv.group if conv else 1)
        parts = []
        for chosen, wanted in (
            ([sample for sample in range(samples) if sample not in held], rows_wanted(columns)),
            (held, _HELD_OUT_ROWS),
        ):
            limit = -(-wanted // max(len(chosen), 1))
            rows = np.empty((len(chosen) * limit, width), np.float32)  # touched as far as filled
            end = 0
            for sample in chosen:
                x = self._chains.input_of(layer, chain, sample)
                picked = _rows_of(x, conv, limit, np.random.default_rng(sample))
                if not np.isfinite(picked).all():
                    raise CalibrationError(
                        f"calibration sample {sample} gives layer {layer.name} an input with NaN "
                        "or infinity; remove the sample or check the model in float32"
                    )
                rows[end : end + len(picked)] = picked
                end += len(picked)
            parts.append(rows[:end])
        return parts[0], parts[1]


def input_key(layer: HeavyLayer) -> tuple[str, ConvGeometry | None]:
    """Equal for layers that multiply the same rows."""
    use = observed_use(layer)
    return use.activation_input, use.conv


def rows_wanted(columns: int) -> int:
    """Rows of activations that are used, as far as the samples give them."""
    return min(max(_ROW_WORK // columns**2, _ROWS[0]), _ROWS[1])


def row_count(x: np.ndarray, conv: ConvGeometry | None) -> int:
    """Rows that an activation gives the layer's matrix."""
    if conv is None:
        return x.size // max(x.shape[-1], 1)
    height = 1 if x.ndim == 3 else x.shape[2]
    return len(x) * _windows(height, conv, 0)[1] * _windows(x.shape[-1], conv, 1)[1]


def _shares(level: Level, levels: Sequence[Level]) -> dict[Level, float]:
    """Chains that a level's statistics are mixed of: mostly its own."""
    neighbour = NEIGHBOUR.get(level)
    if neighbour not in levels:
        return {level: 1.0}
    return {level: 1 - NEIGHBOUR_SHARE, neighbour: NEIGHBOUR_SHARE}


def _centre(rows: np.ndarray, held_out: np.ndarray) -> np.ndarray:
    """Subtract the mean of `rows`, (columns,) float32, from both in place, and return it."""
    mean = rows.mean(0, dtype=np.float64).astype(np.float32)
    rows -= mean
    held_out -= mean
    return mean


def _blocks(columns: int, unit: int) -> tuple[slice, ...]:
    """Runs of columns of equal width, multiples of `unit`."""
    count = -(-columns // _BLOCK_COLUMNS)
    width = -(-columns // (count * unit)) * unit
    return tuple(slice(b, min(b + width, columns)) for b in range(0, columns, width))


def _rows_of(
    x: np.ndarray, conv: ConvGeometry | None, limit: int, rng: np.random.Generator
) -> np.ndarray:
    """Rows that a layer's matrix multiplies, at most `limit`, picked alike for equal shapes."""
    with np.errstate(over="ignore", invalid="ignore"):
        if conv is not None:
            return _conv_rows(x, conv, limit, rng)
        rows = x.reshape(-1, x.shape[-1])
        return rows[_pick(len(rows), limit, rng)]


def _pick(count: int, limit: int, rng: np.random.Generator) -> np.ndarray:
    return np.arange(count) if count <= limit else np.sort(rng.choice(count, limit, replace=False))


def _conv_rows(
    x: np.ndarray, conv: ConvGeometry, limit: int, rng: np.random.Generator
) -> np.ndarray:
    """Rows of the matrix that an im2col would build.

    x: (n, channels, [height,] width); result: (rows, groups * columns), the columns of a group in
    the order (ky, kx, channel of the group), zeros where the kernel reaches into the padding.
    """
    if x.ndim == 3:
        x = x[:, :, None, :]
    count, channels = x.shape[:2]
    top, rows_out = _windows(x.shape[2], conv, 0)
    left, columns_out = _windows(x.shape[3], conv, 1)
    picked = _pick(count * rows_out * columns_out, limit, rng)
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
    return values.reshape(shape).transpose(0, 3, 1, 2, 4).reshape(len(picked), -1)


def _windows(size: int, conv: ConvGeometry, axis: int) -> tuple[int, int]:
    """Padding before an axis, and the number of outputs along it."""
    stride = conv.strides[axis]
    reach = (conv.kernel[axis] - 1) * conv.dilations[axis] + 1
    before, after = conv.pads[axis], conv.pads[axis + 2]
    if conv.auto_pad != "NOTSET":
        pad = max(0, (-(-size // stride) - 1) * stride + reach - size)
        small, large = pad // 2, pad - pad // 2
        before, after = (small, large) if conv.auto_pad == "SAME_UPPER" else (large, small)
    return before, max(0, (size + before + after - reach) // stride + 1)
