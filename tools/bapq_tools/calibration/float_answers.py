"""What the float model answers, and how other answers are compared with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

from bapq_edge.bank.fields import Measure
from bapq_edge.bank.layout import Level

from ..onnx_graph.ir import HeavyLayer, LayerPlan
from .forward_passes import FLOAT, ForwardPasses, Tensors
from .reference_model import Reference, weight_feeds
from .samples import CalibrationData

__all__ = ["FloatAnswers", "Judge", "float_answers"]


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


class Judge:
    """How answers are told for people: as agreement of classes, or as cosine."""

    def __init__(self, wanted: Sequence[Tensors]) -> None:
        """A tensor of two axes and at least two columns holds scores of classes, unless its rows
        have norm 1; everything else is judged by its direction."""
        self._wanted = wanted
        scores = [name for name, value in wanted[0].items() if _holds_scores(value)]
        self._scores = scores[0] if scores else None
        self.measure: Measure = "agreement" if scores else "cosine"

    def classes(self) -> tuple[list[int], int] | None:
        """The float model's class for each sample, and how many it knows; None: it has none."""
        if self._scores is None:
            return None
        scores = [tensors[self._scores] for tensors in self._wanted]
        return [int(each[0].argmax()) for each in scores], scores[0].shape[1]

    def answer(self, found: Tensors, sample: int) -> float:
        """Of one sample: the share of rows with the float model's class, or the mean cosine."""
        wanted = self._wanted[sample]
        if self._scores is not None:
            a, b = found[self._scores], wanted[self._scores]
            return float(np.mean(a.argmax(1) == b.argmax(1)))
        return float(np.mean([_cosine(found[name], value) for name, value in wanted.items()]))


def _holds_scores(value: np.ndarray) -> bool:
    if value.ndim != 2 or value.shape[1] < 2:
        return False
    norms = np.linalg.norm(value.astype(np.float64), axis=1)
    return not bool(np.allclose(norms, 1, atol=1e-3))


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a.astype(np.float64).ravel(), b.astype(np.float64).ravel()
    norm = float(np.linalg.norm(a) * np.linalg.norm(b))
    if not np.isfinite(norm):
        return 0.0
    return float(np.clip(a @ b / norm, -1, 1)) if norm else float(not a.any() and not b.any())
