"""Finds the heavy layers of a folded model: weights, biases, activations, and who shares them."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx

from bapq_edge.bank.manifest import KeptNode
from bapq_edge.errors import NoHeavyLayerError

from . import graphs
from .fusion import (
    Bias,
    find_bias,
    find_epilogue,
    own_bias_input,
    split_own_bias,
)
from .heavy_nodes import MIN_WEIGHTS, QUANTIZED, HeavyNode, Refusal, recognise
from .ir import HeavyLayer, LayerPlan, LayerUse
from .neighbours import Neighbours
from .plain_nodes import ranks_of_plain_nodes

_NAME_LENGTH = 80


@dataclass
class _PlacedNode:
    """A heavy node and the graph that it stands in."""

    node: onnx.NodeProto
    heavy: HeavyNode
    graph: onnx.GraphProto
    scope: graphs.Scope
    is_body: bool
    bias: Bias | None = None


def find_layers(model: onnx.ModelProto) -> LayerPlan:
    """Find the heavy nodes, in execution order, bodies included, and what is fused into them.

    The model is edited in place where a Gemm or Conv has a bias that its layer cannot take over:
    the bias moves into an Add node of its own.

    Raises:
        NoHeavyLayerError: no node has enough constant weights.
        ModelError: the weights of a product hold NaN or infinity.
    """
    search = _Search()
    search.visit(model.graph, None)
    if not search.groups:
        raise NoHeavyLayerError(nothing_found([entry for _, entry in search.kept]))
    shapes = _Shapes(model)
    around = _NeighbourCache()
    for group in search.groups.values():
        _decide_bias(group, shapes, around)
    opset = graphs.standard_opset(model)
    taken = graphs.names(model.graph)
    for found in _all(search):
        if found.bias is None and own_bias_input(found.node):
            split_own_bias(found.graph, found.node, found.scope, opset, taken)
    around = _NeighbourCache()
    names: set[str] = set()
    layers = [_layer(group, shapes, around, names) for group in search.groups.values()]
    fused = {node.output[0] for layer in layers for use in layer.uses for node in use.replaced}
    kept = [entry for output, entry in search.kept if output not in fused]
    return LayerPlan(layers, kept, ranks_of_plain_nodes(model))


class _Search:
    """Walks the graphs, and groups heavy nodes that have the same weight matrix."""

    def __init__(self) -> None:
        self.groups: dict[tuple[bool, tuple[int, ...], bytes], list[_PlacedNode]] = {}
        self.kept: list[tuple[str, KeptNode]] = []  # with the node's first output

    def visit(self, graph: onnx.GraphProto, outer: graphs.Scope | None) -> None:
        scope = graphs.Scope.of(graph, outer)
        for node in graph.node:
            for body in graphs.bodies(node):
                self.visit(body, scope)
            heavy = recognise(node, scope)
            if isinstance(heavy, HeavyNode):
                self._group(_PlacedNode(node, heavy, graph, scope, outer is not None))
            elif isinstance(heavy, Refusal):
                name = node.name or node.output[0]
                entry = KeptNode(name, node.op_type, heavy.weights, heavy.reason)
                self.kept.append((node.output[0], entry))

    def _group(self, found: _PlacedNode) -> None:
        weight = found.heavy.weight
        depthwise = found.heavy.operator == "DepthwiseConv"  # has a layout of its own
        key = (depthwise, weight.shape, hashlib.blake2b(weight.data, digest_size=32).digest())
        group = self.groups.setdefault(key, [])
        if group:  # one array for all, so that the copies go
            found.heavy = _with_weight(found.heavy, group[0].heavy.weight)
        group.append(found)


def _with_weight(heavy: HeavyNode, weight: np.ndarray) -> HeavyNode:
    return HeavyNode(heavy.operator, heavy.activation_input, heavy.weight_name, weight, heavy.conv)


def _all(search: _Search) -> Iterator[_PlacedNode]:
    for group in search.groups.values():
        yield from group


def nothing_found(kept: list[KeptNode]) -> str:
    """The message of a model without a layer for a bank, out of what stays in float."""
    if not kept:
        return (
            "no MatMul, Gemm, Conv or Gather node has constant weights; a bank needs one with "
            f"at least {MIN_WEIGHTS}"
        )
    largest = max(kept, key=lambda node: node.weights)
    if largest.reason == QUANTIZED:
        weights = sum(node.weights for node in kept if node.reason == QUANTIZED)
        return (
            f"the model is quantized already: {weights} weights stand in nodes such as "
            f"{largest.operator} {largest.name!r}, in a form that a build does not take in; give "
            "the float model that it was made of, or its QDQ form"
        )
    return (
        f"no layer of the model fits a bank: the largest candidate, {largest.operator} "
        f"{largest.name!r}, has {largest.weights} weights and stays in float ({largest.reason}); "
        f"a bank needs a MatMul, Gemm, Conv or Gather with at least {MIN_WEIGHTS}"
    )


class _Shapes:
    """The shapes of tensors, inferred when first asked for: numbers, names, or None."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self._model = model
        self._shapes: dict[str, graphs.Shape | None] | None = None

    def output_rank(self, found: _PlacedNode) -> int | None:
        """The rank of a heavy node's output; None when unknown."""
        if found.heavy.operator == "Gemm":
            return 2
        if found.heavy.conv is not None:
            return len(found.scope.initializer(found.node.input[1]).dims)
        shape = self._of(found.node.output[0])
        return None if shape is None else len(shape)

    def same(self, one: str, other: str) -> bool:
        """Whether two tensors are known to have one shape in every run."""
        shape = self._of(one)
        return shape is not None and None not in shape and shape == self._of(other)

    def _of(self, name: str) -> graphs.Shape | None:
        if self._shapes is None:
            self._shapes = graphs.shapes(self._model)
        return self._shapes.get(name)


