"""What the float model answers to samples."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

from bapq_edge.bank.layout import Level

from ..onnx_graph.ir import HeavyLayer, LayerPlan
from .forward_passes import FLOAT, ForwardPasses, Tensors
from .reference_model import Reference, weight_feeds
from .samples import CalibrationData

__all__ = ["FloatAnswers", "float_answers"]


@dataclass(frozen=True)
class FloatAnswers:
    """What plans are compared with."""

    tensors: list[Tensors]
    """The judged tensors of the float model, by name, for each sample."""
    free_to_shift: frozenset[str]
    """Those whose rows a Softmax reads."""


def float_answers(
    model: onnx.ModelProto, plan: LayerPlan, data: CalibrationData, workers: int, folder: Path
) -> FloatAnswers:
    """Run the float model on samples.

    What does not fit in memory meanwhile goes to `folder`. Raises CalibrationError where the model
    fails on a sample.
    """
    reference = Reference(model, plan)

    def feeds(_: Level, layer: HeavyLayer) -> dict[str, np.ndarray]:
        return weight_feeds(layer, layer.weight, layer.bias)

    passes = ForwardPasses(reference, data, (), feeds, workers, folder)
    for stage in reference.stages():
        passes.run(stage)
    judged = [name for name in reference.judged_tensors() if name in passes.live()]
    answers = [passes.tensors(FLOAT, sample, judged) for sample in range(data.samples)]
    return FloatAnswers(answers, reference.softmax_inputs())
