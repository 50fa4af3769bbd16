"""Losses of regions, their bounds, and the operating points: which region gets which precision."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

__all__ = ["HeldOut", "OperatingPoints", "climb", "escalate", "operating_points", "region_losses"]

Float64s = NDArray[np.float64]


@dataclass(frozen=True)
class HeldOut:
    """Samples that nothing was fitted to, and how sure the bounds on their mean loss are."""

    losses: Float64s
    """Loss of each sample at each precision, 1 - agreement: (n, precisions)."""
    groups: NDArray[np.intp]
    """Group of each sample, (n,): samples of one group are alike."""
    binary: bool
    """Whether every loss is 0 or 1."""
    confidence: float
    """Confidence of every bound."""

    def upper(self, losses: Float64s, rows: NDArray[np.bool_] | slice = slice(None)) -> float:
        """A one-sided upper bound of the mean of losses (n,), from some of the samples.

        For losses of 0 and 1 it is Clopper and Pearson's, for as many samples as are worth the same
        where groups are alike (Korn and Graubard). For others it is Student's t over the groups.
        """
        chosen, groups = losses[rows], self.groups[rows]
        n = len(chosen)
        if n == 0:
            return 1.0
        if self.binary:
            worth = n / self.design_effect
            wrong = float(chosen.mean()) * worth
            return (
                float(stats.beta.ppf(self.confidence, wrong + 1, worth - wrong))
                if wrong < worth
                else 1.0
            )
        count, error = _group_error(chosen, groups)
        if count < 2:
            return 1.0
        bound = float(chosen.mean()) + error * float(stats.t.ppf(self.confidence, count - 1))
        return min(bound, 1.0)

    @property
    def design_effect(self) -> float:
        """Samples that are worth one independent one, by the precision with most to go by."""
        n = len(self.losses)
        if len(np.unique(self.groups)) == n:
            return 1.0
        spread = self.losses.mean(0) * (1 - self.losses.mean(0))
        most = self.losses[:, int(spread.argmax())]
        largest = float(np.bincount(np.unique(self.groups, return_inverse=True)[1]).max())
        if most.var() == 0:
            return largest
        _, error = _group_error(most, self.groups)
        return float(np.clip(error**2 / (most.var() / n), 1, largest))


def _group_error(losses: Float64s, groups: NDArray[np.intp]) -> tuple[int, float]:
    """The number of groups, and the standard error of the mean if groups are drawn as a whole."""
    _, members = np.unique(groups, return_inverse=True)
    sums = np.bincount(members, losses - losses.mean())
    count = len(sums)
    return count, float(np.sqrt((sums**2).sum() * count / max(count - 1, 1)) / len(losses))


@dataclass(frozen=True)
class OperatingPoints:
    """Operating points by rising bits."""

    assignment: NDArray[np.uint8]
    """Index of the precision of each region, (points, regions)."""
    outlook: Float64s
    """Mean bits, mean agreement and its lower bound, (points, 3)."""


def region_losses(
    regions: NDArray[np.intp], losses: Float64s, count: int, prior: float = 0.0
) -> Float64s:
    """Mean loss of every region, (count, precisions); `prior` more samples lose the average.

    A region without samples loses what all do.
    """
    total = np.zeros((count, losses.shape[1]))
    np.add.at(total, regions, losses)
    size = np.bincount(regions, minlength=count)[:, None].astype(np.float64)
    mean = losses.mean(0)
    added = np.where(size > 0, prior, 1.0)
    result: Float64s = (total + added * mean) / (size + added)
    return result


def escalate(regions: int) -> NDArray[np.uint8]:
    """Give the riskiest regions, which come first, the second precision: (regions + 1, regions)."""
    return np.tri(regions + 1, regions, -1, dtype=np.uint8)


def climb(bits: Float64s, losses: Float64s) -> NDArray[np.uint8]:
    """Climb from the cheapest precision everywhere to the dearest, the best step first.

    `bits` is (precisions,), `losses` (regions, precisions), the result (points, regions). The steps
    of a region are the edges of the convex hull of its precisions: each saves less loss per bit
    than the one before.
    """
    order = np.argsort(bits, kind="stable")
    steps = []
    for region, loss in enumerate(losses):
        place, ratio = 0, np.inf
        while place < len(order) - 1:
            here, after = order[place], order[place + 1 :]
            saved = (loss[here] - loss[after]) / np.maximum(bits[after] - bits[here], 1e-9)
            ahead = len(after) - 1 - int(saved[::-1].argmax())  # the dearest of equals
            ratio = min(ratio, float(saved[ahead]))
            place += 1 + ahead
            # Equal steps: regions in doubt come first.
            steps.append((-ratio, region, int(order[place])))
    assignment = np.full((len(steps) + 1, len(losses)), order[0], np.uint8)
    for i, (_, region, precision) in enumerate(sorted(steps, key=lambda step: step[:2]), 1):
        assignment[i:, region] = precision
    return assignment


def operating_points(
    assignment: NDArray[np.uint8], bits: Float64s, regions: NDArray[np.intp], held: HeldOut
) -> OperatingPoints:
    """Measure the assignments on held-out samples; dominated ones are left out.

    `assignment` was chosen without them, and rises in bits. A bound is the least of its own and
    those of all dearer assignments: whoever takes the cheapest point whose bound meets a target
    has then tested them in a fixed order and stopped at the first failure, so the confidence
    holds for that choice too.
    """
    rows = np.arange(len(regions))
    outlook = np.empty((len(assignment), 3))
    for i, precisions in enumerate(assignment):
        chosen = precisions[regions]
        losses = held.losses[rows, chosen]
        outlook[i] = bits[chosen].mean(), 1 - losses.mean(), 1 - held.upper(losses)
    outlook[:, 2] = np.minimum.accumulate(outlook[::-1, 2])[::-1]
    # By bits; of equal bits the one that agrees most.
    order = np.lexsort((-outlook[:, 1], outlook[:, 0]))
    kept, best = [], -1.0
    for i in order:
        if outlook[i, 1] > best:
            kept.append(i)
            best = outlook[i, 1]
    return OperatingPoints(assignment[kept], outlook[kept])
