"""Cuts a bank's graph in two at one tensor, the tap: the head computes it, the body reads it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx
from onnx import TensorProto, helper

from bapq_edge.bank.reader import Bank
from bapq_edge.errors import NoTapError

from ..onnx_graph import graphs
from ..onnx_graph.assemble import reads_layer

__all__ = ["BankGraph", "Cut"]

MOST_SHARE = 0.15
"""Largest share of the weights before a tap: a gate that decides later saves little."""


@dataclass(frozen=True)
class Cut:
    """A tap inside the graph."""

    tap: str
    head_layers: int
    """Number of the bank's first layers that the head reads; the body reads all others."""
    share: float
    """Share of the weights in the head, without those of layers that are read row by row."""
    nodes: tuple[int, ...]
    """Nodes that compute the tap, by their place in the graph."""


class BankGraph:
    """The graph of a bank, and where it can be cut."""

    def __init__(self, bank: Bank) -> None:
        self.model = onnx.load_model_from_string(bank.graph_bytes())
        self._layers = bank.manifest.layers
        self._nodes = list(self.model.graph.node)
        self._reads = [_reads(node) for node in self._nodes]
        self._own = [_layers_of(node) for node in self._nodes]
        self._maker = {name: i for i, node in enumerate(self._nodes) for name in node.output}
        # What the graph's inputs give without a weight of ours, the body may compute again.
        self._outputs = {item.name for item in self.model.graph.output}
        self._light: list[bool] = []
        for reads, own in zip(self._reads, self._own, strict=True):
            before = [self._light[self._maker[name]] for name in reads if name in self._maker]
            self._light.append(not own and all(before))

    def cuts(self) -> list[Cut]:
        """The cuts up to `MOST_SHARE`, earliest first: the last one of each number of layers.

        A cut before the first layer counts only where there is a node to compute it.
        """
        last: dict[int, Cut] = {}
        for i, node in enumerate(self._nodes):
            for name in node.output:
                cut = self._cut(name, i) if name else None
                if cut is not None and cut.share <= MOST_SHARE:
                    last[cut.head_layers] = cut
        return [last[count] for count in sorted(last)]

    def cut(self, tap: str) -> Cut:
        """The cut at a tensor; NoTapError where there is none, or where other tensors cross it."""
        if tap not in self._maker:
            raise NoTapError(
                f"tap {tap!r} is no tensor that the bank's graph computes: name one, such as "
                + (", ".join(repr(cut.tap) for cut in self.cuts()) or "an input")
            )
        found = self._cut(tap, self._maker[tap])
        if found is None:
            raise NoTapError(
                f"tap {tap!r} does not cut the graph in two: other tensors pass it by, or a layer "
                "is used on both sides; name another one"
            )
        return found

    def split(self, cut: Cut) -> tuple[bytes, bytes]:
        """Make the models of head and body."""
        head = [self._nodes[i] for i in cut.nodes]
        outputs = list(self.model.graph.output)
        body = [self._nodes[i] for i in self._body(cut)]
        given = helper.make_tensor_value_info(cut.tap, TensorProto.FLOAT, None)
        # Its type is what the head makes of it; whoever runs the head sees.
        made = onnx.ValueInfoProto(name=cut.tap)
        return (
            _extract(self.model, head, [made], []),
            _extract(self.model, body, outputs, [given]),
        )

    def _cut(self, tap: str, maker: int) -> Cut | None:
        head = self._before({tap})
        layers = {layer for i in head for layer in self._own[i]}
        if layers != set(range(len(layers))) or len(layers) == len(self._layers):
            return None
        cut = Cut(tap, len(layers), self._share(len(layers)), tuple(sorted(head)))
        body = self._body(cut)
        # Whatever the body would compute a second time must cost no weights and know no tap.
        if any(i in head and not self._light[i] for i in body):
            return None
        if tap in self._outputs or layers & {layer for i in body for layer in self._own[i]}:
            return None
        # The tap must say something of all that is computed after it.
        reached = {tap}
        for i in body:
            if self._reads[i] & reached:
                reached.update(self._nodes[i].output)
            elif self._own[i]:
                return None
        return cut

    def _body(self, cut: Cut) -> list[int]:
        return sorted(self._before(self._outputs, {cut.tap}))

    def _before(self, names: set[str], given: frozenset[str] | set[str] = frozenset()) -> set[int]:
        """The nodes that the tensors need; tensors in `given` are there already."""
        found: set[int] = set()
        open_names = list(names - given)
        while open_names:
            maker = self._maker.get(open_names.pop())
            if maker is not None and maker not in found:
                found.add(maker)
                open_names += self._reads[maker] - given
        return found

    def _share(self, count: int) -> float:
        weights = [0 if layer.operators == ("Gather",) else layer.weights for layer in self._layers]
        return sum(weights[:count]) / max(sum(weights), 1)


def _reads(node: onnx.NodeProto) -> set[str]:
    """The tensors that a node reads, with those that only its bodies read."""
    found = {name for name in node.input if name}
    for body in graphs.bodies(node):
        found |= graphs.names(body)
    return found


def _layers_of(node: onnx.NodeProto) -> set[int]:
    """The layers that a node and its bodies read."""
    nodes = [node, *(n for body in graphs.bodies(node) for g in graphs.walk(body) for n in g.node)]
    return {int(graphs.attribute(n, "layer", 0)) for n in nodes if reads_layer(n)}


def _extract(
    model: onnx.ModelProto,
    nodes: Sequence[onnx.NodeProto],
    outputs: Sequence[onnx.ValueInfoProto],
    given: Sequence[onnx.ValueInfoProto],
) -> bytes:
    """Make a model of some nodes; it takes over domains, opsets, and what the nodes read."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    del result.graph.node[:], result.graph.input[:], result.graph.output[:]
    result.graph.node.extend(nodes)
    read = {name for node in nodes for name in _reads(node)} | {item.name for item in outputs}
    result.graph.input.extend(given)
    # The input of runs is read by operators of ours alone.
    result.graph.input.extend(item for item in model.graph.input if item.name in read)
    result.graph.output.extend(outputs)
    computed = {name for node in nodes for name in node.output}
    graphs.delete_where(result.graph.initializer, lambda tensor: tensor.name not in read)
    graphs.delete_where(result.graph.sparse_initializer, lambda s: s.values.name not in read)
    graphs.delete_where(result.graph.value_info, lambda info: info.name not in computed)
    found: bytes = result.SerializeToString(deterministic=True)
    return found
