"""Nodes without weights in planes that operators of ours compute, in fewer instructions on ARM."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import onnx

from . import graphs

__all__ = ["PLAIN_OPERATORS", "PlainNode", "find_plain_nodes", "ranks_of_plain_nodes"]

PLAIN_OPERATORS = ("MaxPool", "LayerNormalization")
"""Operators of the domain of banks that read no layer."""

_AUTO_PAD = {"NOTSET": 0, "VALID": 0, "SAME_UPPER": 1, "SAME_LOWER": 2}
_EPSILON = 1e-5
"""That of a LayerNormalization that tells none, by ONNX."""


@dataclass(frozen=True)
class PlainNode:
    """A node of the graph, and what its operator is given."""

    node: onnx.NodeProto
    source: str
    constants: tuple[str, ...]
    """Inputs behind the ticket."""
    attributes: dict[str, Any]


def ranks_of_plain_nodes(model: onnx.ModelProto) -> dict[str, int]:
    """The numbers of axes of what may be such nodes' inputs, where they are known to be float32."""
    read = {
        node.input[0] for node in model.graph.node if graphs.is_standard(node, *PLAIN_OPERATORS)
    }
    ranks = graphs.float_ranks(model) if read else {}
    return {name: rank for name, rank in ranks.items() if name in read}


def find_plain_nodes(model: onnx.ModelProto, ranks: dict[str, int]) -> Iterator[PlainNode]:
    """Find the nodes outside of bodies that operators of ours can compute instead.

    `ranks` are those of `ranks_of_plain_nodes`, from when the model still had all its weights.
    """
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if not graphs.is_standard(node, *PLAIN_OPERATORS):
            continue
        rank = ranks.get(node.input[0])
        if rank is None or any(node.output[1:]):
            continue
        found = (
            _max_pool(node, rank)
            if node.op_type == "MaxPool"
            else _normalization(node, rank, constants)
        )
        if found is not None:
            yield found


def _max_pool(node: onnx.NodeProto, rank: int) -> PlainNode | None:
    kernel = list(graphs.attribute(node, "kernel_shape", []))
    auto_pad = graphs.attribute(node, "auto_pad", b"NOTSET").decode()
    if len(kernel) not in (1, 2) or rank != len(kernel) + 2 or auto_pad not in _AUTO_PAD:
        return None
    if graphs.attribute(node, "ceil_mode", 0):
        return None
    flat = len(kernel) == 1
    ones, zeros = [1] * len(kernel), [0] * 2 * len(kernel)
    strides = list(graphs.attribute(node, "strides", ones))
    dilations = list(graphs.attribute(node, "dilations", ones))
    pads = list(graphs.attribute(node, "pads", zeros)) if auto_pad == "NOTSET" else zeros
    if flat:
        kernel, strides, dilations = ([1, *values] for values in (kernel, strides, dilations))
        pads = [0, pads[0], 0, pads[1]]
    attributes: dict[str, Any] = {"auto_pad": _AUTO_PAD[auto_pad]}
    for name, values in (("kernel", kernel), ("stride", strides), ("dilation", dilations)):
        attributes[f"{name}_h"], attributes[f"{name}_w"] = values
    attributes |= dict(zip(("pad_top", "pad_left", "pad_bottom", "pad_right"), pads, strict=True))
    return PlainNode(node, node.input[0], (), attributes)


def _normalization(
    node: onnx.NodeProto, rank: int, constants: dict[str, onnx.TensorProto]
) -> PlainNode | None:
    if graphs.attribute(node, "axis", -1) not in (-1, rank - 1):
        return None
    factors = [name for name in node.input[1:] if name]
    for name in factors:
        tensor = constants.get(name)
        if tensor is None or tensor.data_type != onnx.TensorProto.FLOAT or len(tensor.dims) != 1:
            return None
    epsilon = float(graphs.attribute(node, "epsilon", _EPSILON))
    return PlainNode(node, node.input[0], tuple(factors), {"epsilon": epsilon})
