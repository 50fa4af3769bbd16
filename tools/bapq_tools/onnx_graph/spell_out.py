"""Spells products out that are said in a form of their own, so that their weights become layers.

What ONNX Runtime's optimizer writes as one node of com.microsoft becomes standard nodes again. A
transposed activation, or a constant on the left, becomes a Transpose beside a plain product; that
moves each activation once or twice more through memory.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from . import graphs
from .heavy_nodes import MIN_WEIGHTS

_MICROSOFT = "com.microsoft"

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
    writer = _Writer(model)
    writer.visit(model.graph, None)


class _Writer:
    """Walks the graphs; each method returns the nodes for one, or None where it stays."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self._model = model
        self._taken = graphs.names(model.graph)
        self._new: list[onnx.TensorProto] = []
        self._writers: dict[
            tuple[str, str], Callable[[onnx.NodeProto, graphs.Scope], list[onnx.NodeProto] | None]
        ] = {
            ("", "Gemm"): self._gemm,
            ("", "MatMul"): self._matmul,
            (_MICROSOFT, "FusedMatMul"): self._fused_matmul,
            (_MICROSOFT, "FusedGemm"): self._fused_gemm,
            (_MICROSOFT, "FusedConv"): self._fused_conv,
        }

    @cached_property
    def _shapes(self) -> dict[str, graphs.Shape | None]:
        return graphs.shapes(self._model)

    def _rank(self, name: str) -> int | None:
        shape = self._shapes.get(name)
        return None if shape is None else len(shape)

    def visit(self, graph: onnx.GraphProto, outer: graphs.Scope | None) -> None:
        scope = graphs.Scope.of(graph, outer)
        nodes: list[onnx.NodeProto] = []
        changed = False
        for node in graph.node:
            for body in graphs.bodies(node):
                self.visit(body, scope)
            domain = "" if graphs.is_standard(node) else node.domain
            write = self._writers.get((domain, node.op_type))
            found = write(node, scope) if write else None
            changed |= found is not None
            nodes += [node] if found is None else found
            graph.initializer.extend(self._new)
            self._new.clear()
        if changed:
            graphs.replace_nodes(graph, nodes)

    def _gemm(self, node: onnx.NodeProto, scope: graphs.Scope) -> list[onnx.NodeProto] | None:
        if not graphs.attribute(node, "transA", 0) or _weight(node, 1, scope) is None:
            return None
        turned = self._name(f"{node.input[0]}_turned")
        plain = _copy(node, without=("transA",))
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
        shape, count = self._shapes.get(node.input[0]), stack.dims[0]
        if shape is None or len(shape) != 3 or shape[0] not in (1, count) or count > _MOST_MATRICES:
            return None
        if stack.dims[1] * stack.dims[2] < MIN_WEIGHTS:
            return None
        nodes, parts = [], [node.input[0]] * count
        if shape[0] == count and count > 1:
            parts = [self._name(f"{node.input[0]}_part") for _ in range(count)]
            outputs = {"num_outputs": count} if graphs.standard_opset(self._model) >= 18 else {}
            nodes.append(helper.make_node("Split", [node.input[0]], parts, axis=0, **outputs))
        products = [self._name(f"{node.output[0]}_part") for _ in range(count)]
        name = node.name or node.output[0]
        for number, values in enumerate(graphs.tensor_array(stack)):
            weight = self._constant(values, f"{stack.name}_{number}")
            ends = [parts[number], weight], [products[number]]
            nodes.append(helper.make_node("MatMul", *ends, f"{name}_{number}"))
        nodes.append(helper.make_node("Concat", products, node.output, axis=0))
        return nodes

    def _turned(self, node: onnx.NodeProto, scope: graphs.Scope) -> list[onnx.NodeProto] | None:
        """W x is (xᵀ Wᵀ)ᵀ."""
        left = _weight(node, 0, scope)
        if left is None or scope.constant(node.input[1]) is not None:
            return None
        weight = self._constant(graphs.tensor_array(left).T, f"{left.name}_turned")
        rank = self._rank(node.input[1])
        if rank == 1:
            return [helper.make_node("MatMul", [node.input[1], weight], node.output, node.name)]
        if rank is None or rank < 2:
            return None
        x, y = self._name(f"{node.input[1]}_turned"), self._name(f"{node.output[0]}_turned")
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
            rank = self._rank(x)
            if rank is None or rank < 2:
                return None
            x = self._name(f"{x}_turned")
            before.append(_turn(node.input[0], x, rank))
        constant = self._constant(values, f"{weight.name}_plain")
        return [*before, helper.make_node("MatMul", [x, constant], node.output, node.name)]

    def _fused_gemm(self, node: onnx.NodeProto, scope: graphs.Scope) -> list[onnx.NodeProto] | None:
        names = ("activation", "activation_alpha", "activation_beta", "activation_gamma")
        values = [graphs.attribute(node, name, 0.0) for name in names[1:]]
        plain = _copy(node, without=names)
        plain.op_type, plain.domain = "Gemm", ""
        behind = self._activated(node, plain, values)
        if behind is None:
            return None
        spelled = self._gemm(plain, scope) or [plain]
        return [*spelled, *behind]

    def _fused_conv(self, node: onnx.NodeProto, scope: graphs.Scope) -> list[onnx.NodeProto] | None:
        plain = _copy(node, without=("activation", "activation_params"))
        plain.op_type, plain.domain = "Conv", ""
        del plain.input[3:]
        behind = self._activated(node, plain, graphs.attribute(node, "activation_params", []))
        if behind is None:
            return None
        if len(node.input) > 3 and node.input[3]:
            product = self._name(f"{node.output[0]}_product")
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
        product = self._name(f"{node.output[0]}_linear")
        inputs: list[str] = [product]
        attributes: dict[str, Any] = {}
        if kind == "Clip" and graphs.standard_opset(self._model) >= 11:
            inputs += [self._constant(np.float32(value), f"{product}_bound") for value in values]
        elif kind in _ACTIVATIONS:
            attributes = dict(zip(_ACTIVATIONS[kind], values, strict=False))
        else:
            return None
        plain.output[0] = product
        return [helper.make_node(kind, inputs, node.output, **attributes)]

    def _name(self, wanted: str) -> str:
        return graphs.fresh_name(wanted, self._taken)

    def _constant(self, values: np.ndarray | np.float32, wanted: str) -> str:
        name = self._name(wanted)
        self._new.append(numpy_helper.from_array(np.ascontiguousarray(values), name))
        return name


def _weight(node: onnx.NodeProto, index: int, scope: graphs.Scope) -> TensorProto | None:
    """A constant matrix that is worth a layer."""
    tensor = scope.constant(node.input[index])
    if tensor is None or tensor.data_type != TensorProto.FLOAT or len(tensor.dims) != 2:
        return None
    return tensor if graphs.tensor_size(tensor) >= MIN_WEIGHTS else None


def _copy(node: onnx.NodeProto, without: tuple[str, ...]) -> onnx.NodeProto:
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    graphs.delete_where(copy.attribute, lambda item: item.name in without)
    return copy


def _turn(source: str, target: str, rank: int) -> onnx.NodeProto:
    """Swap the last two axes."""
    order = [*range(rank - 2), rank - 1, rank - 2]
    return helper.make_node("Transpose", [source], [target], perm=order)
