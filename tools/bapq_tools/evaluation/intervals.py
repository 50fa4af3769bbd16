"""Means of scores, and the interval that their true mean lies in with 95 % confidence."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["Score", "score_of"]

_Z = 1.959964
"""Of the normal distribution: 95 % of it lies within so many standard deviations of the mean."""
_DRAWS = 2000
_SEED = 0


@dataclass(frozen=True)
class Score:
    """The mean over samples, and the bounds of its interval."""

    mean: float
    low: float | None
    """None: one sample tells no interval."""
    high: float | None
    interval: str
    """"wilson" or "bootstrap"."""


def score_of(scores: Sequence[float], share: bool) -> Score:
    """The mean of one score per sample.

    With `share`, and where every score is 0 or 1, the interval is Wilson's for a share, which stays
    within 0 and 1 and does not vanish where all are right. Others have the percentiles of a
    bootstrap with a fixed seed, as scores near their bound are far from normal.
    """
    values = np.asarray(scores, np.float64)
    mean, count = float(values.mean()), len(values)
    if share and np.isin(values, (0.0, 1.0)).all():
        middle = (mean + _Z**2 / (2 * count)) / (1 + _Z**2 / count)
        half = _Z * math.sqrt(mean * (1 - mean) / count + (_Z / (2 * count)) ** 2)
        half /= 1 + _Z**2 / count
        return Score(mean, max(middle - half, 0.0), min(middle + half, 1.0), "wilson")
    if count < 2:
        return Score(mean, None, None, "bootstrap")
    generator = np.random.default_rng(_SEED)
    means = [values[generator.integers(count, size=count)].mean() for _ in range(_DRAWS)]
    low, high = np.percentile(means, (2.5, 97.5))
    return Score(mean, float(low), float(high), "bootstrap")
