"""Drift: whether inputs still fall into regions as they did in calibration."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["DriftDetector", "ExpectedRegions"]


@dataclass(frozen=True, eq=False)
class ExpectedRegions:
    """How the inputs of calibration fell into regions."""

    shares: NDArray[np.float32]
    """(regions,): share of the samples in each."""
    samples: int
    """Number of samples that the shares were counted on: they are uncertain by as much."""


class DriftDetector:
    """Notices when inputs fall into other regions than those that calibration saw.

    A chi-square statistic over the last runs; its limit lies so far out that inputs of the same
    kind practically never reach it. Not thread-safe.
    """

    _WINDOW = 512
    _EVERY = 64
    _LIMIT = 6.0
    """In standard deviations of the statistic."""

    def __init__(self, expected: ExpectedRegions) -> None:
        """Compare with these."""
        self._region_shares = expected.shares.astype(np.float64)
        self._samples = expected.samples
        self._last: deque[int] = deque(maxlen=self._WINDOW)
        self._unchecked = 0
        self.drifted = False
        """Whether the inputs are unlike now."""

    def saw(self, region: int) -> str | None:
        """Take note of a run's region; a reason when the inputs begin or cease to be unlike."""
        self._last.append(region)
        self._unchecked += 1
        if len(self._last) < self._WINDOW // 2 or self._unchecked < self._EVERY:
            return None
        self._unchecked = 0
        distance, worst, share = self._distance()
        # Half of the limit on the way back: no flapping.
        drifted = distance > (self._LIMIT / 2 if self.drifted else self._LIMIT)
        if drifted == self.drifted:
            return None
        self.drifted = drifted
        if not drifted:
            return f"the last {len(self._last)} inputs are again like those of calibration"
        return (
            f"the last {len(self._last)} inputs are unlike those of calibration: region {worst} "
            f"has {share:.0%} of them, calibration had {self._region_shares[worst]:.0%}"
        )

    def _distance(self) -> tuple[float, int, float]:
        """Standard deviations above the mean, the region most to blame, and its share now."""
        count = len(self._last)
        seen = np.bincount(list(self._last), minlength=len(self._region_shares))
        # Half a sample more: calibration may have missed a region that is merely rare.
        expected = self._region_shares * count + 0.5
        variance = expected * (1 + count / self._samples)
        parts = np.square(seen - self._region_shares * count) / variance
        freedom = max(len(self._region_shares) - 1, 1)
        worst = int(parts.argmax())
        distance = (float(parts.sum()) - freedom) / float(np.sqrt(2 * freedom))
        return distance, worst, float(seen[worst]) / count
