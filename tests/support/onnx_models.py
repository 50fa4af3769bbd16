"""Small ONNX models for the tests, and the standard model that a bank's graph stands for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from bapq_edge.engine.graph import RUN_INPUT
from bapq_tools.onnx_graph import graphs
from bapq_tools.onnx_graph.importers.onnx_file import load_model
from bapq_tools.onnx_graph.ir import LayerPlan, LayerUse
from bapq_tools.onnx_graph.plain_nodes import PLAIN_OPERATORS

NEWEST_OPSET = 26
"""Newest that the newest ONNX Runtime supports; the onnx package may know more."""

FLOAT, INT64, INT32 = TensorProto.FLOAT, TensorProto.INT64, TensorProto.INT32


def weights(*shape: int, seed: int = 0) -> np.ndarray:
    """Normal float32 values, different for each seed."""
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def graph(
    nodes: Sequence[onnx.NodeProto],
    inputs: Mapping[str, tuple[int, Sequence[int | str] | None]],
    outputs: Mapping[str, tuple[int, Sequence[int | str] | None]],
    constants: Mapping[str, np.ndarray] | None = None,
    name: str = "test",
) -> onnx.GraphProto:
    """A graph; inputs and outputs map a name to (element type, shape)."""
    return helper.make_graph(
        nodes,
        name,
        [helper.make_tensor_value_info(key, *value) for key, value in inputs.items()],
        [helper.make_tensor_value_info(key, *value) for key, value in outputs.items()],
        [numpy_helper.from_array(value, key) for key, value in (constants or {}).items()],
    )


def model(
    *args: Any, opset: int = 17, domains: Iterable[tuple[str, int]] = (), **kwargs: Any
) -> onnx.ModelProto:
    """A model of one `graph`, in the oldest format its opset allows."""
    opsets = [helper.make_opsetid(*item) for item in (("", opset), *domains)]
    built = helper.make_model(graph(*args, **kwargs), opset_imports=opsets)
    built.ir_version = max(4, helper.find_min_ir_version_for(opsets, ignore_unknown=True))
    return built


def run(source: onnx.ModelProto | bytes, feeds: Mapping[str, np.ndarray]) -> list[Any]:
    """All outputs, by ONNX Runtime without its optimizer."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    data = source if isinstance(source, bytes) else source.SerializeToString()
    session = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    return session.run(None, dict(feeds))


def load(source: onnx.ModelProto, folder: Path) -> onnx.ModelProto:
    """The model as the import reads it from a file."""
    path = folder / "model.onnx"
    path.write_bytes(source.SerializeToString())
    return load_model(path)


def operators(source: onnx.ModelProto | bytes) -> list[str]:
    """Operator types, those of bodies last, those of other domains with the domain in front."""
    if isinstance(source, bytes):
        source = onnx.load_model_from_string(source)
    return [
        f"{node.domain}.{node.op_type}" if node.domain else node.op_type
        for part in graphs.walk(source.graph)
        for node in part.node
    ]


def operator_names(assembled: bytes) -> list[str]:
    """Node names of our operators."""
    built = onnx.load_model_from_string(assembled)
    parts = graphs.walk(built.graph)
    return [node.name for part in parts for node in part.node if node.domain == "bapq"]


def standard_model(assembled: bytes, plan: LayerPlan) -> onnx.ModelProto:
    """The assembled model with each chunk operator spelled out in standard operators."""
    built = onnx.load_model_from_string(assembled)
    _spell_out(built.graph, plan)
    kept = [item for item in built.opset_import if item.domain != "bapq"]
    del built.opset_import[:]
    built.opset_import.extend(kept)
    assert built.graph.input[-1].name == RUN_INPUT
    del built.graph.input[-1]
    return built


