"""A residual network of a million weights for digits of 32x32 pixels, from its trained weights.

Inverted bottlenecks (Sandler et al., "MobileNetV2", 2018) and basic blocks (He et al., "Deep
Residual Learning", 2015). Batch norms stay nodes and convolutions have no bias, as frameworks
export them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from .packed_weights import read_packed

__all__ = [
    "BLOCKS",
    "CLASSES",
    "HEAD",
    "STEM",
    "Block",
    "build_digits_resnet",
    "digits_resnet_path",
    "make_digits_resnet",
    "weight_shapes",
]

_REPOSITORY = Path(__file__).resolve().parents[3]


@dataclass(frozen=True)
class Block:
    """Convolutions around which the input is added, where the shapes agree.

    A basic block adds it always: through a projection where they do not.
    """

    kind: Literal["bottleneck", "basic"]
    """A bottleneck is 1x1 up, 3x3 depthwise, 1x1 down; a basic block has two of 3x3."""
    inner: int
    """Channels between the convolutions."""
    channels: int
    stride: int = 1


STEM = 32
"""Channels of the first convolution, 3x3 of stride 2."""
BLOCKS = (
    Block("bottleneck", 128, 32),  # 16x16
    Block("bottleneck", 192, 64, stride=2),  # 8x8
    Block("bottleneck", 320, 64),
    Block("basic", 128, 128, stride=2),  # 4x4
    Block("bottleneck", 640, 128),
    Block("bottleneck", 640, 128),
    Block("basic", 128, 128),
)
HEAD = 640
"""Channels of the last convolution, 1x1, before the average over the image."""
CLASSES = 10


def digits_resnet_path(repository: Path = _REPOSITORY) -> Path:
    """Path of the bundled weights."""
    return repository / "examples" / "models" / "digits_resnet.weights.xz"


def build_digits_resnet(out_path: str | Path) -> None:
    """Write the ONNX model (opset 17): image (batch, 1, 32, 32) to logits (batch, 10).

    Raises ModelFormatError when the bundled weights are not those of this network.
    """
    onnx.save(make_digits_resnet(read_packed(digits_resnet_path(), weight_shapes())), out_path)


def weight_shapes() -> dict[str, tuple[int, ...]]:
    """Shape of each weight by name, in the order of the graph."""
    graph = _Graph(None)
    graph.build()
    return graph.shapes


def make_digits_resnet(weights: Mapping[str, np.ndarray]) -> onnx.ModelProto:
    """The model with these float32 weights, of the names and shapes of `weight_shapes`."""
    graph = _Graph(weights)
    graph.build()
    model = helper.make_model(
        graph.to_proto(),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,
        producer_name="bapq",
    )
    onnx.checker.check_model(model, full_check=True)
    return model


class _Graph:
    """Nodes and initializers, appended in execution order; without weights, only their shapes."""

    def __init__(self, weights: Mapping[str, np.ndarray] | None) -> None:
        self.weights = weights
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.nodes: list[onnx.NodeProto] = []
        self.initializers = [
            numpy_helper.from_array(np.float32(bound), name)
            for name, bound in (("zero", 0), ("six", 6))
        ]

    def build(self) -> None:
        x, channels = self.relu6(self.norm("image", "stem", 1, STEM, size=3, stride=2)), STEM
        for index, block in enumerate(BLOCKS):
            make = self.bottleneck if block.kind == "bottleneck" else self.basic
            x, channels = make(x, f"blocks.{index}", channels, block), block.channels
        x = self.relu6(self.norm(x, "head", channels, HEAD))
        x = self.node("Flatten", [self.node("GlobalAveragePool", [x], "average")], "features")
        matrix = self.weight("linear.weight", CLASSES, HEAD)
        self.node("Gemm", [x, matrix, self.weight("linear.bias", CLASSES)], "logits", transB=1)

    def bottleneck(self, x: str, name: str, channels: int, block: Block) -> str:
        y = self.relu6(self.norm(x, f"{name}.expand", channels, block.inner))
        y = self.norm(
            y, f"{name}.depthwise", 1, block.inner, size=3, stride=block.stride, group=block.inner
        )
        y = self.norm(self.relu6(y), f"{name}.project", block.inner, block.channels)
        if (block.stride, block.channels) != (1, channels):
            return y
        return self.node("Add", [x, y], f"{name}.sum")

    def basic(self, x: str, name: str, channels: int, block: Block) -> str:
        y = self.norm(x, f"{name}.conv1", channels, block.inner, size=3, stride=block.stride)
        y = self.node("Relu", [y], f"{name}.relu1")
        y = self.norm(y, f"{name}.conv2", block.inner, block.channels, size=3)
        if (block.stride, block.channels) != (1, channels):
            x = self.norm(x, f"{name}.shortcut", channels, block.channels, stride=block.stride)
        return self.node("Relu", [self.node("Add", [x, y], f"{name}.sum")], f"{name}.relu2")

    def norm(
        self,
        x: str,
        name: str,
        channels: int,
        filters: int,
        *,
        size: int = 1,
        stride: int = 1,
        group: int = 1,
    ) -> str:
        """A convolution of `channels` per group to `filters`, and its batch norm."""
        y = self.node(
            "Conv",
            [x, self.weight(f"{name}.conv.weight", filters, channels, size, size)],
            f"{name}.conv",
            kernel_shape=[size, size],
            pads=[size // 2] * 4,
            strides=[stride, stride],
            group=group,
        )
        statistics = [
            self.weight(f"{name}.norm.{part}", filters)
            for part in ("weight", "bias", "running_mean", "running_var")
        ]
        return self.node("BatchNormalization", [y, *statistics], f"{name}.norm", epsilon=1e-5)

    def relu6(self, x: str) -> str:
        return self.node("Clip", [x, "zero", "six"], f"{x.removesuffix('.norm')}.relu6")

    def node(self, operator: str, inputs: list[str], output: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(operator, inputs, [output], name=output, **attributes))
        return output

    def weight(self, name: str, *shape: int) -> str:
        self.shapes[name] = shape
        if self.weights is not None:
            self.initializers.append(numpy_helper.from_array(self.weights[name], name))
        return name

    def to_proto(self) -> onnx.GraphProto:
        return helper.make_graph(
            self.nodes,
            "digits_resnet",
            [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 1, 32, 32])],
            [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", CLASSES])],
            self.initializers,
        )
