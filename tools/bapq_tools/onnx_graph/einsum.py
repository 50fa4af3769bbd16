"""Spells an Einsum with a constant out as the matrix product that it is."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import onnx
from onnx import TensorProto, helper

from . import graphs
from .heavy_nodes import MIN_WEIGHTS
from .node_rewriter import NodeRewriter

Nodes = list[onnx.NodeProto]

_TERMS = re.compile(r"([A-Za-z]+),([A-Za-z]+)(?:->([A-Za-z]*))?")
"""Two terms without an ellipsis."""


class Einsums(NodeRewriter):
    """Rewrites those of an activation and a constant that share nothing but what is summed over."""

    def __init__(self, model: onnx.ModelProto) -> None:
        super().__init__(model)
        self.writers = {("", "Einsum"): self._einsum}

    def _einsum(self, node: onnx.NodeProto, scope: graphs.Scope) -> Nodes | None:
        equation = graphs.attribute(node, "equation", b"").decode().replace(" ", "")
        found = _TERMS.fullmatch(equation)
        if found is None or len(node.input) != 2:
            return None
        constants = [scope.constant(name) for name in node.input]
        if (constants[0] is None) == (constants[1] is None):
            return None
        first = constants[0] is not None
        tensor = constants[0] or constants[1]
        assert tensor is not None
        if tensor.data_type != TensorProto.FLOAT or graphs.tensor_size(tensor) < MIN_WEIGHTS:
            return None
        own, other = found[1 + (not first)], found[1 + first]
        result = found[3]
        if result is None:  # each letter that stands once, by the alphabet
            both = own + other
            result = "".join(sorted(letter for letter in set(both) if both.count(letter) == 1))
        summed = [letter for letter in own if letter in other]
        free = [letter for letter in other if letter not in own]
        new = [letter for letter in own if letter not in other]
        plain = all(len(set(term)) == len(term) for term in (own, other, result))
        if not plain or not summed or not new or {*free, *new} != {*result}:
            return None
        size = dict(zip(own, tensor.dims, strict=True))
        matrix = graphs.tensor_array(tensor).transpose([own.index(at) for at in summed + new])
        columns = math.prod(size[letter] for letter in summed)
        weight = self.constant(matrix.reshape(columns, -1), f"{tensor.name}_matrix")
        nodes: Nodes = []
        x = self._ordered(nodes, node.input[first], other, free + summed)
        if len(summed) > 1:
            x = self._shaped(nodes, x, len(free), [columns])
        product = self.name(f"{node.output[0]}_product")
        nodes.append(helper.make_node("MatMul", [x, weight], [product], node.name))
        if len(new) > 1:
            product = self._shaped(nodes, product, len(free), [size[letter] for letter in new])
        self._ordered(nodes, product, free + new, result)
        nodes[-1].output[0] = node.output[0]
        return nodes

    def _shaped(self, nodes: Nodes, source: str, kept: int, sizes: list[int]) -> str:
        """Give a tensor other axes behind the first ones."""
        shape = self.integers([0] * kept + sizes, f"{source}_shape")
        return self.apply(nodes, "Reshape", [source, shape])

    def _ordered(
        self, nodes: Nodes, source: str, letters: Sequence[str], wanted: Sequence[str]
    ) -> str:
        """Bring the axes of a tensor into an order."""
        if [*letters] == [*wanted]:
            return source
        order = [[*letters].index(letter) for letter in wanted]
        return self.apply(nodes, "Transpose", [source], perm=order)
