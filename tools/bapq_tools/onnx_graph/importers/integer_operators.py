"""Operators on integers become DequantizeLinear, the operator on floats, and QuantizeLinear.

Quantized models come in several forms: QOperator (QLinearConv and its like), dynamic quantization
(MatMulInteger and what ONNX Runtime fuses it into), and blocks of few bits (MatMulNBits). This
brings all of them into QDQ form, in which `quantized` finds them. Constants are dequantized here,
once: the float weights are exactly what the integers stand for.

What a form leaves open, such as a computed scale, keeps the operator as it is.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import onnx
from onnx import helper

from .. import graphs
from ..node_rewriter import MICROSOFT, renamed
from .integer_constants import (
    Quantization,
    constant_of,
    dequantized,
    input_of,
    quantization_of,
    values_of,
)
from .integer_weights import IntegerWeights, Nodes

_OLDEST_OPSET = 10
"""The first with QuantizeLinear."""

_AXES_OPSET = 18
"""The first in which ReduceMean takes its axes as an input."""

_MOVING = (
    "DepthToSpace",
    "Expand",
    "Flatten",
    "Gather",
    "Identity",
    "MaxPool",
    "Reshape",
    "Resize",
    "Slice",
    "SpaceToDepth",
    "Split",
    "Squeeze",
    "Tile",
    "Transpose",
    "Unsqueeze",
)
"""Operators that move integers, or choose among them. Resize may also compute some in between."""

_UNARY = {
    "QLinearAveragePool": "AveragePool",
    "QLinearGlobalAveragePool": "GlobalAveragePool",
    "QLinearLeakyRelu": "LeakyRelu",
    "QLinearReduceMean": "ReduceMean",
    "QLinearSigmoid": "Sigmoid",
}
_BINARY = {"QLinearAdd": "Add", "QLinearMul": "Mul"}


def spell_integers_out(model: onnx.ModelProto) -> None:
    """Replace such operators in place."""
    if graphs.standard_opset(model) >= _OLDEST_OPSET and _Integers(model).rewrite():
        graphs.remove_dead(model.graph)


class _Integers(IntegerWeights):
    def __init__(self, model: onnx.ModelProto) -> None:
        super().__init__(model)
        self._made: dict[str, Quantization] = {}  # by the tensor of integers
        self._rounded: dict[str, str] = {}  # and of dynamic ones the floats that were rounded
        # What was dequantized in a graph, which is kept so that its id stays its own.
        self._floats: dict[tuple[int, str, Quantization], tuple[onnx.GraphProto, str]] = {}
        self._asked: list[tuple[int, str, Quantization]] = []
        self._makers: dict[str, onnx.NodeProto] = {}
        self.writers |= {
            ("", "ConvInteger"): self._remember,
            ("", "DynamicQuantizeLinear"): self._dynamic,
            ("", "MatMulInteger"): self._remember,
            ("", "Cast"): self._remember,
            ("", "Mul"): self._scaled_product,
            ("", "QLinearConv"): self._conv,
            ("", "QLinearMatMul"): self._matmul,
            ("", "Pad"): self._pad,
            ("", "DequantizeLinear"): self._dequantize,
            (MICROSOFT, "MatMulIntegerToFloat"): self._matmul_to_float,
            (MICROSOFT, "QAttention"): self._attention,
            (MICROSOFT, "QGemm"): self._gemm,
            (MICROSOFT, "QLinearConcat"): self._concat,
            (MICROSOFT, "QLinearSoftmax"): self._softmax,
        }
        for domain in ("", MICROSOFT):
            self.writers[domain, "QuantizeLinear"] = self._quantize
        for name in _MOVING:
            self.writers["", name] = self._move
        for name, kind in _UNARY.items():
            self.writers[MICROSOFT, name] = partial(self._unary, kind)
        for name, kind in _BINARY.items():
            self.writers[MICROSOFT, name] = partial(self._binary, kind)

    def write(self, node: onnx.NodeProto, scope: graphs.Scope) -> Nodes | None:
        """What stands in place of a node; where it stays, so does what it was to read."""
        for output in node.output:  # its name may have been another tensor's, in another branch
            for known in (self._made, self._rounded, self._makers):
                known.pop(output, None)
        found = super().write(node, scope)
        for key in self._asked if found is None else ():
            del self._floats[key]
        self._asked.clear()
        return found

    # What is known of tensors of integers

    def _remember(self, node: onnx.NodeProto, scope: graphs.Scope) -> None:
        self._makers[node.output[0]] = node

    def _quantize(self, node: onnx.NodeProto, scope: graphs.Scope) -> None:
        self._made[node.output[0]] = Quantization(node.input[1], input_of(node, 2))

    def _dynamic(self, node: onnx.NodeProto, scope: graphs.Scope) -> None:
        integers, scale, zero = node.output
        self._made[integers] = Quantization(scale, zero)
        self._rounded[integers] = node.input[0]

    def _float(
        self, nodes: Nodes, name: str, by: Quantization, scope: graphs.Scope, axis: int = 1
    ) -> str | None:
        """The floats that a tensor of integers stands for; None where they cannot be told."""
        if scope.constant(name) is not None:
            values = values_of(name, by, scope, axis)
            return None if values is None else self.constant(values, f"{name}_float")
        made = self._made.get(name)
        if name in self._rounded and made == by:
            return self._rounded[name]
        gather = self._makers.get(name)
        if made is None and gather is not None and gather.op_type == "Gather":
            table = values_of(gather.input[0], by, scope, None)
            if table is not None:
                plain = renamed(gather, "Gather")
                plain.input[0] = self.constant(table, f"{gather.input[0]}_float")
                plain.output[0] = self.name(f"{name}_float")
                nodes.append(plain)
                return str(plain.output[0])
        scale = constant_of(by.scale, scope)
        if scale is None or scale.size != 1:  # along an axis that this does not know
            return None
        key = id(self.graph), name, by
        if key not in self._floats:
            inputs = [name, by.scale, *([by.zero] if by.zero else [])]
            self._floats[key] = self.graph, self.apply(nodes, "DequantizeLinear", inputs)
            self._asked.append(key)
        return self._floats[key][1]

    def _quantized(self, nodes: Nodes, node: onnx.NodeProto, by: Quantization) -> Nodes:
        """Let the last of the nodes, a copy of `node`, write floats, and quantize them."""
        last = nodes[-1]
        for index, output in enumerate(node.output):
            if output:
                floats = self.name(f"{output}_float")
                last.output[index] = floats
                inputs = [floats, by.scale, *([by.zero] if by.zero else [])]
                nodes.append(helper.make_node("QuantizeLinear", inputs, [output]))
                self._made[output] = by
        return nodes

    def _replaced(
        self,
        node: onnx.NodeProto,
        kind: str,
        operands: list[tuple[int, int]],
        scope: graphs.Scope,
        result: int,
        without: tuple[str, ...] = (),
    ) -> Nodes | None:
        """An operator whose operands are three inputs each: integers, scale, zero point.

        `operands` gives the first input of each and the axis of its scales, `result` the scale of
        the output.
        """
        nodes: Nodes = []
        inputs = [
            self._float(nodes, node.input[at], quantization_of(node, at + 1), scope, axis)
            for at, axis in operands
        ]
        if None in inputs:
            return None
        plain = renamed(node, kind, without)
        del plain.input[:]
        plain.input.extend(name for name in inputs if name)
        nodes.append(plain)
        return self._quantized(nodes, node, quantization_of(node, result))

    # Static quantization

    def _move(self, node: onnx.NodeProto, scope: graphs.Scope) -> Nodes | None:
        self._makers[node.output[0]] = node
        by = self._made.get(node.input[0])
        if by is None or node.input[0] in self._rounded:
            return None
        if len(node.output) > 1 and node.op_type != "Split":  # the places of a MaxPool
            return None
        nodes: Nodes = []
        source = self._float(nodes, node.input[0], by, scope)
        if source is None:
            return None
        plain = renamed(node, node.op_type)
        plain.input[0] = source
        nodes.append(plain)
        return self._quantized(nodes, node, by)

    def _pad(self, node: onnx.NodeProto, scope: graphs.Scope) -> Nodes | None:
        by = self._made.get(node.input[0])
        value = scope.constant(input_of(node, 2))
        if by is None or value is None:
            return None
        nodes = self._move(node, scope)
        floats = values_of(node.input[2], by, scope, None)
        if nodes is None or floats is None:
            return None
        pad = next(item for item in nodes if item.op_type == "Pad")
        pad.input[2] = self.constant(floats.reshape(()), f"{node.input[2]}_float")
        return nodes

    def _unary(self, kind: str, node: onnx.NodeProto, scope: graphs.Scope) -> Nodes | None:
        if graphs.attribute(node, "channels_last", 0):
            return None
        if kind == "ReduceMean" and self.opset >= _AXES_OPSET:
            return None
        return self._replaced(node, kind, [(0, 1)], scope, 3, ("channels_last",))

    def _binary(self, kind: str, node: onnx.NodeProto, scope: graphs.Scope) -> Nodes | None:
        return self._replaced(node, kind, [(0, 1), (3, 1)], scope, 6)

    def _softmax(self, node: onnx.NodeProto, scope: graphs.Scope) -> Nodes | None:
        # Until opset 13 it is over all axes from one on.
        if (graphs.attribute(node, "opset", 0) >= 13) != (self.opset >= 13):
            return None
        return self._replaced(node, "Softmax", [(0, 1)], scope, 3, ("opset",))

    def _concat(self, node: onnx.NodeProto, scope: graphs.Scope) -> Nodes | None:
        operands = [(index, 1) for index in range(2, len(node.input), 3)]
        return self._replaced(node, "Concat", operands, scope, 0)

    def _matmul(self, node: onnx.NodeProto, scope: graphs.Scope) -> Nodes | None:
        return self._replaced(node, "MatMul", [(0, -2), (3, -1)], scope, 6)

    def _conv(self, node: onnx.NodeProto, scope: graphs.Scope) -> Nodes | None:
        bias = self._bias(node, 8, scope)
        nodes = self._replaced(node, "Conv", [(0, 1), (3, 0)], scope, 6)
        if nodes is None or (bias is None and input_of(node, 8)):
            return None
        if bias is not None:
            conv = next(item for item in nodes if item.op_type == "Conv")
            conv.input.append(self.constant(bias, f"{node.input[8]}_float"))
        return nodes

    def _gemm(self, node: onnx.NodeProto, scope: graphs.Scope) -> Nodes | None:
        alpha = np.float32(graphs.attribute(node, "alpha", 1.0))
        bias = self._bias(node, 6, scope)
        if bias is None and input_of(node, 6):
            return None
        nodes: Nodes = []
        a = self._float(nodes, node.input[0], quantization_of(node, 1), scope)
        axis = 0 if graphs.attribute(node, "transB", 0) else 1
        b = self._float(nodes, node.input[3], quantization_of(node, 4), scope, axis)
        if a is None or b is None:
            return None
        plain = renamed(node, "Gemm")
        del plain.input[:]
        plain.input.extend([a, b])
        if bias is not None:
            plain.input.append(self.constant(bias * alpha, f"{node.input[6]}_float"))
        nodes.append(plain)
        if not input_of(node, 7):
            return nodes
        return self._quantized(nodes, node, quantization_of(node, 7))

    def _bias(self, node: onnx.NodeProto, index: int, scope: graphs.Scope) -> np.ndarray | None:
        """The bias of a product, in units of both scales; None without one, or if computed."""
        found = [constant_of(name, scope) for name in (input_of(node, index), *node.input[1:5:3])]
        if any(part is None for part in found):
            return None
        bias, a, b = (part for part in found if part is not None)
        return dequantized(bias, np.atleast_1d(a * b), np.zeros(1, np.int32), -1)

    def _dequantize(self, node: onnx.NodeProto, scope: graphs.Scope) -> Nodes | None:
        """Only of what a Gather has read from a table of integers."""
        maker = self._makers.get(node.input[0])
        if maker is None or maker.op_type != "Gather" or node.input[0] in self._made:
            return None
        nodes: Nodes = []
        self._float(nodes, node.input[0], quantization_of(node, 1), scope)
        if not nodes or nodes[-1].op_type != "Gather":
            return None
        nodes[-1].output[0] = node.output[0]
        return nodes

    # Dynamic quantization

    def _scaled_product(self, node: onnx.NodeProto, scope: graphs.Scope) -> Nodes | None:
        """Find MatMulInteger or ConvInteger, Cast and the product with both scales."""
        self._makers[node.output[0]] = node
        for cast, scales in (node.input, node.input[::-1]):
            product = self._behind(self._behind(cast, "Cast"), "MatMulInteger", "ConvInteger")
            both = self._behind(scales, "Mul")
            if product is None or both is None:
                continue
            zeros = input_of(product, 2), input_of(product, 3)
            for a, b in (both.input, both.input[::-1]):
                if self._made.get(product.input[0]) == Quantization(a, zeros[0]):
                    return self._product(node, product, Quantization(b, zeros[1]), scope)
        return None

    def _behind(self, source: str | onnx.NodeProto | None, *kinds: str) -> onnx.NodeProto | None:
        """The node that makes a tensor, or the input of a node, if it is of one of these kinds."""
        name = source.input[0] if isinstance(source, onnx.NodeProto) else source
        maker = self._makers.get(name or "")
        return maker if maker is not None and maker.op_type in kinds else None

    def _product(
        self,
        node: onnx.NodeProto,
        product: onnx.NodeProto,
        by: Quantization,
        scope: graphs.Scope,
    ) -> Nodes | None:
        nodes: Nodes = []
        kind = product.op_type.removesuffix("Integer")
        x = self._float(nodes, product.input[0], self._made[product.input[0]], scope)
        scale = constant_of(by.scale, scope)
        if kind == "Conv" and (scale is None or scale.size != 1):
            return None
        weight = self.weight(product.input[1], by, scope, 0 if kind == "Conv" else -1)
        if x is None or weight is None:
            return None
        plain = renamed(product, kind)
        del plain.input[:]
        plain.input.extend([x, weight])
        plain.output[0] = node.output[0]
        return [*nodes, plain]

    def _matmul_to_float(self, node: onnx.NodeProto, scope: graphs.Scope) -> Nodes | None:
        nodes: Nodes = []
        a = Quantization(node.input[2], input_of(node, 4))
        b = Quantization(node.input[3], input_of(node, 5))
        x = self._float(nodes, node.input[0], a, scope)
        weight = self.weight(node.input[1], b, scope, -1)
        if x is None or weight is None:
            return None
        return [*nodes, *self.with_bias(node, x, weight, input_of(node, 6))]

    # Fused blocks of transformers

    def _attention(self, node: onnx.NodeProto, scope: graphs.Scope) -> Nodes | None:
        nodes: Nodes = []
        x = self._float(nodes, node.input[0], Quantization(node.input[3], input_of(node, 6)), scope)
        by = Quantization(node.input[4], input_of(node, 7))
        weight = self.weight(node.input[1], by, scope, -1)
        if x is None or weight is None:
            return None
        plain = renamed(node, "Attention")
        plain.domain = MICROSOFT
        del plain.input[:]
        plain.input.extend([x, weight, node.input[2], input_of(node, 5), input_of(node, 8)])
        return [*nodes, plain]
