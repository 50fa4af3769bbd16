"""The heavy layers of a model, as the stages of a build hand them to each other."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import onnx

from bapq_edge.bank.manifest import KeptNode

Operator = Literal["MatMul", "Gemm", "Conv", "DepthwiseConv", "Gather"]
AutoPad = Literal["NOTSET", "SAME_UPPER", "SAME_LOWER"]
Function = Literal["hard_swish", "silu", "gelu", "gelu_tanh"]
"""What an operator can apply to a product and its bias."""


@dataclass(frozen=True)
class Activation:
    """A Relu or Clip behind a node, fused into it as the last step: min(max(y, low), high)."""

    low: float = -float("inf")
    high: float = float("inf")


@dataclass(frozen=True)
class ConvGeometry:
    """Attributes of a 1-D or 2-D Conv; 1-D is 2-D with height 1."""

    kernel: tuple[int, int]
    strides: tuple[int, int] = (1, 1)
    pads: tuple[int, int, int, int] = (0, 0, 0, 0)
    """Top, left, bottom, right. Unused unless auto_pad is NOTSET."""
    dilations: tuple[int, int] = (1, 1)
    group: int = 1
    auto_pad: AutoPad = "NOTSET"
    dimensions: Literal[1, 2] = 2


@dataclass(frozen=True)
class LayerUse:
    """One node that reads a heavy layer."""

    node: onnx.NodeProto
    """The node itself, inside the folded model."""
    replaced: tuple[onnx.NodeProto, ...]
    """The node and those behind it that are fused into it: the operator replaces them all, and
    stands where the last of them did."""
    operator: Operator
    activation_input: str
    """Tensor that the layer multiplies (Gather: the indices)."""
    output: str
    """Tensor that the operator writes: the output of the last of `replaced`."""
    graph: onnx.GraphProto
    """The graph or body that holds the node."""
    is_body: bool
    """True inside an If, Loop or Scan body, where no activation can be observed from outside."""
    activation: Activation = field(default_factory=Activation)
    conv: ConvGeometry | None = None
    function: Function | None = None
    """Applied to the product and its bias."""
    residual: str = ""
    """Tensor that is added to what the function gives, of the same shape; empty for none."""
    behind: tuple[onnx.NodeProto, ...] = ()
    """Those of `replaced` that stand for `function`, `residual` and `activation`."""


@dataclass
class HeavyLayer:
    """One weight matrix and every node that reads it; tied weights have more than one."""

    name: str
    """Unique; letters, digits, '.', '_' and '-' only."""
    weight: np.ndarray
    """Shape (rows, columns), float32. Rows are output channels, or rows of a gathered table.
    Columns are input features, of a Conv in the order (kernel_y, kernel_x, channel of a group)."""
    bias: np.ndarray | None
    """Shape (rows,), float32; None without a bias."""
    uses: tuple[LayerUse, ...]
    initializers: tuple[str, ...]
    """Names of the initializers that the bank replaces: weight and fused bias."""

    @property
    def gathered(self) -> bool:
        """Whether a Gather reads the rows by their number."""
        return any(use.operator == "Gather" for use in self.uses)

    @property
    def depthwise(self) -> bool:
        """Whether each row has one input channel; no other operator then reads the layer."""
        return self.uses[0].operator == "DepthwiseConv"


@dataclass
class LayerPlan:
    """The result of `find_layers`."""

    layers: list[HeavyLayer]
    """In execution order."""
    kept_in_float: list[KeptNode]
    """Nodes with weights that stay with the graph engine."""
    ranks: dict[str, int]
    """Axes of what a MaxPool or LayerNormalization reads, where that is known to be float32."""
