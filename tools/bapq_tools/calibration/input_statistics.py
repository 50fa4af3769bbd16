"""Collects the statistics of the layers' inputs out of the forward passes."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from bapq_edge.bank.layout import Level
from bapq_edge.errors import CalibrationError

from ..build_support.spill import Spill
from ..onnx_graph.ir import ConvGeometry, HeavyLayer
from .forward_passes import FLOAT, ForwardPasses
from .gram import PANEL_COLUMNS, GramMatrices
from .im2col import rows_of
from .matrix_stats import LevelStats, MatrixStats
from .reference_model import observed_use

NEIGHBOUR: dict[Level, Level] = {4: 2, 2: 4, 1: 2}
"""Levels with a forward pass of their own, and the level that plans mix each with most. Level 8
needs no pass: it is as good as float."""

NEIGHBOUR_SHARE = 0.2
"""Share of the neighbour's pass in a level's statistics: plans mix levels, so each must cope with
what the other leaves behind. On MiniLM, 0.2 instead of 0 takes level 4 from 0.992 to 0.988, level 2
from 0.871 to 0.874, and random mixes of the two from 0.921 and 0.902 to 0.938 and 0.924; 0.5 takes
level 4 to 0.978."""

HELD_OUT = 8
"""Every eighth sample is held out; with fewer than two such samples none is."""

_BLOCK_COLUMNS = 4608
"""Widest block of columns whose correlations are counted: 3x3 kernels over 512 channels."""

_LEAST_ROWS, _MOST_ROWS = 8192, 16384
_ROW_WORK = 1 << 36
"""Rows of activations used are as many as make this work (rows x columns²), within these bounds."""

_DEPTHWISE_ROWS = 2048
"""The same where every channel is a group: the few taps of a kernel need no more, and the rows of
all groups are in memory together."""

_HELD_OUT_ROWS = 1024


class InputStatistics:
    """The statistics of layers whose inputs the passes have just computed.

    One pass is read after the other, so that the rows of two of them, the float pass's and
    another's, are in memory at a time. What grows with the square of the columns is on disk.
    """

    def __init__(self, passes: ForwardPasses, spill: Spill) -> None:
        self._passes = passes
        self._spill = spill

    def of(
        self, layers: Sequence[HeavyLayer], unit: int = PANEL_COLUMNS
    ) -> dict[str, list[MatrixStats] | None]:
        """Statistics by layer name, of layers that multiply the same input (`input_key`).

        They have one entry per group of the convolution, and are None where no sample gives a row.
        Blocks of columns are multiples of `unit`, which is one of `PANEL_COLUMNS`. Raises
        CalibrationError where the input is not finite.
        """
        columns = layers[0].weight.shape[1]
        exact, held_out = self._rows(layers[0], FLOAT)
        if not len(exact):
            return dict.fromkeys(layer.name for layer in layers)
        groups = [slice(begin, begin + columns) for begin in range(0, exact.shape[1], columns)]
        levels = self._passes.levels[1:]
        rows = {layer.name: len(layer.weight) // len(groups) for layer in layers}
        blocks = _blocks(columns, unit)
        matrices = [GramMatrices.zeros(blocks, levels, rows, self._spill) for _ in groups]
        means = {FLOAT: _centre(exact, held_out)}
        apart = {FLOAT: self._spill.put(held_out)}
        for own in levels:
            x, held_out = self._rows(layers[0], own)
            means[own] = _centre(x, held_out)
            apart[own] = self._spill.put(held_out)
            shares = {level: _shares(level, levels).get(own, 0.0) for level in levels}
            for number, group in enumerate(groups):
                weights = {
                    layer.name: layer.weight[number * n : (number + 1) * n]
                    for layer, n in zip(layers, rows.values(), strict=True)
                }
                inputs = exact[:, group], x[:, group]
                matrices[number].add(*inputs, weights, shares, self._passes.workers)
                self._spill.release()
            del x
        for each in matrices:
            each.mirror()
        self._spill.release()
        mixed = {
            level: np.sum([np.float32(n) * means[k] for k, n in _shares(level, levels).items()], 0)
            for level in levels
        }
        found: dict[str, list[MatrixStats]] = {layer.name: [] for layer in layers}
        for layer, (group, sums) in itertools.product(layers, zip(groups, matrices, strict=True)):
            by_level = {
                level: LevelStats(
                    tuple(sums.grams[level]),
                    sums.drifts[level, layer.name],
                    mixed[level][group],
                    apart[level][:, group],
                )
                for level in levels
            }
            stats = MatrixStats(blocks, means[FLOAT][group], apart[FLOAT][:, group], by_level)
            found[layer.name].append(stats)
        return dict(found)

    def gather_counts(self, layer: HeavyLayer) -> np.ndarray:
        """How often the samples read each row of a gathered table, (rows,) float64."""
        rows = len(layer.weight)
        counts = np.zeros(rows)
        for sample in range(self._passes.samples):
            indices = np.asarray(self._passes.input_of(layer, FLOAT, sample)).reshape(-1)
            counts += np.bincount(indices.astype(np.int64) % rows, minlength=rows)
        return counts

    def _rows(self, layer: HeavyLayer, level: Level) -> tuple[np.ndarray, np.ndarray]:
        """The rows that the pass of a level gives the layer, (rows, groups * columns) float32.

        Rows to fit to come first, held-out rows second. They are picked alike in every pass.
        """
        samples = self._passes.samples
        held = range(HELD_OUT - 1, samples, HELD_OUT) if samples >= 2 * HELD_OUT else range(0)
        columns, conv = layer.weight.shape[1], observed_use(layer).conv
        width = columns * (conv.group if conv else 1)
        parts = []
        for chosen, wanted in (
            ([sample for sample in range(samples) if sample not in held], _rows_wanted(layer)),
            (held, _HELD_OUT_ROWS),
        ):
            limit = -(-wanted // max(len(chosen), 1))
            rows = np.empty((len(chosen) * limit, width), np.float32)  # touched as far as filled
            end = 0
            for sample in chosen:
                x = self._passes.input_of(layer, level, sample)
                picked = rows_of(x, conv, limit, np.random.default_rng(sample))
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
    """A key that is equal for layers that multiply the same rows."""
    use = observed_use(layer)
    return use.activation_input, use.conv


def _rows_wanted(layer: HeavyLayer) -> int:
    """Rows of activations that are used, as far as the samples give them."""
    if layer.depthwise:
        return _DEPTHWISE_ROWS
    columns: int = layer.weight.shape[1]
    return min(max(_ROW_WORK // columns**2, _LEAST_ROWS), _MOST_ROWS)


def _shares(level: Level, levels: Sequence[Level]) -> dict[Level, float]:
    """The passes that a level's statistics are mixed of, mostly its own, and their shares."""
    neighbour = NEIGHBOUR.get(level)
    if neighbour is None or neighbour not in levels:
        return {level: 1.0}
    return {level: 1 - NEIGHBOUR_SHARE, neighbour: NEIGHBOUR_SHARE}


def _centre(rows: np.ndarray, held_out: np.ndarray) -> np.ndarray:
    """Subtract the mean of `rows` from both in place; return it, (columns,) float32."""
    mean: np.ndarray = rows.mean(0, dtype=np.float64).astype(np.float32)
    rows -= mean
    held_out -= mean
    return mean


def _blocks(columns: int, unit: int) -> tuple[slice, ...]:
    """Cut the columns into runs of equal width, which is a multiple of `unit`."""
    count = -(-columns // _BLOCK_COLUMNS)
    width = -(-columns // (count * unit)) * unit
    return tuple(slice(b, min(b + width, columns)) for b in range(0, columns, width))
