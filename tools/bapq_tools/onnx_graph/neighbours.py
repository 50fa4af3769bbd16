"""Who reads a tensor: what decides whether a node can become part of the one before."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import onnx

from . import graphs

__all__ = ["Neighbours"]


class Neighbours:
    """The readers of each tensor inside one graph; valid until the graph changes."""

    def __init__(self, graph: onnx.GraphProto, scope: graphs.Scope) -> None:
        self.scope = scope
        self._fused: list[onnx.NodeProto] = []
        self._reads: Counter[str] = graphs.uses(graph)
        self._readers: dict[str, list[onnx.NodeProto]] = {}
        for node in graph.node:
            for name in dict.fromkeys(node.input):
                self._readers.setdefault(name, []).append(node)

    def reads(self, name: str) -> int:
        """How often the tensor is read: by nodes, bodies, or as an output."""
        return self._reads[name]

    def readers(self, name: str) -> list[onnx.NodeProto]:
        """The nodes that read the tensor, in the order of the graph."""
        return self._readers.get(name, [])

    def take(self, nodes: Iterable[onnx.NodeProto]) -> None:
        """Note that an operator takes these nodes over; no other one can."""
        self._fused.extend(nodes)

    def is_taken(self, node: onnx.NodeProto) -> bool:
        """Whether an operator has taken the node over."""
        return any(node is other for other in self._fused)

    def only_reader(self, name: str) -> onnx.NodeProto | None:
        """The node that alone reads the tensor; None when bodies or the graph's outputs do."""
        return self.readers(name)[0] if self._reads[name] == 1 and self.readers(name) else None
