"""Regions of the feature space: decision trees and k-means, chosen by cross-validation."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from sklearn.isotonic import isotonic_regression
from sklearn.tree import DecisionTreeRegressor

from bapq_edge.bank.boundary import BoundaryArrays, Kind

from .features import Floats
from .folds import folds_of
from .operating_points import climb, escalate, region_losses

__all__ = [
    "LEAST_SAMPLES",
    "Partition",
    "Task",
    "choose_regions",
    "loss_left",
    "nothing_found",
    "precisions_of",
]

LEAST_SAMPLES = 20
"""Least samples that a region is fitted to: with fewer its losses are mere chance."""

_FOLDS = 4
_BANDS = (16, 12, 8, 6, 4, 2)
_TREES = ((4, 20), (8, 20), (8, 50), (16, 20), (16, 50))
"""Pairs of the number of leaves and the least samples of a leaf."""
_CLUSTERS = (4, 8, 16)
_GRID = 200
_PRIOR = 5.0
"""Samples of average loss that are added to every region: few samples without a loss do not make
it safe."""


@dataclass(frozen=True)
class Task:
    """The task of regions: losses and costs of the precisions that they choose from."""

    losses: NDArray[np.float64]
    """Loss of each sample at each precision, (n, precisions)."""
    bits: NDArray[np.float64]
    """Bits of a run at each precision, (precisions,)."""
    groups: NDArray[np.intp]
    """Group of each sample, (n,)."""
    span: tuple[float, float]
    """Bits between which a good choice of precisions is wanted."""
    seed: int
    escalates: bool = False
    """Whether the riskiest regions get the second precision, not each what is best for it."""


@dataclass(frozen=True)
class Partition:
    """Regions, as the bank stores them; numbered from the riskiest."""

    kind: Kind
    count: int
    arrays: BoundaryArrays

    def of(self, features: Floats) -> NDArray[np.intp]:
        """The region of each sample, (n,)."""
        if self.kind == "kmeans":
            scaled = features * self.arrays["scale"].astype(np.float64)
            away = np.square(scaled[:, None] - self.arrays["centers"]).sum(2)
            result: NDArray[np.intp] = away.argmin(1)
            return result
        feature, children = self.arrays["node_feature"], self.arrays["node_children"]
        rows, node = np.arange(len(features)), np.zeros(len(features), np.intp)
        while (inner := feature[node] >= 0).any():
            values = features[rows, np.maximum(feature[node], 0)].astype(np.float64)
            above = values > self.arrays["node_threshold"][node]
            node = np.where(inner, children[node, above.astype(int)], node)
        return self.arrays["node_region"][node].astype(np.intp)

    def renumbered(self, order: NDArray[np.intp]) -> Partition:
        """Number the regions anew; `order` is (count,) of old numbers."""
        arrays = dict(self.arrays)
        if self.kind == "kmeans":
            arrays["centers"] = arrays["centers"][order]
        else:
            arrays["node_region"] = np.argsort(order)[arrays["node_region"]].astype("<i4")
        return replace(self, arrays=arrays)


RegionFitter = Callable[[Floats, Task], Partition]


def choose_regions(
    features: Floats, doubt: Sequence[tuple[int, int]], task: Task
) -> tuple[Partition, float]:
    """Choose the regions that save most; returns also the loss that they leave, see `loss_left`.

    To escalate, of candidates that are equal within their standard error the first one: narrow
    bands leave the most to choose between. Elsewhere each region costs an estimate of its own.
    """
    candidates = list(_candidates(len(features), doubt))
    scores = np.array([_scores(fit, features, task) for fit in candidates])
    worse = scores - scores[scores.mean(1).argmin()]
    error = worse.std(1, ddof=1) / np.sqrt(_FOLDS) if task.escalates else 0
    chosen = int(np.argmax(worse.mean(1) <= error))
    return candidates[chosen](features, task), float(scores[chosen].mean())


def loss_left(fit: RegionFitter, features: Floats, task: Task) -> float:
    """Cross-validate: the mean `area` of folds that the regions were not fitted to."""
    return float(np.mean(_scores(fit, features, task)))


def _scores(fit: RegionFitter, features: Floats, task: Task) -> list[float]:
    folds = folds_of(task.groups, _FOLDS, task.seed)
    scores = []
    for fold in range(_FOLDS):
        here, there = folds != fold, folds == fold
        partition = fit(features[here], _rows(task, here))
        chosen = precisions_of(partition.of(features[here]), partition.count, _rows(task, here))
        scores.append(area(chosen, partition.of(features[there]), _rows(task, there)))
    return scores


def area(assignment: NDArray[np.uint8], regions: NDArray[np.intp], task: Task) -> float:
    """The mean of the logarithm of the loss over the bits of `task.span`.

    The logarithm, as it takes half the loss to be half the loss wherever the target lies.
    """
    rows, size = np.arange(len(regions)), 1 / len(regions)
    chosen = [precisions[regions] for precisions in assignment]
    bits = [float(task.bits[precisions].mean()) for precisions in chosen]
    loss = np.minimum.accumulate([task.losses[rows, precisions].mean() for precisions in chosen])
    # Bits that no assignment is as low as are left to the worst.
    worst = np.log(task.losses.mean(0).max() + size)
    grid = np.linspace(*task.span, _GRID)
    return float(np.interp(grid, bits, np.log(loss + size), left=worst).mean())


def nothing_found(features: Floats, task: Task) -> Partition:
    """Make one region of all samples."""
    zero = np.zeros(1, np.intp)
    return Partition("tree", 1, _tree_arrays(zero - 1, zero.astype(float), zero, zero, zero))


def precisions_of(regions: NDArray[np.intp], count: int, task: Task) -> NDArray[np.uint8]:
    """Assign precisions, from the cheapest everywhere to the dearest: `escalate` or `climb`."""
    if task.escalates:
        return escalate(count)
    losses = region_losses(regions, task.losses, count, _PRIOR)
    # Regions are in order of risk; what contradicts that is more likely chance.
    size = np.bincount(regions, minlength=count) + _PRIOR
    falling = [isotonic_regression(each, sample_weight=size, increasing=False) for each in losses.T]
    return climb(task.bits, np.column_stack(falling))


def _rows(task: Task, rows: NDArray[np.bool_]) -> Task:
    return replace(task, losses=task.losses[rows], groups=task.groups[rows])


def _candidates(samples: int, doubt: Sequence[tuple[int, int]]) -> Iterator[RegionFitter]:
    most = samples // LEAST_SAMPLES
    for feature, sign in doubt:
        for count in _BANDS:
            if count <= max(most, 2):  # of fewer samples there would be fewer bands
                yield lambda x, task, f=feature, s=sign, c=count: _bands(x[:, f], f, s, c)  # type: ignore[misc]
    for leaves, least in _TREES:
        if leaves <= most:
            yield lambda x, task, n=leaves, least=least: _tree(x, task, n, least)  # type: ignore[misc]
    for count in _CLUSTERS:
        if count <= most:
            yield lambda x, task, n=count: _clusters(x, task, n)  # type: ignore[misc]


def _bands(values: Floats, feature: int, sign: int, count: int) -> Partition:
    """Cut one feature into bands, as a tree; the more doubtful, the narrower."""
    ordered = np.sort(sign * values.astype(np.float64))
    n, start = len(ordered), 0
    thresholds: list[float] = []
    for i in range(1, count):
        end = max(round(n * (i / count) ** 2), start + LEAST_SAMPLES)
        if end > n - LEAST_SAMPLES:
            break
        middle = (ordered[end - 1] + ordered[end]) / 2
        if ordered[end - 1] < middle < ordered[end]:
            thresholds.append(float(middle))
            start = end
    regions = len(thresholds) + 1
    nodes: list[tuple[int, float, int, int, int]] = []

    def add(low: int, high: int) -> int:
        """Add the node of bands low to high; returns its number."""
        at = len(nodes)
        if low == high:
            nodes.append((-1, 0.0, 0, 0, low))
            return at
        nodes.append((0, 0.0, 0, 0, 0))
        middle = (low + high) // 2
        below, above = add(low, middle), add(middle + 1, high)
        threshold = thresholds[middle]
        children = (below, above) if sign > 0 else (above, below)
        nodes[at] = (feature, sign * threshold, *children, 0)
        return at

    add(0, regions - 1)
    columns = list(zip(*nodes, strict=True))
    return Partition("tree", regions, _tree_arrays(*(np.array(column) for column in columns)))


def _tree(features: Floats, task: Task, leaves: int, least: int) -> Partition:
    model = DecisionTreeRegressor(
        max_leaf_nodes=leaves, min_samples_leaf=least, random_state=task.seed
    )
    tree = model.fit(features, task.losses).tree_
    inner = tree.children_left >= 0
    feature = np.where(inner, tree.feature, -1)
    region = np.where(inner, 0, np.cumsum(~inner) - 1)
    below, above = (np.where(inner, c, 0) for c in (tree.children_left, tree.children_right))
    threshold = np.where(inner, tree.threshold, 0)
    arrays = _tree_arrays(feature, threshold, below, above, region)
    return _by_risk(Partition("tree", int((~inner).sum()), arrays), features, task)


def _clusters(features: Floats, task: Task, count: int) -> Partition:
    deviation = features.std(0, dtype=np.float64)
    scale = np.where(deviation > 0, 1 / np.maximum(deviation, 1e-30), 0).astype("<f4")
    scaled = features * scale.astype(np.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer points than clusters
        model = KMeans(count, n_init=2, random_state=task.seed).fit(scaled)
    centers = np.unique(model.cluster_centers_, axis=0)
    found = Partition("kmeans", len(centers), {"scale": scale, "centers": centers.astype("<f8")})
    return _by_risk(found, features, task)


def _by_risk(partition: Partition, features: Floats, task: Task) -> Partition:
    """Number the regions from the one that loses most at the cheapest precision."""
    losses = region_losses(partition.of(features), task.losses, partition.count, _PRIOR)
    return partition.renumbered(np.argsort(-losses[:, task.bits.argmin()], kind="stable"))


def _tree_arrays(
    feature: NDArray[np.intp],
    threshold: NDArray[np.float64],
    below: NDArray[np.intp],
    above: NDArray[np.intp],
    region: NDArray[np.intp],
) -> BoundaryArrays:
    return {
        "node_feature": feature.astype("<i4"),
        "node_threshold": threshold.astype("<f8"),
        "node_children": np.column_stack([below, above]).astype("<i4"),
        "node_region": region.astype("<i4"),
    }
