"""Operators on floats whose weights alone are integers become operators on floats.

Here are blocks of few bits, and what ONNX Runtime fuses dynamic quantization into. The weights are
dequantized once: the floats are exactly what the integers stand for.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import helper

from .. import graphs
from ..node_rewriter import MICROSOFT, NodeRewriter, renamed
from .integer_constants import (
    Quantization,
    constant_of,
    dequantized,
    input_of,
    parts_of,
    quantization_of,
    values_of,
)

Nodes = list[onnx.NodeProto]


class IntegerWeights(NodeRewriter):
    """Leaves operators as they are where a part of their weights is computed or does not fit."""

    def __init__(self, model: onnx.ModelProto) -> None:
        super().__init__(model)
        self.writers = {
            (MICROSOFT, "DynamicQuantizeLSTM"): self._lstm,
            (MICROSOFT, "DynamicQuantizeMatMul"): self._dynamic_matmul,
            (MICROSOFT, "GatherBlockQuantized"): self._gather_bits,
            (MICROSOFT, "MatMulNBits"): self._matmul_bits,
            (MICROSOFT, "QEmbedLayerNormalization"): self._embed,
        }

    def write(self, node: onnx.NodeProto, scope: graphs.Scope) -> Nodes | None:
        """What stands in place of a node; None where it stays."""
        try:
            return super().write(node, scope)
        except ValueError:  # sizes that do not fit each other: ONNX Runtime tells which
            return None

    def weight(self, name: str, by: Quantization, scope: graphs.Scope, axis: int) -> str | None:
        """Add the floats of a constant, whose scales are along an axis; returns their name."""
        values = values_of(name, by, scope, axis)
        return None if values is None else self.constant(values, f"{name}_float")

    def with_bias(self, node: onnx.NodeProto, x: str, weight: str, bias: str) -> Nodes:
        """A product under the name of `node`, and the sum with its bias, if there is one."""
        if not bias:
            return [helper.make_node("MatMul", [x, weight], node.output, node.name)]
        product = self.name(f"{node.output[0]}_product")
        return [
            helper.make_node("MatMul", [x, weight], [product], node.name),
            helper.make_node("Add", [product, bias], node.output),
        ]

    def _dynamic_matmul(self, node: onnx.NodeProto, scope: graphs.Scope) -> Nodes | None:
        by = Quantization(node.input[2], input_of(node, 3))
        weight = self.weight(node.input[1], by, scope, -1)
        if weight is None:
            return None
        return self.with_bias(node, node.input[0], weight, input_of(node, 4))

    def _lstm(self, node: onnx.NodeProto, scope: graphs.Scope) -> Nodes | None:
        """W and R stand as (directions, columns, 4 * hidden), scales per direction or row."""
        plain = renamed(node, "LSTM")
        del plain.input[8:]
        for index, scale in ((1, 8), (2, 10)):
            values = _values_per(node.input[index], quantization_of(node, scale), scope)
            if values is None:
                return None
            turned = np.ascontiguousarray(values.transpose(0, 2, 1))
            plain.input[index] = self.constant(turned, f"{node.input[index]}_float")
        return [plain]

    def _matmul_bits(self, node: onnx.NodeProto, scope: graphs.Scope) -> Nodes | None:
        weight = _unpacked(node, scope)
        if weight is None:
            return None
        name = self.constant(weight.T, f"{node.input[1]}_float")
        return self.with_bias(node, node.input[0], name, input_of(node, 5))

    def _gather_bits(self, node: onnx.NodeProto, scope: graphs.Scope) -> Nodes | None:
        at = {item.name: helper.get_attribute_value(item) for item in node.attribute}
        bits, block = at.get("bits", 4), at.get("block_size", 128)
        table, scale = constant_of(node.input[0], scope), constant_of(node.input[2], scope)
        zero = constant_of(input_of(node, 3), scope) if input_of(node, 3) else None
        if table is None or scale is None or (zero is None and input_of(node, 3)):
            return None
        if table.dtype == np.uint8:  # bytes may hold two numbers, and zero is in the middle
            table = _few_bits(table, bits)
            zero = np.full(1, 1 << (bits - 1)) if zero is None else _few_bits(zero, bits)
            zero = zero[..., : scale.shape[-1]]
        zero = np.zeros(1) if zero is None else zero
        axis = at.get("quantize_axis", 1)
        values = dequantized(table, scale.astype(np.float32), zero, axis, block)
        plain = renamed(node, "Gather", ("bits", "block_size", "quantize_axis", "gather_axis"))
        del plain.input[2:]
        plain.input[0] = self.constant(values, f"{node.input[0]}_float")
        plain.attribute.append(helper.make_attribute("axis", at.get("gather_axis", 0)))
        return [plain]

    def _embed(self, node: onnx.NodeProto, scope: graphs.Scope) -> Nodes | None:
        """Tables, gamma and beta, then the mask, their scales and their zero points."""
        plain = renamed(node, "EmbedLayerNormalization")
        plain.domain = MICROSOFT
        del plain.input[7:]
        for place, index in enumerate(range(2, 7)):
            if not node.input[index]:
                continue
            by = Quantization(node.input[8 + place], input_of(node, 13 + place))
            values = values_of(node.input[index], by, scope, None)
            if values is None:
                return None
            plain.input[index] = self.constant(values, f"{node.input[index]}_float")
        if input_of(node, 7):
            plain.input.append(node.input[7])
        return [plain]


def _values_per(name: str, by: Quantization, scope: graphs.Scope) -> np.ndarray | None:
    """The floats of an LSTM's weights: a scale for each direction, or for each row of each."""
    found = parts_of(name, by, scope)
    if found is None:
        return None
    integers, scale, zero = (part.astype(np.float32) for part in found)
    across = (integers.shape[0], 1, -1)
    return np.asarray((integers - zero.reshape(across)) * scale.reshape(across), np.float32)


def _unpacked(node: onnx.NodeProto, scope: graphs.Scope) -> np.ndarray | None:
    """The weights of a MatMulNBits, (rows, columns) float32; None where a part is computed."""
    at: dict[str, Any] = {item.name: helper.get_attribute_value(item) for item in node.attribute}
    bits, block, rows, columns = (at.get(name, 0) for name in ("bits", "block_size", "N", "K"))
    bits = bits or 4
    found = {
        index: constant_of(name, scope) for index, name in enumerate(node.input) if index and name
    }
    if any(values is None for index, values in found.items() if index < 5) or 8 % bits:
        return None
    packed, scale = found[1], found[2]
    assert packed is not None and scale is not None
    blocks = -(-columns // block)
    codes = _few_bits(packed.reshape(rows, -1), bits)[:, :columns]
    zero = found.get(3)
    if zero is None:
        zeros = np.full((rows, blocks), 1 << (bits - 1), np.float32)
    elif zero.dtype == np.uint8:
        zeros = _few_bits(zero.reshape(rows, -1), bits)[:, :blocks].astype(np.float32)
    else:
        zeros = zero.reshape(rows, blocks).astype(np.float32)
    order = found.get(4)
    group = np.arange(columns) // block if order is None else order.reshape(-1)[:columns]
    scales = scale.reshape(rows, blocks).astype(np.float32)
    return np.asarray((codes - zeros[:, group]) * scales[:, group], np.float32)


def _few_bits(packed: np.ndarray, bits: int) -> np.ndarray:
    """Cut bytes, on the last axis, into numbers, the lowest bits first."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    parts = (packed[..., None] >> shifts) & np.uint8((1 << bits) - 1)
    return np.asarray(parts.reshape(*packed.shape[:-1], -1))
