"""Spells blocks of transformers out, as ONNX Runtime's optimizer fuses them, around their weights.

What remains has no weights: MultiHeadAttention and SkipLayerNormalization, which ONNX Runtime knows
since 1.14, with the same numbers in every version since 1.17.
"""

from __future__ import annotations

import onnx
from onnx import TensorProto, helper

from . import graphs
from .node_rewriter import MICROSOFT, NodeRewriter, renamed

_EPSILON = 1e-12
"""The default of EmbedLayerNormalization and SkipLayerNormalization."""

_AXES_OPSET = 13
"""The first in which Split, ReduceSum and Unsqueeze take their sizes and axes as inputs."""

_RANGE_OPSET = 11
"""The first with Range."""

Nodes = list[onnx.NodeProto]


class TransformerBlocks(NodeRewriter):
    """Rewrites Attention, EmbedLayerNormalization, and activations that add a bias."""

    def __init__(self, model: onnx.ModelProto) -> None:
        super().__init__(model)
        self._lengths: set[str] = set()  # of samples, as embeddings give them
        self.writers = {
            (MICROSOFT, "Attention"): self._attention,
            (MICROSOFT, "EmbedLayerNormalization"): self._embed,
            (MICROSOFT, "BiasGelu"): self._biased,
            (MICROSOFT, "FastGelu"): self._biased,
        }

    def _attention(self, node: onnx.NodeProto, scope: graphs.Scope) -> Nodes | None:
        """One product gives queries, keys and values."""
        x, weight, bias, mask, past, position, length = _inputs(node, 7)
        tensor = scope.constant(weight)
        rank = 1 if not mask or mask in self._lengths else self.rank(mask)
        if tensor is None or length or rank not in (1, 2, 3):
            return None
        if graphs.attribute(node, "do_rotary", 0) or _has(node, 1) != bool(past):
            return None
        if past and self.opset < _AXES_OPSET:
            return None
        sizes = graphs.attribute(node, "qkv_hidden_sizes") or [tensor.dims[1] // 3] * 3
        nodes: Nodes = []
        product = self.name(f"{node.output[0]}_qkv")
        nodes.append(helper.make_node("MatMul", [x, weight], [product], node.name))
        if bias:
            product = self.apply(nodes, "Add", [product, bias])
        parts = [self.name(f"{node.output[0]}_{part}") for part in "qkv"]
        if self.opset >= _AXES_OPSET:
            split = [product, self.integers(sizes, f"{product}_sizes")]
            nodes.append(helper.make_node("Split", split, parts, axis=2))
        else:
            nodes.append(helper.make_node("Split", [product], parts, axis=2, split=sizes))
        attend = renamed(
            node,
            "MultiHeadAttention",
            ("qkv_hidden_sizes", "do_rotary", "past_present_share_buffer"),
        )
        attend.domain, attend.name = MICROSOFT, f"{node.name or node.output[0]}_heads"
        del attend.input[:], attend.output[1:]
        attend.input.extend([*parts, "", mask, position])
        if not past:
            while not attend.input[-1]:
                del attend.input[-1]
            return [*nodes, attend]
        pair = [self.integers(number, f"{past}_half") for number in (0, 1)]
        attend.input.extend(self.apply(nodes, "Gather", [past, half]) for half in pair)
        attend.output.extend(self.name(f"{node.output[1]}_{part}") for part in "kv")
        nodes.append(attend)
        axis = self.integers([0], f"{past}_axis")
        both = [self.apply(nodes, "Unsqueeze", [half, axis]) for half in attend.output[1:]]
        nodes.append(helper.make_node("Concat", both, [node.output[1]], axis=0))
        return nodes

    def _embed(self, node: onnx.NodeProto, scope: graphs.Scope) -> Nodes | None:
        ids, segments, words, places, kinds, gamma, beta, mask, numbers = _inputs(node, 9)
        if _has(node, 1):
            self._lengths.add(node.output[1])
        if self.opset < _RANGE_OPSET and not numbers:
            return None
        name = node.name or node.output[0]
        nodes: Nodes = []
        total = self._gather(nodes, words, ids, f"{name}_words")
        if not numbers:
            shape = self.apply(nodes, "Shape", [ids])
            one = self.integers(1, f"{name}_axis")
            length = self.apply(nodes, "Gather", [shape, one])
            numbers = self.apply(nodes, "Range", [self.integers(0, f"{name}_first"), length, one])
        position = self._gather(nodes, places, numbers, f"{name}_positions")
        if graphs.attribute(node, "mask_index_type", 1) and _has(node, 1):
            nodes += self._count(node, ids, mask)
        if segments:
            total = self.apply(nodes, "Add", [total, position])
            last = self._gather(nodes, kinds, segments, f"{name}_segments")
        else:  # the same for all samples, which the sum inside is not for
            last = self.apply(nodes, "Expand", [position, self.apply(nodes, "Shape", [total])])
        norm = helper.make_node(
            "SkipLayerNormalization",
            [total, last, gamma, beta],
            [node.output[0], "", "", node.output[2]] if _has(node, 2) else [node.output[0]],
            name,
            domain=MICROSOFT,
            epsilon=graphs.attribute(node, "epsilon", _EPSILON),
        )
        return [*nodes, norm]

    def _gather(self, nodes: Nodes, table: str, indices: str, name: str) -> str:
        output = self.name(name)
        nodes.append(helper.make_node("Gather", [table, indices], [output], name))
        return output

    def _count(self, node: onnx.NodeProto, ids: str, mask: str) -> Nodes:
        """How many tokens of each sample the mask shows, int32."""
        nodes: Nodes = []
        if not mask:  # ONNX Runtime gives zeros then
            mask = self.apply(nodes, "Sub", [ids, ids])
        if self.opset >= _AXES_OPSET:
            axes = self.integers([1], f"{node.output[1]}_axes")
            count = self.apply(nodes, "ReduceSum", [mask, axes], keepdims=0)
        else:
            count = self.apply(nodes, "ReduceSum", [mask], axes=[1], keepdims=0)
        nodes.append(helper.make_node("Cast", [count], [node.output[1]], to=TensorProto.INT32))
        return nodes

    def _biased(self, node: onnx.NodeProto, scope: graphs.Scope) -> Nodes | None:
        """The bias becomes the layer's before it."""
        x, bias = _inputs(node, 2)
        if not bias:
            return None
        nodes: Nodes = []
        total = self.apply(nodes, "Add", [x, bias])
        kind = "Gelu" if node.op_type == "BiasGelu" else node.op_type
        return [*nodes, helper.make_node(kind, [total], node.output, node.name, domain=MICROSOFT)]


def _inputs(node: onnx.NodeProto, count: int) -> list[str]:
    """The names of so many inputs; empty for those left out."""
    return [*node.input, *[""] * count][:count]


def _has(node: onnx.NodeProto, output: int) -> bool:
    return len(node.output) > output and node.output[output] != ""