class _NeighbourCache:
    """The neighbours in each graph, found when first asked for; valid until a graph changes."""

    def __init__(self) -> None:
        self._known: dict[int, Neighbours] = {}

    def of(self, found: _PlacedNode) -> Neighbours:
        key = id(found.graph)
        if key not in self._known:
            self._known[key] = Neighbours(found.graph, found.scope)
        return self._known[key]


def _decide_bias(group: list[_PlacedNode], shapes: _Shapes, around: _NeighbourCache) -> None:
    """Fuse a bias only if all products that share the weights have the same one."""
    products = [found for found in group if found.heavy.operator != "Gather"]
    biases = []
    for found in products:
        bias = find_bias(found.node, found.heavy, shapes.output_rank(found), around.of(found))
        if bias is None:
            return
        biases.append(bias)
    if all(np.array_equal(bias.values, biases[0].values) for bias in biases):
        for found, bias in zip(products, biases, strict=True):
            found.bias = bias


def _layer(
    group: list[_PlacedNode], shapes: _Shapes, around: _NeighbourCache, names: set[str]
) -> HeavyLayer:
    biases = [found.bias for found in group if found.bias is not None]
    replaced = [found.heavy.weight_name for found in group]
    replaced += [bias.initializer for bias in biases]
    return HeavyLayer(
        name=_layer_name(group[0].node, names),
        weight=group[0].heavy.weight,
        bias=biases[0].values if biases else None,
        uses=tuple(_use(found, shapes, around.of(found)) for found in group),
        initializers=tuple(dict.fromkeys(replaced)),
    )


def _use(found: _PlacedNode, shapes: _Shapes, around: Neighbours) -> LayerUse:
    replaced = [found.node]
    if found.bias is not None and found.bias.add is not None:
        replaced.append(found.bias.add)
    use = LayerUse(
        node=found.node,
        replaced=tuple(replaced),
        operator=found.heavy.operator,
        activation_input=found.heavy.activation_input,
        output=replaced[-1].output[0],
        graph=found.graph,
        is_body=found.is_body,
        conv=found.heavy.conv,
    )
    if use.operator == "Gather":
        return use
    epilogue = find_epilogue(
        use.output, around, shapes.same, only_clip=use.operator == "DepthwiseConv"
    )
    nodes = epilogue.nodes
    return dataclasses.replace(
        use,
        replaced=use.replaced + nodes,
        output=nodes[-1].output[0] if nodes else use.output,
        activation=epilogue.activation,
        function=epilogue.function,
        residual=epilogue.residual,
        behind=nodes,
    )


def _layer_name(node: onnx.NodeProto, taken: set[str]) -> str:
    """Make a readable, unique name: `/layer1/conv/Conv` becomes `layer1.conv`.

    It is unique in lower case too, since it names a folder of the exchange form.
    """
    source = node.name or node.output[0]
    parts = [part for part in re.split(r"[/:]+", source) if part]
    if len(parts) > 1 and re.fullmatch(rf"{node.op_type}(_\d+)?", parts[-1]):
        parts.pop()
    wanted = re.sub(r"[^A-Za-z0-9._-]+", "_", ".".join(parts)).strip("._-") or node.op_type
    wanted, name, number = wanted[:_NAME_LENGTH], wanted[:_NAME_LENGTH], 1
    while name.lower() in taken:
        number += 1
        name = f"{wanted[: _NAME_LENGTH - len(str(number)) - 1]}_{number}"
    taken.add(name.lower())
    return name
