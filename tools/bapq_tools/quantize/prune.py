"""Static pruning: weights become zero that are small beside the largest of their layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ..onnx_graph.ir import HeavyLayer, LayerPlan
from .options import LayerOptions


@dataclass(frozen=True)
class PruneReport:
    """The weights that pruning left of a layer."""

    weights: int
    remaining: int
    """Number of weights that are not zero."""
    zero_rows: np.ndarray
    """Rows whose weights are all zero, (rows,) bool: their output is their bias."""

    @property
    def remaining_ratio(self) -> float:
        """The share of the weights that are not zero."""
        return self.remaining / self.weights


def prune(layer: HeavyLayer, tau: float) -> PruneReport:
    """Zero every weight whose magnitude is below `tau` times the layer's largest."""
    layer.weight = _pruned(layer.weight, tau)
    left = np.count_nonzero(layer.weight, axis=1)
    return PruneReport(layer.weight.size, int(left.sum()), left == 0)


def prune_layers(plan: LayerPlan, options: Mapping[str, LayerOptions]) -> dict[str, PruneReport]:
    """Prune the layers that have a tau; returns what was left, by layer name."""
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
