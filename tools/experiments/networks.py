"""The networks of the experiments: an MLP with random weights, and a small CNN."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

__all__ = ["MLP_SIZES", "Distribution", "cnn_to_onnx", "synthetic_mlp"]

Distribution = Literal["uniform", "normal"]
MLP_SIZES = (784, 512, 256, 10)


def synthetic_mlp(
    distribution: Distribution, seed: int, sizes: Sequence[int] = MLP_SIZES
) -> onnx.ModelProto:
    """An MLP with ReLU between its layers, x (batch, sizes[0]) to scores (batch, sizes[-1]).

    Its weights have the variance 2 / inputs (He et al., 2015), drawn uniform or normal.
    """
    random = np.random.default_rng(seed)
    nodes, tensors, source = [], [], "x"
    for index, (columns, rows) in enumerate(itertools.pairwise(sizes)):
        deviation = np.sqrt(2 / columns)
        if distribution == "uniform":
            reach = deviation * np.sqrt(3)
            weight = random.uniform(-reach, reach, (rows, columns))
        else:
            weight = random.normal(0, deviation, (rows, columns))
        last = index == len(sizes) - 2
        tensors.append(numpy_helper.from_array(weight.astype(np.float32), f"fc{index}.weight"))
        target = "scores" if last else f"fc{index}"
        nodes.append(
            helper.make_node("Gemm", [source, f"fc{index}.weight"], [target], target, transB=1)
        )
        if not last:
            source = f"relu{index}"
            nodes.append(helper.make_node("Relu", [target], [source], source))
    return _model(nodes, tensors, ("x", ["batch", sizes[0]]), ("scores", ["batch", sizes[-1]]))


def cnn_to_onnx(
    parameters: Mapping[str, np.ndarray], image_shape: tuple[int, int, int]
) -> onnx.ModelProto:
    """The trained CNN, image (batch, channels, side, side) to logits (batch, classes).

    `parameters` are those of `cnn_training.train_cnn`.
    """
    nodes, tensors, source = [], [], "image"
    depth = sum(name.endswith(".weight") for name in parameters) - 1
    side = image_shape[1]
    for index in range(depth):
        name = f"conv{index}"
        weight = parameters[f"{name}.weight"]  # (3 * 3 * inputs, outputs), inputs last
        kernel = weight.reshape(3, 3, weight.shape[0] // 9, -1).transpose(3, 2, 0, 1)
        names = [source, f"{name}.weight", f"{name}.bias"]
        tensors.append(numpy_helper.from_array(np.ascontiguousarray(kernel), names[1]))
        tensors.append(numpy_helper.from_array(parameters[names[2]], names[2]))
        nodes.append(
            helper.make_node("Conv", names, [name], name, kernel_shape=[3, 3], pads=[1, 1, 1, 1])
        )
        nodes.append(helper.make_node("Relu", [name], [f"relu{index}"], f"relu{index}"))
        source = f"pool{index}"
        nodes.append(
            helper.make_node(
                "MaxPool", [f"relu{index}"], [source], source, kernel_shape=[2, 2], strides=[2, 2]
            )
        )
        side //= 2
    nodes.append(helper.make_node("Flatten", [source], ["flat"], "flat"))
    weight = parameters["linear.weight"]  # (side * side * channels, classes), channels last
    classes = weight.shape[1]
    flat = weight.reshape(side, side, -1, classes).transpose(3, 2, 0, 1).reshape(classes, -1)
    tensors.append(numpy_helper.from_array(np.ascontiguousarray(flat), "linear.weight"))
    tensors.append(numpy_helper.from_array(parameters["linear.bias"], "linear.bias"))
    names = ["flat", "linear.weight", "linear.bias"]
    nodes.append(helper.make_node("Gemm", names, ["logits"], "logits", transB=1))
    shapes = ("image", ["batch", *image_shape]), ("logits", ["batch", classes])
    return _model(nodes, tensors, *shapes)


def _model(
    nodes: list[onnx.NodeProto],
    tensors: list[onnx.TensorProto],
    source: tuple[str, list[int | str]],
    target: tuple[str, list[int | str]],
) -> onnx.ModelProto:
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in (source, target)
    ]
    graph = helper.make_graph(nodes, "experiment", values[:1], values[1:], tensors)
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8, producer_name="bapq"
    )
    onnx.checker.check_model(model, full_check=True)
    return model
