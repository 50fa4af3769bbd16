"""What the stages of the host pipeline hand to each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import onnx

from bapq_edge.bank.layout import Level
from bapq_edge.bank.manifest import KeptNode

Operator = Literal["MatMul", "Gemm", "Conv", "Gather"]


@dataclass(frozen=True)
class Activation:
    """A Relu or Clip that follows the node and is fused into it: y = min(max(y, low), high)."""

    low: float = -float("inf")
    high: float = float("inf")


@dataclass(frozen=True)
class ConvGeometry:
    """Attributes of a 1-D or 2-D Conv; 1-D is 2-D with height 1."""

    kernel: tuple[int, int]
    strides: tuple[int, int] = (1, 1)
    pads: tuple[int, int, int, int] = (0, 0, 0, 0)
    """top, left, bottom, right; unused unless auto_pad is NOTSET"""
    dilations: tuple[int, int] = (1, 1)
    group: int = 1
    auto_pad: Literal["NOTSET", "SAME_UPPER", "SAME_LOWER"] = "NOTSET"
    dimensions: Literal[1, 2] = 2


@dataclass(frozen=True)
class LayerUse:
    """One node that reads a heavy layer."""

    node: onnx.NodeProto
    """The node itself, inside the folded model."""
    replaced: tuple[onnx.NodeProto, ...]
    """The node and the bias/activation nodes fused into it: the operator replaces them all."""
    operator: Operator
    activation_input: str
    """Tensor that the layer multiplies (Gather: the indices)."""
    output: str
    """Tensor that the operator writes: the output of the last of `replaced`."""
    graph: onnx.GraphProto
    """The graph or body that holds the node."""
    is_body: bool
    """True inside an If/Loop/Scan body, where no activation can be observed from outside."""
    activation: Activation = field(default_factory=Activation)
    conv: ConvGeometry | None = None


@dataclass
class HeavyLayer:
    """One weight matrix and every node that reads it (tied weights: more than one)."""

    name: str
    """Unique; letters, digits, '.', '_' and '-' only."""
    weight: np.ndarray
    """(rows, columns) float32: rows are output channels (Gather: table rows); columns are input
    features; of a Conv in the order (kernel_y, kernel_x, input channel of the group)."""
    bias: np.ndarray | None
    """(rows,) float32, or None"""
    uses: tuple[LayerUse, ...]
    initializers: tuple[str, ...]
    """Names of the initializers that the bank replaces (weight and fused bias)."""


@dataclass(frozen=True)
class LayerOptions:
    """What was asked for one layer, by the build or by its recipe."""

    levels: tuple[Level, ...]
    """Levels that the layer gets, highest first: those of the bank or some of them"""
    scale_columns: Mapping[Level, int] = field(default_factory=dict)
    """Columns per scale, where the quantizer is not to choose"""
    prune_tau: float = 0.0
    """Weights smaller than this share of the layer's largest are zeroed"""


@dataclass
class LayerPlan:
    """Result of the layers stage, in execution order."""

    layers: list[HeavyLayer]
    kept_in_float: list[KeptNode]


@dataclass(frozen=True)
class LevelStats:
    """What a layer meets where the layers before it run at a level; inputs are centred."""

    grams: tuple[np.ndarray, ...]
    """per block of columns, (c, c) float32: mean of x xᵀ"""
    drift: np.ndarray
    """(rows, columns) float32: mean of W (x_float - x) xᵀ, how earlier errors show in the output"""
    mean: np.ndarray
    """(columns,) float32: mean of x before centring"""
    held_out: np.ndarray
    """(samples, columns) float32: inputs that nothing is fitted to"""


@dataclass(frozen=True)
class MatrixStats:
    """What calibration saw of the input of a matrix: a layer, or one group of a grouped Conv."""

    blocks: tuple[slice, ...]
    """runs of columns; correlations between them are not known"""
    mean: np.ndarray
    """(columns,) float32: mean of the float model's input"""
    held_out: np.ndarray
    """(samples, columns) float32: the float model's inputs, centred, of `LevelStats.held_out`"""
    levels: dict[Level, LevelStats]
    """of levels 4, 2 and 1, as far as the bank has them"""

    def part(self, rows: slice, block: int) -> MatrixStats:
        """What is known for some rows of the matrix and one block of its columns."""
        columns = self.blocks[block]
        levels = {
            level: LevelStats(
                (seen.grams[block],),
                seen.drift[rows, columns],
                seen.mean[columns],
                seen.held_out[:, columns],
            )
            for level, seen in self.levels.items()
        }
        whole = slice(0, columns.stop - columns.start)
        return MatrixStats((whole,), self.mean[columns], self.held_out[:, columns], levels)
