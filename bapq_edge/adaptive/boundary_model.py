"""Boundary models on the device: from a tensor to its region, with NumPy alone.

The format, and what each array means, is in bank/boundary.py and docs/explanation/boundary.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..bank.boundary import Boundary, BoundaryArrays, Precision, Scores
from ..bank.reader import Bank
from ..errors import RequestError, RunInputError

__all__ = ["BoundaryModel", "OperatingPoint", "pooled", "score_features"]

_LEAST_PROBABILITY = np.float32(1e-30)
_LEAST_LOGIT = np.float32(-80)
"""Below the highest: e to this is no part of a sum, and still a number."""

DEFAULT_AGREEMENT = 0.99
"""Target where neither a target nor bits are asked for, as far as the bank can state it."""


@dataclass(frozen=True)
class OperatingPoint:
    """A precision for every region, and what comes of it."""

    precisions: tuple[Precision, ...]
    """A precision for every region."""
    bits: float
    """Mean weight bits read per weight and run, over the regions as calibration saw them."""
    agreement: float
    """Mean agreement with the float model on samples held out from the fit."""
    agreement_bound: float
    """Lower bound of the agreement, at the model's confidence."""


def pooled(tap: NDArray[Any], pool: Sequence[int]) -> NDArray[np.float32]:
    """(n, ...) -> (n, values) float32: every axis but the first averaged down to its length."""
    values = np.asarray(tap, np.float32)
    for axis, count in enumerate(pool, 1):
        length = values.shape[axis]
        if length == count:
            continue
        edges = np.rint(np.linspace(0, length, count + 1)).astype(np.intp)
        shape = [1] * values.ndim
        shape[axis] = count
        sums = np.add.reduceat(values, edges[:-1], axis)
        lengths = np.diff(edges).astype(np.float32).reshape(shape)
        values = np.asarray(sums / lengths, np.float32)
    return values.reshape(len(values), math.prod(values.shape[1:]))


def score_features(projected: NDArray[np.float32], scores: Scores) -> NDArray[np.float32]:
    """(n, scores) -> (n, scores + 2): their margin and entropy added; others stay as they are."""
    if scores == "none":
        return projected
    if scores == "probabilities":
        projected = np.log(np.maximum(projected, _LEAST_PROBABILITY))
    top = np.partition(projected, -2, axis=1)
    highest = top[:, -1:]
    below = np.maximum(projected - highest, _LEAST_LOGIT)
    power = np.exp(below)
    total = power.sum(1, keepdims=True)
    entropy = np.log(total) - (power * below).sum(1, keepdims=True) / total
    return np.concatenate([projected, highest - top[:, -2:-1], entropy], 1, dtype=np.float32)


