"""Static pruning: zeroes the weights of a layer that are small beside its largest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ..onnx_graph.ir import HeavyLayer, LayerOptions, LayerPlan


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


def prune_layers(plan: LayerPlan, options: Mapping[str, LayerOptions]) -> dict[str, PruneReport]:
    """Prune the layers that are to be; what was left, by layer name."""
    taus = {layer.name: options[layer.name].prune_tau for layer in plan.layers}
    return {
        layer.name: prune(layer, taus[layer.name]) for layer in plan.layers if taus[layer.name] > 0
    }


def _pruned(weight: np.ndarray, tau: float) -> np.ndarray:
    magnitude = np.abs(weight)
    small = magnitude < np.float32(tau) * magnitude.max()
    # A zero keeps its sign: no level's grid has a zero, and the sign then chooses between the two
    # codes beside it. Were all zeros to become the same code, their errors would add up.
    return np.where(small, np.copysign(np.float32(0), weight), weight)