def _spell_out(of: onnx.GraphProto, plan: LayerPlan) -> None:
    nodes: list[onnx.NodeProto] = []
    for node in of.node:
        for body in graphs.bodies(node):
            _spell_out(body, plan)
        if node.domain != "bapq":
            nodes.append(node)
            continue
        assert node.input[1] == RUN_INPUT
        constants, spelled = _spelled(node, plan)
        of.initializer.extend(numpy_helper.from_array(v, k) for k, v in constants.items())
        nodes += spelled
    graphs.replace_nodes(of, nodes)


def _spelled(
    node: onnx.NodeProto, plan: LayerPlan
) -> tuple[dict[str, np.ndarray], list[onnx.NodeProto]]:
    at = {item.name: helper.get_attribute_value(item) for item in node.attribute}
    if node.op_type in PLAIN_OPERATORS:
        return {}, [_plain(node, at)]
    layer, out = plan.layers[at["layer"]], node.output[0]
    w, source = layer.weight, node.input[0]
    if node.op_type == "Gather":
        return {f"{out}.w": w}, [helper.make_node("Gather", [f"{out}.w", source], [out])]
    constants = {
        f"{out}.low": np.array(at["clip_low"], np.float32),
        f"{out}.high": np.array(at["clip_high"], np.float32),
    }
    bias = layer.bias if at["use_bias"] else np.zeros(len(w), np.float32)
    if node.op_type in ("Conv", "DepthwiseConv"):
        product, bias = _conv(node, plan, at, constants)
    else:
        constants[f"{out}.w"] = np.ascontiguousarray(w.T)
        product = [helper.make_node("MatMul", [source, f"{out}.w"], [f"{out}.p"])]
    constants[f"{out}.b"] = bias
    summed = f"{out}.s"
    behind = [helper.make_node("Add", [f"{out}.p", f"{out}.b"], [summed])]
    if at["function"]:
        spell = FUNCTIONS[at["function"]]
        nodes, values = spell(summed, f"{out}.f")
        behind, summed = [*behind, *nodes], f"{out}.f"
        constants |= {key: np.array(value, np.float32) for key, value in values.items()}
    if len(node.input) > 2:
        behind.append(helper.make_node("Add", [summed, node.input[2]], [f"{out}.r"]))
        summed = f"{out}.r"
    behind += [
        helper.make_node("Max", [summed, f"{out}.low"], [f"{out}.m"]),
        helper.make_node("Min", [f"{out}.m", f"{out}.high"], [out]),
    ]
    return constants, [*product, *behind]


def _plain(node: onnx.NodeProto, at: dict[str, Any]) -> onnx.NodeProto:
    """An operator that reads no layer."""
    inputs = [node.input[0], *node.input[2:]]
    if node.op_type == "MaxPool":
        pads = [at[f"pad_{side}"] for side in ("top", "left", "bottom", "right")]
        shape = {
            name: [at[f"{short}_h"], at[f"{short}_w"]]
            for name, short in {"kernel_shape": "kernel", "strides": "stride"}.items()
        }
        if at["dilation_h"] != 1 or at["dilation_w"] != 1:  # unknown before opset 10
            shape["dilations"] = [at["dilation_h"], at["dilation_w"]]
        padding = ("NOTSET", "SAME_UPPER", "SAME_LOWER")[at["auto_pad"]]
        at = shape | ({"pads": pads} if padding == "NOTSET" else {"auto_pad": padding})
    return helper.make_node(node.op_type, inputs, list(node.output), **at)


def chain(x: str, y: str, *steps: tuple[Any, ...]) -> tuple[list[onnx.NodeProto], dict[str, float]]:
    """Nodes from x to y: (operator, the constants that it reads besides), and the constants.

    An operator whose constant is None reads x instead.
    """
    nodes, constants, name = [], {}, x
    for index, (operator, *values) in enumerate(steps):
        inputs = [name]
        for value in values:
            inputs.append(x if value is None else f"{y}.{index}")
            if value is not None:
                constants[inputs[-1]] = value
        name = y if index == len(steps) - 1 else f"{y}.t{index}"
        nodes.append(helper.make_node(operator, inputs, [name]))
    return nodes, constants


