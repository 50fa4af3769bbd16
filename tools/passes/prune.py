"""Static pruning: zeroes the weights of a layer that are small beside its largest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import numpy_helper

from . import graph as graphs
from .ir import HeavyLayer, LayerOptions, LayerPlan


@dataclass(frozen=True)
class PruneReport:
    """What pruning left of a layer."""

    weights: int
    remaining: int
    """weights that are not zero"""
    zero_rows: np.ndarray
    """(rows,) bool: every weight is zero, so the row's output is its bias, whatever the input"""

    @property
    def remaining_ratio(self) -> float:
        """Share of the weights that are not zero."""
        return self.remaining / self.weights


def prune(layer: HeavyLayer, tau: float) -> PruneReport:
    """Zero every weight whose magnitude is below `tau` times the layer's largest."""
    layer.weight = _pruned(layer.weight, tau)
    left = np.count_nonzero(layer.weight, axis=1)
    return PruneReport(layer.weight.size, int(left.sum()), left == 0)


def prune_layers(
    model: onnx.ModelProto,
    plan: LayerPlan,
    options: Mapping[str, LayerOptions],
    advance: Callable[[], None] = lambda: None,
) -> dict[str, PruneReport]:
    """Prune the layers that are to be; what was left, by layer name.

    The model's own tensors are pruned with them, so that calibration runs what the device will run;
    except where another node reads the tensor too. `advance` is called once per layer.
    """
    if all(options[layer.name].prune_tau == 0 for layer in plan.layers):
        return {}
    tensors = _weight_tensors(model, plan)
    reports = {}
    for layer in plan.layers:
        tau = options[layer.name].prune_tau
        if tau > 0:
            reports[layer.name] = prune(layer, tau)
            for tensor in tensors[layer.name]:
                weight = _pruned(graphs.tensor_array(tensor), tau)
                tensor.CopyFrom(numpy_helper.from_array(weight, tensor.name))
        advance()
    return reports


def _pruned(weight: np.ndarray, tau: float) -> np.ndarray:
    magnitude = np.abs(weight)
    small = magnitude < np.float32(tau) * magnitude.max()
    # A zero keeps its sign: no level's grid has a zero, and the sign then chooses between the two
    # codes beside it. Were all zeros to become the same code, their errors would add up.
    return np.where(small, np.copysign(np.float32(0), weight), weight)


def _weight_tensors(model: onnx.ModelProto, plan: LayerPlan) -> dict[str, list[onnx.TensorProto]]:
    """Per layer the initializers that hold its weights and that nothing else reads."""
    uses = {id(use.node): (layer.name, use) for layer in plan.layers for use in layer.uses}
    readers: dict[str, Counter[str]] = {layer.name: Counter() for layer in plan.layers}
    found: dict[str, dict[str, onnx.TensorProto]] = {layer.name: {} for layer in plan.layers}

    def visit(graph: onnx.GraphProto, outer: graphs.Scope | None) -> None:
        scope = graphs.Scope.of(graph, outer)
        for node in graph.node:
            for body in graphs.bodies(node):
                visit(body, scope)
            if id(node) in uses:
                layer, use = uses[id(node)]
                tensor = scope.constant(node.input[0 if use.operator == "Gather" else 1])
                found[layer][tensor.name] = tensor
                readers[layer][tensor.name] += 1

    visit(model.graph, None)
    read = graphs.uses(model.graph)
    return {
        layer: [tensor for name, tensor in own.items() if read[name] == readers[layer][name]]
        for layer, own in found.items()
    }
