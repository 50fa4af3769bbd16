"""The nine CNN architectures that the onnx package carries for its backend tests, with weights.

The package's files hold most weights as ConstantOfShape, too uniform to quantize, and the rest as
trained values that no longer fit. All are drawn anew: He-normal (He et al., "Delving Deep into
Rectifiers", 2015), so that activations keep their spread through the net. Right for speed, memory
and numerics; the answers mean nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from bapq_edge.errors import ModelFormatError

__all__ = ["LIGHT_CNNS", "build_light_cnn"]

LIGHT_CNNS: tuple[str, ...] = (
    "bvlc_alexnet",
    "densenet121",
    "inception_v1",
    "inception_v2",
    "resnet50",
    "shufflenet",
    "squeezenet",
    "vgg19",
    "zfnet512",
)

_FILES = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light"
_IR_VERSION = 4
"""The first version in which an initializer need not be a graph input."""
_BRANCH_SCALE = 0.3
"""Scale of the last batch norm of a residual branch: 16 sums of full branches would double the
variance 16 times."""

_Draw = Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]


def build_light_cnn(name: str, out_path: str | Path, seed: int = 0) -> None:
    """Write one of LIGHT_CNNS (opset 9, batch 1, 224x224 images) with weights drawn from seed.

    Made for images of zero mean and unit variance. Raises ValueError for an unknown name.
    """
    if name not in LIGHT_CNNS:
        raise ValueError(f"no architecture {name!r}; choose one of {', '.join(LIGHT_CNNS)}")
    model = onnx.load(_FILES / f"light_{name}.onnx")
    graph = model.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    shapes = {key: tuple(tensor.dims) for key, tensor in constants.items()}
    for node in graph.node:
        if node.op_type == "ConstantOfShape":
            shape = numpy_helper.to_array(constants[node.input[0]])
            shapes[node.output[0]] = tuple(int(size) for size in shape)
    kept = [node for node in graph.node if node.op_type != "ConstantOfShape"]
    inputs = [value for value in graph.input if value.name not in shapes]
    del graph.node[:], graph.input[:], graph.initializer[:]
    graph.node.extend(kept)
    graph.input.extend(inputs)

    draws = _draws(kept)
    random = np.random.default_rng(seed)
    read = dict.fromkeys(source for node in kept for source in node.input if source in shapes)
    for tensor in read:
        if tensor in draws:
            values = draws[tensor](random, shapes[tensor])
            graph.initializer.append(numpy_helper.from_array(values, tensor))
        elif tensor in constants and constants[tensor].data_type == onnx.TensorProto.INT64:
            graph.initializer.append(constants[tensor])  # the target of a Reshape
        else:
            raise ModelFormatError(
                f"light_{name}.onnx: {tensor!r} has no known role; use onnx 1.16 to 1.23"
            )
    model.ir_version = _IR_VERSION
    onnx.save(model, out_path)


def _draws(nodes: list[onnx.NodeProto]) -> dict[str, _Draw]:
    """Choose how to draw each weight, by the node that reads it."""
    producers = {output: node for node in nodes for output in node.output}
    readers = {source: node for node in nodes for source in node.input}
    draws: dict[str, _Draw] = {}
    for node in nodes:
        if node.op_type == "Conv":
            draws[node.input[1]] = _he_normal(lambda shape: math.prod(shape[1:]))
        elif node.op_type == "Gemm":
            axis = -1 if any(a.name == "transB" and a.i for a in node.attribute) else -2
            reshape = producers.get(node.input[1])  # inception_v1 stores its matrix as 4-D
            weight = reshape.input[0] if reshape else node.input[1]
            draws[weight] = _he_normal(lambda shape, axis=axis: shape[axis])
        elif node.op_type == "BatchNormalization":
            draws[node.input[1]] = _around(_norm_scale(node, producers, readers))
            draws[node.input[3]] = _around(0.0)
            draws[node.input[4]] = _around(1.0)
        if node.op_type in ("Conv", "Gemm", "BatchNormalization") and len(node.input) > 2:
            draws[node.input[2]] = _around(0.0)
        if node.op_type == "Unsqueeze" and node.input[0] not in producers:
            # Caffe's Scale layer, spelled Mul and Add of a vector
            is_scale = readers[node.output[0]].op_type == "Mul"
            draws[node.input[0]] = _around(1.0 if is_scale else 0.0)
    return draws


def _norm_scale(
    node: onnx.NodeProto, producers: dict[str, onnx.NodeProto], readers: dict[str, onnx.NodeProto]
) -> float:
    """Mean scale of a batch norm: small where it ends a branch, so that sums keep their spread."""
    reader = readers[node.output[0]]
    if reader.op_type != "Sum":
        return 1.0
    summands = [producers[source].op_type for source in reader.input]
    if all(operator == "BatchNormalization" for operator in summands):
        return math.sqrt(0.5)
    return _BRANCH_SCALE


def _he_normal(fan_in: Callable[[tuple[int, ...]], int]) -> _Draw:
    def draw(random: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        weights = random.standard_normal(shape, np.float32)
        weights *= np.float32(math.sqrt(2 / fan_in(shape)))
        return weights

    return draw


def _around(mean: float) -> _Draw:
    def draw(random: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        return mean + np.float32(0.05) * random.standard_normal(shape, np.float32)

    return draw
