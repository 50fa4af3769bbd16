"""Spells products out that are said in a form of their own, so that their weights become layers.

What ONNX Runtime's optimizer writes as one node of com.microsoft becomes standard nodes again. A
transposed activation, or a constant on the left, becomes a Transpose beside a plain product; that
moves each activation once or twice more through memory.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from . import graphs
from .convolutions import Convolutions
from .einsum import Einsums
from .heavy_nodes import MIN_WEIGHTS
from .lookups import Lookups
from .node_rewriter import MICROSOFT, NodeRewriter, renamed
from .recurrent import Recurrents
from .transformer_blocks import TransformerBlocks

_MOST_MATRICES = 256
"""A stack of more is left as it is."""

_ACTIVATIONS: dict[str, tuple[str, ...]] = {
    "Relu": (),
    "Sigmoid": (),
    "Tanh": (),
    "LeakyRelu": ("alpha",),
    "HardSigmoid": ("alpha", "beta"),
    "Clip": ("min", "max"),
}
"""Activations of fused nodes, and the attributes that their parameters are."""


def spell_out(model: onnx.ModelProto) -> None:
    """Replace such nodes, in place, where their weights are worth it."""
    for kind in (TransformerBlocks, Recurrents, Lookups, Einsums, Convolutions, _Products):
        kind(model).rewrite()


class _Products(NodeRewriter):
    """Brings products into the form that layers have."""

    def __init__(self, model: onnx.ModelProto) -> None:
        super().__init__(model)
        self.writers = {
            ("", "Gemm"): self._gemm,
            ("", "MatMul"): self._matmul,
            (MICROSOFT, "FusedMatMul"): self._fused_matmul,
            (MICROSOFT, "FusedGemm"): self._fused_gemm,
            (MICROSOFT, "FusedConv"): self._fused_conv,
        }

    def _gemm(self, node: onnx.NodeProto, scope: graphs.Scope) -> list[onnx.NodeProto] | None:
        if not graphs.attribute(node, "transA", 0) or _weight(node, 1, scope) is None:
            return None
        turned = self.name(f"{node.input[0]}_turned")
        plain = renamed(node, "Gemm", without=("transA",))
        plain.input[0] = turned
        return [helper.make_node("Transpose", [node.input[0]], [turned]), plain]

    def _matmul(self, node: onnx.NodeProto, scope: graphs.Scope) -> list[onnx.NodeProto] | None:
        """A product with one matrix for each of the batch, or with the constant on the left."""
        stack = scope.constant(node.input[1])
        if stack is not None and len(stack.dims) == 3 and stack.data_type == TensorProto.FLOAT:
            return self._batched(node, stack)
        return self._turned(node, scope)

    def _batched(self, node: onnx.NodeProto, stack: TensorProto) -> list[onnx.NodeProto] | None:
        """Each matrix becomes a layer, and each part of the batch meets its own.

        Where one activation meets all matrices, as experts do, all meet it.
        """
        shape, count = self.shapes.get(node.input[0]), stack.dims[0]
        if shape is None or len(shape) != 3 or shape[0] not in (1, count) or count > _MOST_MATRICES:
            return None
        if stack.dims[1] * stack.dims[2] < MIN_WEIGHTS:
            return None
        nodes, parts = [], [node.input[0]] * count
        if shape[0] == count and count > 1:
            parts = [self.name(f"{node.input[0]}_part") for _ in range(count)]
            outputs = {"num_outputs": count} if self.opset >= 18 else {}
            nodes.append(helper.make_node("Split", [node.input[0]], parts, axis=0, **outputs))
        products = [self.name(f"{node.output[0]}_part") for _ in range(count)]
        name = node.name or node.output[0]
        for number, values in enumerate(graphs.tensor_array(stack)):
            weight = self.constant(values, f"{stack.name}_{number}")
            ends = [parts[number], weight], [products[number]]
            nodes.append(helper.make_node("MatMul", *ends, f"{name}_{number}"))
        nodes.append(helper.make_node("Concat", products, node.output, axis=0))
        return nodes

    def _turned(self, node: onnx.NodeProto, scope: graphs.Scope) -> list[onnx.NodeProto] | None:
        """W x is (xᵀ Wᵀ)ᵀ."""
        left = _weight(node, 0, scope)
        if left is None or scope.constant(node.input[1]) is not None:
            return None
        weight = self.constant(graphs.tensor_array(left).T, f"{left.name}_turned")
        rank = self.rank(node.input[1])
        if rank == 1:
            return [helper.make_node("MatMul", [node.input[1], weight], node.output, node.name)]
        if rank is None or rank < 2:
            return None
        x, y = self.name(f"{node.input[1]}_turned"), self.name(f"{node.output[0]}_turned")
        return [
            _turn(node.input[1], x, rank),
            helper.make_node("MatMul", [x, weight], [y], node.name),
            _turn(y, node.output[0], rank),
        ]

    def _fused_matmul(
        self, node: onnx.NodeProto, scope: graphs.Scope
    ) -> list[onnx.NodeProto] | None:
        weight = _weight(node, 1, scope)
        batches = [graphs.attribute(node, name, 0) for name in ("transBatchA", "transBatchB")]
        if weight is None or any(batches):
            return None
        values = graphs.tensor_array(weight) * np.float32(graphs.attribute(node, "alpha", 1.0))
        values = values.T if graphs.attribute(node, "transB", 0) else values
        x, before = node.input[0], []
        if graphs.attribute(node, "transA", 0):
            rank = self.rank(x)
            if rank is None or rank < 2:
                return None
            x = self.name(f"{x}_turned")
            before.append(_turn(node.input[0], x, rank))
        constant = self.constant(values, f"{weight.name}_plain")
        return [*before, helper.make_node("MatMul", [x, constant], node.output, node.name)]

    def _fused_gemm(self, node: onnx.NodeProto, scope: graphs.Scope) -> list[onnx.NodeProto] | None:
        names = ("activation", "activation_alpha", "activation_beta", "activation_gamma")
        values = [graphs.attribute(node, name, 0.0) for name in names[1:]]
        plain = renamed(node, "Gemm", without=names)
        behind = self._activated(node, plain, values)
        if behind is None:
            return None
        spelled = self._gemm(plain, scope) or [plain]
        return [*spelled, *behind]

    def _fused_conv(self, node: onnx.NodeProto, scope: graphs.Scope) -> list[onnx.NodeProto] | None:
        plain = renamed(node, "Conv", without=("activation", "activation_params"))
        del plain.input[3:]
        behind = self._activated(node, plain, graphs.attribute(node, "activation_params", []))
        if behind is None:
            return None
        if len(node.input) > 3 and node.input[3]:
            product = self.name(f"{node.output[0]}_product")
            behind.insert(0, helper.make_node("Add", [product, node.input[3]], plain.output))
            plain.output[0] = product
        return [plain, *behind]

    def _activated(
        self, node: onnx.NodeProto, plain: onnx.NodeProto, values: list[float]
    ) -> list[onnx.NodeProto] | None:
        """Name the output of `plain` anew, and make the activation behind it, if there is one."""
        kind = graphs.attribute(node, "activation", b"").decode()
        if not kind:
            return []
        product = self.name(f"{node.output[0]}_linear")
        inputs: list[str] = [product]
        attributes: dict[str, Any] = {}
        if kind == "Clip" and self.opset >= 11:
            inputs += [self.constant(np.float32(value), f"{product}_bound") for value in values]
        elif kind in _ACTIVATIONS:
            attributes = dict(zip(_ACTIVATIONS[kind], values, strict=False))
        else:
            return None
        plain.output[0] = product
        return [helper.make_node(kind, inputs, node.output, **attributes)]


def _weight(node: onnx.NodeProto, index: int, scope: graphs.Scope) -> TensorProto | None:
    """A constant matrix that is worth a layer."""
    tensor = scope.constant(node.input[index])
    if tensor is None or tensor.data_type != TensorProto.FLOAT or len(tensor.dims) != 2:
        return None
    return tensor if graphs.tensor_size(tensor) >= MIN_WEIGHTS else None


def _turn(source: str, target: str, rank: int) -> onnx.NodeProto:
    """Swap the last two axes."""
    order = [*range(rank - 2), rank - 1, rank - 2]
    return helper.make_node("Transpose", [source], [target], perm=order)