def silu(x: str, y: str) -> tuple[list[onnx.NodeProto], dict[str, float]]:
    """x * Sigmoid(x)."""
    return chain(x, y, ("Sigmoid",), ("Mul", None))


def hard_swish(x: str, y: str) -> tuple[list[onnx.NodeProto], dict[str, float]]:
    """x * HardSigmoid(x), as exporters write it before opset 14."""
    nodes, constants = chain(x, y, ("HardSigmoid",), ("Mul", None))
    nodes[0].attribute.append(helper.make_attribute("alpha", 1 / 6))
    return nodes, constants


def hard_swish_clipped(x: str, y: str) -> tuple[list[onnx.NodeProto], dict[str, float]]:
    """x * Clip(x + 3, 0, 6) / 6, as older exporters write it."""
    nodes, constants = chain(x, y, ("Add", 3.0), ("Clip",), ("Mul", None), ("Div", 6.0))
    nodes[1].input.extend(["zero", "six"])
    return nodes, {**constants, "zero": 0.0, "six": 6.0}


def gelu(x: str, y: str) -> tuple[list[onnx.NodeProto], dict[str, float]]:
    """x * (Erf(x / sqrt 2) + 1) * 0.5, as exporters write it."""
    return chain(x, y, ("Div", 2**0.5), ("Erf",), ("Add", 1.0), ("Mul", None), ("Mul", 0.5))


def gelu_tanh(x: str, y: str) -> tuple[list[onnx.NodeProto], dict[str, float]]:
    """The same by Tanh: of sqrt(2/pi) (x + 0.044715 x^3)."""
    steps = [("Pow", 3.0), ("Mul", 0.044715), ("Add", None), ("Mul", (2 / np.pi) ** 0.5)]
    return chain(x, y, *steps, ("Tanh",), ("Add", 1.0), ("Mul", None), ("Mul", 0.5))


FUNCTIONS = {1: hard_swish, 2: silu, 3: gelu, 4: gelu_tanh}
"""the operators' attribute `function` -> its nodes"""


def _conv(
    node: onnx.NodeProto, plan: LayerPlan, at: dict[str, Any], constants: dict[str, np.ndarray]
) -> tuple[list[onnx.NodeProto], np.ndarray]:
    """A 2-D Conv, or a 1-D one where the layer's use in the source is 1-D."""
    layer, out = plan.layers[at["layer"]], node.output[0]
    (use,) = [use for use in layer.uses if use.output == out]
    dimensions = 1 if _conv_rank(use) == 3 else 2
    rows = len(layer.weight)
    w = layer.weight.reshape(rows, at["kernel_h"], at["kernel_w"], -1).transpose(0, 3, 1, 2)
    two = {
        "strides": [at["stride_h"], at["stride_w"]],
        "dilations": [at["dilation_h"], at["dilation_w"]],
    }
    pads = [at[f"pad_{side}"] for side in ("top", "left", "bottom", "right")]
    if dimensions == 1:
        w = w[:, :, 0, :]
        two = {key: value[1:] for key, value in two.items()}
        pads = pads[1::2]
    if at["auto_pad"]:
        two["auto_pad"] = ("SAME_UPPER", "SAME_LOWER")[at["auto_pad"] - 1]
        assert not any(pads)
    else:
        two["pads"] = pads
    constants[f"{out}.w"] = np.ascontiguousarray(w)
    bias = layer.bias if at["use_bias"] else np.zeros(rows, np.float32)
    product = helper.make_node(
        "Conv", [node.input[0], f"{out}.w"], [f"{out}.p"], group=at["group"], **two
    )
    return [product], bias.reshape([-1] + [1] * dimensions)


def _conv_rank(use: LayerUse) -> int:
    """Rank of the source's weight, told by the kernel_shape that test models declare."""
    (kernel,) = [item.ints for item in use.node.attribute if item.name == "kernel_shape"]
    return len(kernel) + 2
