"""Measures what the rounding of each layer does to the model's outputs, one layer at a time."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import onnx

from bapq_edge.bank.layout import Level

from ..calibration.forward_passes import FLOAT, ForwardPasses, Tensors, on_samples, run
from ..calibration.reference_model import Reference, weight_feeds, weight_inputs
from ..onnx_graph.ir import HeavyLayer
from .quantized_layer import QuantizedLayer

_MOST_SAMPLES, _LEAST_SAMPLES = 32, 8
"""Number of samples that outputs are compared on."""

_SAMPLE_LAYERS = 64 * _MOST_SAMPLES
"""Samples times layers: measuring a layer runs all layers behind it, so that models of more than
64 layers would otherwise take a time that grows with the square of their number."""

_FREE_WORK = 1 << 40
_WORK_PER_PASS = 32
"""Multiplications that measuring makes at most, whatever the model, and for each that a run of all
samples through it makes. ResNet-50 with 100 samples does not feel it; a detector with 3 large
images does."""

_CONSTANT_BYTES = 64 << 20
"""Weights are handed to each run, which takes longer than a small layer does; up to this size the
session has those that do not change."""

_MOST_LAYERS = _SAMPLE_LAYERS // _LEAST_SAMPLES
"""Number of layers that are measured; of more, others are taken to be like one before them."""

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
        layers: Sequence[HeavyLayer],
        workers: int,
        count: int,
    ) -> None:
        """`nodes` are all that come after what the passes have computed.

        `layers` are those that `of` may be asked for, `count` is a number of samples.
        """
        self._passes = passes
        self._workers = workers
        self._samples = [i * passes.samples // count for i in range(count)]
        self._free_to_shift = reference.softmax_inputs()
        computed = {name for node in nodes for name in node.output}
        self._outputs = [name for name in reference.judged_tensors() if name in computed]
        if self._outputs:
            needs = set().union(*(reference.needs(node) for node in nodes))
            self._reads = needs & passes.live()
            self._feeds = passes.weight_feeds(FLOAT, nodes)
            constants: dict[str, np.ndarray] = {}
            if sum(values.nbytes for values in self._feeds.values()) <= _CONSTANT_BYTES:
                changing = set().union(*map(weight_inputs, layers))
                constants = {n: self._feeds.pop(n) for n in self._feeds.keys() - changing}
            self._session = passes.session(nodes, self._reads, self._outputs, constants)
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
            tensors = self._passes.tensors(FLOAT, sample, self._reads)
            return run(self._session, self._outputs, {**tensors, **self._feeds, **changed}, sample)

        return on_samples(outputs_of, self._samples, self._workers)


def _measured_levels(levels: Sequence[Level]) -> list[Level]:
    """Levels whose effect is measured; the others follow."""
    return [level for level in levels if level != 32 and (level != 8 or 4 not in levels)]


def measured_runs(levels: Sequence[Level], samples: int) -> int:
    """Number of runs that `OutputErrors.of` makes for a layer with these levels."""
    return len(_measured_levels(levels)) * samples


def samples_compared(samples: int, layers: int, multiplications: int) -> int:
    """How many of the samples outputs are compared on, in a model of so many layers.

    `multiplications` are those of one run of the model.
    """
    found = min(samples, _MOST_SAMPLES, max(_LEAST_SAMPLES, _SAMPLE_LAYERS // layers))
    runs = 1.5 * min(layers, _MOST_LAYERS)  # of the whole model, for each sample: 3 levels, half
    work = max(_FREE_WORK, _WORK_PER_PASS * samples * multiplications)
    return max(1, min(found, int(work / (runs * multiplications + 1))))


def measured_before(number: int, layers: int) -> int:
    """The number of the layer, itself or one before it, that is measured for a layer."""
    return number - number % -(-layers // _MOST_LAYERS)


def error_like(quantized: QuantizedLayer, measured: QuantizedLayer) -> dict[Level, float]:
    """What a layer does to the outputs, if its errors pass through as those of a measured one."""
    found = {}
    for level, own in quantized.relative_error.items():
        theirs = measured.relative_error.get(level, 0.0)
        passed = measured.output_error.get(level, 0.0) / theirs**2 if theirs else 1.0
        found[level] = own**2 * passed
    return found


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
        if not 0 < norm < np.inf:
            ratios.append(0.0)
        else:
            ratios.append(min(error / norm, _MOST) if np.isfinite(error) else _MOST)
    return float(np.mean(ratios))
