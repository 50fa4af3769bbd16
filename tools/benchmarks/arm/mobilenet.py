"""MobileNetV2 (Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks", 2018).

The weights are He-normal: right for speed and memory; the answers mean nothing.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

__all__ = ["build_mobilenet_v2"]

_BLOCKS = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
"""expansion, channels, repeats and stride of the first repeat: table 2 of the paper"""
_STEM, _HEAD, _CLASSES, _SIDE = 32, 1280, 1000, 224


def build_mobilenet_v2(out_path: Path) -> None:
    """Write the ONNX model (opset 13): image (1, 3, 224, 224) to logits (1, 1000).

    Batch norms are folded into the convolutions, as exporters do.
    """
    graph = _Graph()
    x, channels = graph.relu6(graph.conv("image", 3, _STEM, size=3, stride=2)), _STEM
    for expansion, filters, repeats, first_stride in _BLOCKS:
        for repeat in range(repeats):
            stride = first_stride if repeat == 0 else 1
            x, channels = graph.bottleneck(x, channels, expansion, filters, stride), filters
    x = graph.relu6(graph.conv(x, channels, _HEAD))
    x = graph.node("Flatten", [graph.node("GlobalAveragePool", [x])])
    matrix, bias = graph.weight(_CLASSES, _HEAD), graph.weight(_CLASSES)
    graph.nodes.append(helper.make_node("Gemm", [x, matrix, bias], ["logits"], transB=1))
    proto = helper.make_graph(
        graph.nodes,
        "mobilenet_v2",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 3, _SIDE, _SIDE])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, _CLASSES])],
        graph.initializers,
    )
    model = helper.make_model(proto, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, out_path)


class _Graph:
    """Nodes and initializers, appended in execution order."""

    def __init__(self) -> None:
        self.random = np.random.default_rng(0)
        self.nodes: list[onnx.NodeProto] = []
        self.initializers = [
            numpy_helper.from_array(np.float32(bound), name)
            for name, bound in (("zero", 0), ("six", 6))
        ]

    def bottleneck(self, x: str, channels: int, expansion: int, filters: int, stride: int) -> str:
        inner = channels * expansion
        y = x if expansion == 1 else self.relu6(self.conv(x, channels, inner))
        y = self.relu6(self.conv(y, 1, inner, size=3, stride=stride, group=inner))
        y = self.conv(y, inner, filters)
        return self.node("Add", [x, y]) if (stride, filters) == (1, channels) else y

    def conv(
        self, x: str, channels: int, filters: int, *, size: int = 1, stride: int = 1, group: int = 1
    ) -> str:
        """A convolution of `channels` per group."""
        return self.node(
            "Conv",
            [x, self.weight(filters, channels, size, size), self.weight(filters)],
            kernel_shape=[size, size],
            pads=[size // 2] * 4,
            strides=[stride, stride],
            group=group,
        )

    def relu6(self, x: str) -> str:
        return self.node("Clip", [x, "zero", "six"])

    def node(self, operator: str, inputs: list[str], **attributes: Any) -> str:
        name = f"{operator}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, inputs, [name], name=name, **attributes))
        return name

    def weight(self, *shape: int) -> str:
        """A matrix or a filter, or a bias near zero."""
        spread = math.sqrt(2 / math.prod(shape[1:])) if len(shape) > 1 else 0.05
        values = np.float32(spread) * self.random.standard_normal(shape, np.float32)
        name = f"weight_{len(self.initializers)}"
        self.initializers.append(numpy_helper.from_array(values, name))
        return name