class BoundaryModel:
    """One boundary model of a bank, ready to find regions. Safe to use from several threads."""

    def __init__(self, description: Boundary, arrays: BoundaryArrays) -> None:
        """`arrays` are those of `Boundary.shapes`, checked."""
        self.description = description
        self.region_shares: NDArray[np.float32] = arrays["mix"]
        """(regions,): share of the samples of calibration that fell into each."""
        self._arrays = arrays
        # Walking plain lists takes a third of the time of indexing arrays.
        self._tree: tuple[list[Any], ...] | None = None
        if description.kind == "tree":
            names = ("feature", "threshold", "children", "region")
            self._tree = tuple(arrays[f"node_{name}"].tolist() for name in names)
        else:
            self._scale = arrays["scale"].astype(np.float64)

    @classmethod
    def of(cls, bank: Bank, description: Boundary) -> BoundaryModel:
        """Read the arrays of a model in the bank's manifest."""
        return cls(description, bank.boundary_arrays(description))

    # ---- from a tensor to its region ----

    def features(self, tap: NDArray[Any]) -> NDArray[np.float32]:
        """(n, features) float32 of a tap (n, ...).

        Raises RunInputError where the tap has not the axes that the model pools.
        """
        arrays = self._arrays
        values = self.values(tap) - arrays["center"]
        projected = values @ arrays["projection"] + arrays["offset"]
        return score_features(projected, self.description.scores)

    def values(self, tap: NDArray[Any]) -> NDArray[np.float32]:
        """(n, values) float32: every axis but the first averaged down to its length in `pool`."""
        pool = self.description.pool
        fits = tap.ndim == len(pool) + 1
        if not fits or any(a < b for a, b in zip(tap.shape[1:], pool, strict=True)):
            raise RunInputError(
                f"tensor {self.description.tap} is {tap.shape}, boundary model "
                f"{self.description.name} needs (n, ...) with axes of at least {pool}"
            )
        return pooled(tap, pool)

    def regions(self, features: NDArray[np.float32]) -> NDArray[np.intp]:
        """(n,): region of each row of features; for a tree exactly scikit-learn's leaf."""
        if self._tree is None:
            scaled = features * self._scale
            distance = np.square(scaled[:, None] - self._arrays["centers"]).sum(2)
            return np.asarray(distance.argmin(1))
        feature, threshold, children, region = self._tree
        found = np.empty(len(features), np.intp)
        for i, row in enumerate(features.tolist()):
            node = 0
            while (column := feature[node]) >= 0:
                node = children[node][row[column] > threshold[node]]
            found[i] = region[node]
        return found

    def regions_of(self, tap: NDArray[Any]) -> NDArray[np.intp]:
        """(n,): region of each sample of a run's input. What is no number is most in doubt."""
        with np.errstate(over="ignore", invalid="ignore"):
            features = self.features(tap)
        known = np.isfinite(features).all(1)
        found = np.zeros(len(features), np.intp)
        found[known] = self.regions(features[known])
        return found

    def region_of(self, tap: NDArray[Any]) -> int:
        """Region of a run's input: of several samples the one most in doubt decides."""
        return self.most_in_doubt(self.regions_of(tap))

    def most_in_doubt(self, regions: NDArray[np.intp]) -> int:
        """The region that decides for all; without a sample the one least in doubt."""
        return int(regions.min()) if len(regions) else len(self.region_shares) - 1

    # ---- what a region is run at ----

    @property
    def points(self) -> list[OperatingPoint]:
        """All operating points, by rising bits."""
        precisions, assignment = self.description.precisions, self._arrays["assignment"]
        return [
            OperatingPoint(tuple(precisions[w] for w in row), *map(float, outlook))
            for row, outlook in zip(assignment.tolist(), self._arrays["outlook"], strict=True)
        ]

    def point(
        self, target_agreement: float | None = None, bits: float | None = None
    ) -> OperatingPoint:
        """The point of fewest bits that keeps the target; or the best of at most so many bits.

        Raises RequestError where there is none.
        """
        points, name = self.points, self.description.name
        if target_agreement is None and bits is None:
            best = max(point.agreement_bound for point in points)
            target_agreement = min(DEFAULT_AGREEMENT, best)
        if bits is not None:
            points = [point for point in points if point.bits <= bits]
            if not points:
                least = min(point.bits for point in self.points)
                raise RequestError(
                    f"{bits:g} bits are asked for, boundary model {name} needs {least:.3g} on "
                    "average: ask for more"
                )
        if target_agreement is None:
            return max(points, key=lambda point: (point.agreement, -point.bits))
        good = [point for point in points if point.agreement_bound >= target_agreement]
        if not good:
            best = max(point.agreement_bound for point in points)
            raise RequestError(
                f"target_agreement {target_agreement:g} is asked for, boundary model {name} can "
                f"state {best:.4f} at most: ask for that, or fit with more samples"
            )
        return min(good, key=lambda point: point.bits)

    def share_of(self, point: OperatingPoint) -> Mapping[Precision, float]:
        """Share of the inputs, as calibration saw them, that the point runs at each precision."""
        shares: dict[Precision, float] = {}
        for precision, share in zip(point.precisions, self.region_shares.tolist(), strict=True):
            shares[precision] = shares.get(precision, 0.0) + share
        return shares
