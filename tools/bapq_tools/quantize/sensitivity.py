"""Measures what the rounding of each layer does to the model's outputs, one layer at a time."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnx

from bapq_edge.bank.layout import Level

from ..calibration.forward_passes import FLOAT, ForwardPasses, Tensors, run
from ..calibration.reference_model import Reference, weight_feeds
from ..onnx_graph.ir import HeavyLayer
from .quantized_layer import QuantizedLayer

_SAMPLES = 32
"""Number of samples that outputs are compared on."""

_MOST = 1e6
"""Largest square of a relative error; outputs that are no numbers have it, too."""


class OutputErrors:
    """Runs the rest of the model with one layer quantized and all others in float.

    Levels add up: errors of different layers are nearly uncorrelated, and each is small where a
    planner would choose it.
    """

    def __init__(
        self,
        reference: Reference,
        passes: ForwardPasses,
        nodes: Sequence[onnx.NodeProto],
        workers: int,
    ) -> None:
        """`nodes` are all that come after what the passes have computed."""
        self._passes = passes
        self._workers = workers
        count = min(_SAMPLES, passes.samples)
        self._samples = [i * passes.samples // count for i in range(count)]
        self._free_to_shift = reference.softmax_inputs()
        computed = {name for node in nodes for name in node.output}
        self._outputs = [name for name in reference.judged_tensors() if name in computed]
        if self._outputs:
            reads = set().union(*(reference.needs(node) for node in nodes))
            example = {n: v for n, v in passes.tensors(FLOAT, 0).items() if n in reads}
            self._session = passes.session(nodes, example, self._outputs)
            self._feeds = passes.weight_feeds(FLOAT, nodes)
            self._wanted = self._run({})

    def of(self, layer: HeavyLayer, quantized: QuantizedLayer) -> dict[Level, float]:
        """Squared relative error of the judged tensors per level, mean over outputs and samples.

        Level 8 follows from level 4 by the ratio of the layer's own errors, where both are there.
        """
        levels = quantized.levels
        own = {level: error**2 for level, error in quantized.relative_error.items()}
        if not self._outputs:
            return own
        errors: dict[Level, float] = {}
        for level in levels:
            if level == 32:
                errors[level] = 0.0
            elif level in _measured_levels(levels):
                changed = weight_feeds(layer, quantized.weight(level), quantized.bias(level))
                pairs = zip(self._run(changed), self._wanted, strict=True)
                each = [relative_square_error(a, b, self._free_to_shift) for a, b in pairs]
                errors[level] = float(np.mean(each))
        if 8 in levels and 4 in levels:
            errors[8] = errors[4] * own[8] / own[4] if own[4] else own[8]
        return errors

    def _run(self, changed: Tensors) -> list[Tensors]:
        def outputs_of(sample: int) -> Tensors:
            tensors = self._passes.tensors(FLOAT, sample)
            return run(self._session, self._outputs, {**tensors, **self._feeds, **changed}, sample)

        with ThreadPoolExecutor(self._workers) as pool:
            return list(pool.map(outputs_of, self._samples))


def _measured_levels(levels: Sequence[Level]) -> list[Level]:
    """Levels whose effect is measured; the others follow."""
    return [level for level in levels if level != 32 and (level != 8 or 4 not in levels)]


def measured_runs(levels: Sequence[Level], samples: int) -> int:
    """Number of runs that `OutputErrors.of` makes for a layer with these levels."""
    return len(_measured_levels(levels)) * min(_SAMPLES, samples)


def relative_square_error(
    found: Tensors, wanted: Tensors, free_to_shift: Collection[str] = ()
) -> float:
    """The mean over the outputs of |found - wanted|² / |wanted|², each at most `_MOST`.

    Of tensors that are free to shift, rows are compared without their means.
    """
    ratios = []
    for name, expected in wanted.items():
        expected = expected.astype(np.float64)
        difference = found[name] - expected
        if name in free_to_shift:
            expected = expected - expected.mean(-1, keepdims=True)
            difference -= difference.mean(-1, keepdims=True)
        norm, error = np.square(expected).sum(), np.square(difference).sum()
        if norm == 0:
            ratios.append(0.0)
        else:
            ratios.append(min(error / norm, _MOST) if np.isfinite(error) else _MOST)
    return float(np.mean(ratios))
