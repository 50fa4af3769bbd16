"""Statistics of the layers' inputs, as error-compensated rounding needs them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from bapq_edge.bank.layout import Level
from bapq_edge.errors import CalibrationError

from .chains import FLOAT, Chains
from .ir import ConvGeometry, HeavyLayer, LevelStats, MatrixStats
from .reference import observed_use

T = TypeVar("T")

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
    """Statistics of layers whose inputs are at hand; layers that share an input share the work."""

    def __init__(self, chains: Chains) -> None:
        self._chains = chains
        self._inputs: dict[tuple[str, ConvGeometry | None], list[Centred]] = {}

    def of(self, layer: HeavyLayer) -> list[MatrixStats] | None:
        """Statistics of a layer that multiplies, one entry per group of its convolution.

        None where no sample gives it a row. Raises CalibrationError where its input is not finite.
        """
        use = observed_use(layer)
        key = (use.activation_input, use.conv)
        columns = layer.weight.shape[1]
        if key not in self._inputs:
            self._inputs[key] = self._collect(layer, columns)
        centred = self._inputs[key]
        if not centred:
            return None
        rows = len(layer.weight) // len(centred)
        return [
            inputs.stats(layer.weight[group * rows : (group + 1) * rows])
            for group, inputs in enumerate(centred)
        ]

    def gather_counts(self, layer: HeavyLayer) -> np.ndarray:
        """(rows,) float64: how often the samples read each row of a gathered table."""
        rows = len(layer.weight)
        counts = np.zeros(rows)
        for sample in range(self._chains.samples):
            indices = np.asarray(self._chains.input_of(layer, FLOAT, sample)).reshape(-1)
            counts += np.bincount(indices.astype(np.int64) % rows, minlength=rows)
        return counts

    def _collect(self, layer: HeavyLayer, columns: int) -> list[Centred]:
        """Inputs of a layer in every chain, rows picked alike; one entry per group."""
        samples = self._chains.samples
        held = range(HELD_OUT - 1, samples, HELD_OUT) if samples >= 2 * HELD_OUT else range(0)
        fitted = [sample for sample in range(samples) if sample not in held]
        wanted = min(max(_ROW_WORK // columns**2, _ROWS[0]), _ROWS[1])
        conv = observed_use(layer).conv
        rows: dict[int, list[np.ndarray]] = {chain: [] for chain in self._chains.chains}
        held_rows: dict[int, list[np.ndarray]] = {chain: [] for chain in self._chains.chains}
        for sample in range(samples):
            if sample in held:
                limit, target = -(-_HELD_OUT_ROWS // len(held)), held_rows
            else:
                limit, target = -(-wanted // len(fitted)), rows
            for chain in self._chains.chains:
                x = self._chains.input_of(layer, chain, sample)
                picked = _rows_of(x, conv, limit, np.random.default_rng(sample))
                if not np.isfinite(picked).all():
                    raise CalibrationError(
                        f"calibration sample {sample} gives layer {layer.name} an input with NaN "
                        "or infinity; remove the sample or check the model in float32"
                    )
                target[chain].append(picked)
        fit = {chain: np.concatenate(parts) for chain, parts in rows.items()}
        apart = {chain: np.concatenate([fit[chain][:0], *p]) for chain, p in held_rows.items()}
        if not len(fit[FLOAT]):
            return []
        return [
            Centred.of(
                {chain: x[:, begin : begin + columns] for chain, x in fit.items()},
                {chain: x[:, begin : begin + columns] for chain, x in apart.items()},
            )
            for begin in range(0, fit[FLOAT].shape[1], columns)
        ]


@dataclass(frozen=True)
class Centred:
    """Inputs of one matrix, centred, with their second moments."""

    blocks: tuple[slice, ...]
    means: dict[int, np.ndarray]
    fitted: dict[int, np.ndarray]
    held_out: dict[int, np.ndarray]
    grams: dict[int, tuple[np.ndarray, ...]]

    @classmethod
    def of(cls, fitted: Mapping[int, np.ndarray], held_out: Mapping[int, np.ndarray]) -> Centred:
        """Both by chain, (rows, columns) each; rows of all chains belong together."""
        means = {c: x.mean(0, dtype=np.float64).astype(np.float32) for c, x in fitted.items()}
        centred = {chain: x - means[chain] for chain, x in fitted.items()}
        blocks = _blocks(len(means[FLOAT]))
        return cls(
            blocks,
            means,
            centred,
            {chain: x - means[chain] for chain, x in held_out.items()},
            _per_chain(lambda chain: _grams(centred[chain], blocks), set(centred) - {FLOAT}),
        )

    def stats(self, weight: np.ndarray) -> MatrixStats:
        """Statistics for a matrix (rows, columns) that multiplies these inputs."""
        x = self.fitted
        drifts = _per_chain(lambda chain: _drift(weight, x[FLOAT], x[chain]), self.grams)
        levels = {chain: self._mixed(chain, drifts) for chain in self.grams}
        return MatrixStats(self.blocks, self.means[FLOAT], self.held_out[FLOAT], levels)

    def _mixed(self, level: Level, drifts: Mapping[int, np.ndarray]) -> LevelStats:
        """Statistics of a level: mostly its own chain's."""
        neighbour = NEIGHBOUR.get(level)
        shares = {level: 1.0}
        if neighbour in self.grams:
            shares = {level: 1 - NEIGHBOUR_SHARE, neighbour: NEIGHBOUR_SHARE}

        def mix(values: Mapping[int, np.ndarray]) -> np.ndarray:
            return sum(np.float32(share) * values[chain] for chain, share in shares.items())

        grams = tuple(
            mix({chain: grams[index] for chain, grams in self.grams.items()})
            for index in range(len(self.blocks))
        )
        return LevelStats(grams, mix(drifts), mix(self.means), self.held_out[level])


def _per_chain(function: Callable[[int], T], chains: Iterable[int]) -> dict[int, T]:
    """Results by chain; each has a thread, since BLAS has one."""
    chains = sorted(chains)
    with ThreadPoolExecutor(max(1, len(chains))) as pool:
        return dict(zip(chains, pool.map(function, chains), strict=True))


def _blocks(columns: int) -> tuple[slice, ...]:
    """Runs of columns of equal width, multiples of 384 so that no scale group is cut."""
    count = -(-columns // _BLOCK_COLUMNS)
    width = -(-columns // (count * 384)) * 384
    return tuple(slice(b, min(b + width, columns)) for b in range(0, columns, width))


def _grams(x: np.ndarray, blocks: Iterable[slice]) -> tuple[np.ndarray, ...]:
    return tuple(x[:, block].T @ x[:, block] / np.float32(len(x)) for block in blocks)


def _drift(weight: np.ndarray, x_float: np.ndarray, x: np.ndarray) -> np.ndarray:
    return ((x_float - x) @ weight.T).T @ x / np.float32(len(x))


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
