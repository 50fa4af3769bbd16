"""Whether calibration samples can do their work: doubts, each in a line that says what would do."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from bapq_edge.answers import AnswerJudge

from .forward_passes import Tensors
from .samples import CalibrationData

__all__ = ["ENOUGH_SAMPLES", "doubts_of_answers", "doubts_of_samples"]

ENOUGH_SAMPLES = 128
"""So many typical samples do: more help at 2 bits and below only."""

_FEW_SAMPLES = 32
"""Below this a low level may be ruined, and an eighth held out tells nothing."""

_LEAST_JUDGED = 4
"""From fewer answers nothing follows."""

_ALIKE = 0.01
"""Answers that differ by less than this part of their norm are of samples too much alike."""


def doubts_of_samples(data: CalibrationData) -> list[str]:
    """What speaks against the samples themselves; empty: nothing."""
    if data.samples < _FEW_SAMPLES:
        return [
            f"the calibration data has {data.samples} samples, too few to choose codes of low "
            f"levels by and to measure them: {ENOUGH_SAMPLES} would do"
        ]
    different = len({_digest(data, sample) for sample in range(data.samples)})
    if different < max(data.samples // 2, _FEW_SAMPLES):
        return [
            f"of the {data.samples} calibration samples {different} differ, the others are their "
            f"copies: {ENOUGH_SAMPLES} that differ would do"
        ]
    return []


def doubts_of_answers(answers: Sequence[Tensors]) -> list[str]:
    """What the float model's answers to the samples tell against them; empty: nothing."""
    if len(answers) < _LEAST_JUDGED or not answers[0]:
        return []
    spread = max(_spread([tensors[name] for tensors in answers]) for name in answers[0])
    if spread < _ALIKE:
        return [
            f"the float model's answers to {len(answers)} of the samples differ by "
            f"{spread:.2%} of their norm: the samples are too much alike; {ENOUGH_SAMPLES} of all "
            "kinds that the application will meet would do"
        ]
    scores = AnswerJudge.of(answers[0]).scores
    classes = {int(each[scores][0].argmax()) for each in answers} if scores else set()
    if scores is None or len(classes) > 1:
        return []
    own, count = classes.pop(), answers[0][scores].shape[1]
    return [
        f"to the float model {len(answers)} of {len(answers)} samples are of class {own}, of "
        f"{count} that it knows: {max(ENOUGH_SAMPLES, 8 * count)} samples of all classes would do"
    ]


def _digest(data: CalibrationData, sample: int) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for _, array in sorted(data.feed(sample).items()):
        digest.update(array.tobytes())
    return digest.digest()


def _spread(values: Sequence[np.ndarray]) -> float:
    """How far answers are from their mean, as part of their norm; of several shapes: 1."""
    if len({value.shape for value in values}) > 1:
        return 1.0
    stacked = np.stack(values).astype(np.float64)
    norm = float(np.linalg.norm(stacked))
    return float(np.linalg.norm(stacked - stacked.mean(0))) / norm if norm else 0.0
