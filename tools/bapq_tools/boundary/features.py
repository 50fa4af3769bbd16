"""Features: a tensor, pooled and projected to a few values that tell inputs apart."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import log_loss

from bapq_edge.adaptive.boundary_model import score_features
from bapq_edge.bank.boundary import MAX_FEATURES, Scores
from bapq_edge.errors import NoTapError

from .folds import folds_of

__all__ = ["Probe", "Projection", "class_probe", "loss_probe", "own_scores", "pool_of"]

MOST_VALUES = 4096
"""Most values after pooling: their projection to 64 features is 1 MB."""

_COMPONENTS = 96
"""Number of principal components that a probe sees: with some hundred samples more are noise."""

_KEPT_COMPONENTS = 8
"""Number of them that regions may be found from directly."""

_CLASS_PENALTIES = (0.03, 0.3, 3.0)
_LOSS_PENALTIES = (1.0, 10.0, 100.0, 1000.0)
_FOLDS = 4
_LEAST_OF_CLASS = 5

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Projection:
    """A linear map from pooled values to features."""

    center: Floats
    matrix: Floats
    offset: Floats
    scores: Scores
    doubt: tuple[tuple[int, int], ...]
    """Pairs of feature and sign: where sign times the feature is low, the input is in doubt."""

    def features(self, values: Floats) -> Floats:
        """Map (n, values) to (n, features), with margin and entropy where the values are scores."""
        z: NDArray[Any] = (values - self.center) @ self.matrix + self.offset
        return score_features(z, self.scores)


@dataclass(frozen=True)
class Probe:
    """A projection, with the features of the samples that it was fitted to.

    Where something was fitted they are out of fold: as of samples that it was not fitted to.
    """

    projection: Projection
    features: Floats


def pool_of(shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """Find the lengths that the axes after the first are averaged down to, for these shapes.

    An axis of changing length becomes 1. Of the others those of positions are halved before those
    of channels, which are the last axis of three, and the second of more.
    """
    inner = [shape[1:] for shape in shapes]
    pool = [lengths[0] if len(set(lengths)) == 1 else 1 for lengths in zip(*inner, strict=True)]
    channel = 0 if len(pool) > 2 else len(pool) - 1
    while int(np.prod(pool)) > MOST_VALUES:
        positions = [i for i in range(len(pool)) if i != channel and pool[i] > 1]
        axis = max(positions, key=lambda i: pool[i]) if positions else channel
        pool[axis] = -(-pool[axis] // 2)
    return tuple(pool)


def own_scores(values: Floats, scores: Scores, wanted: NDArray[np.intp]) -> Probe:
    """Take class scores as they are; of very many classes, those that answers are often near to."""
    _check_unlike(values)
    classes = values.shape[1]
    chosen = np.arange(classes)
    if classes > MAX_FEATURES:
        near = np.argsort(-values, axis=1)[:, :2]
        often = np.bincount(np.append(near, wanted), minlength=classes)
        chosen = np.sort(np.argsort(-often, kind="stable")[:MAX_FEATURES])
    matrix = np.zeros((classes, len(chosen)), np.float32)
    matrix[chosen, np.arange(len(chosen))] = 1
    zero = np.zeros(len(chosen), np.float32)
    projection = Projection(
        np.zeros(classes, np.float32), matrix, zero, scores, _margin(len(chosen))
    )
    return Probe(projection, projection.features(values))


def class_probe(
    values: Floats, wanted: NDArray[np.intp], groups: NDArray[np.intp], seed: int
) -> Probe:
    """Fit a logistic regression of the reference's class on the values.

    Its penalty is that of the least cross-validated log loss. Classes of which there are fewer
    than five samples are left out: inputs of them will look doubtful.
    """
    basis = _Basis(values, seed)
    often = np.bincount(wanted)
    classes = np.argsort(-often, kind="stable")[: min((often >= _LEAST_OF_CLASS).sum(), 256)]
    known = np.isin(wanted, classes)
    if len(classes) < 2:
        raise NoTapError(
            f"{len(classes)} classes have {_LEAST_OF_CLASS} or more samples to fit to, a probe "
            "needs 2: give more samples"
        )
    classes.sort()
    folds = folds_of(groups, _FOLDS, seed)

    def fit(rows: NDArray[np.bool_], penalty: float) -> tuple[NDArray[Any], NDArray[Any]]:
        model = LogisticRegression(C=penalty, max_iter=500, tol=1e-3)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # near enough for a probe
            model.fit(basis.z[rows & known], wanted[rows & known])
        weight, offset = model.coef_, model.intercept_
        if len(model.classes_) == 2:  # one row, for the second class
            weight, offset = np.vstack([-weight / 2, weight / 2]), np.append(-offset, offset) / 2
        # A class that is in no sample of a fold gets the lowest score.
        full = np.zeros((len(classes), weight.shape[1]))
        low = np.full(len(classes), offset.min() - 10)
        at = np.searchsorted(classes, model.classes_)
        full[at], low[at] = weight, offset
        return full, low

    def out_of_fold(penalty: float) -> NDArray[Any]:
        z = np.empty((len(values), len(classes)))
        for fold in range(_FOLDS):
            weight, offset = fit(folds != fold, penalty)
            z[folds == fold] = basis.z[folds == fold] @ weight.T + offset
        return z

    tried = {penalty: out_of_fold(penalty) for penalty in _CLASS_PENALTIES}
    at = np.searchsorted(classes, wanted[known])
    losses = {
        c: log_loss(at, _softmax(z[known]), labels=range(len(classes))) for c, z in tried.items()
    }
    best = min(losses, key=losses.__getitem__)
    weight, offset = fit(np.ones(len(values), bool), best)
    projection = basis.projection(weight.T, offset, "logits", _margin(len(classes)))
    return Probe(projection, score_features(tried[best].astype(np.float32), "logits"))


def loss_probe(
    values: Floats, losses: NDArray[np.float64], groups: NDArray[np.intp], seed: int
) -> Probe:
    """Fit a ridge regression of the losses, (n, precisions); its features end with components.

    The estimates are of the losses' square roots, which have no such long tail.
    """
    basis = _Basis(values, seed)
    wanted = np.sqrt(losses)
    folds = folds_of(groups, _FOLDS, seed)

    def fit(rows: NDArray[np.bool_], penalty: float) -> tuple[NDArray[Any], NDArray[Any]]:
        model = Ridge(alpha=penalty).fit(basis.z[rows], wanted[rows])
        return model.coef_.reshape(wanted.shape[1], -1), np.atleast_1d(model.intercept_)

    def out_of_fold(penalty: float) -> NDArray[Any]:
        z = np.empty(wanted.shape)
        for fold in range(_FOLDS):
            weight, offset = fit(folds != fold, penalty)
            z[folds == fold] = basis.z[folds == fold] @ weight.T + offset
        return z

    tried = {penalty: out_of_fold(penalty) for penalty in _LOSS_PENALTIES}
    best = min(tried, key=lambda penalty: float(np.square(tried[penalty] - wanted).mean()))
    weight, offset = fit(np.ones(len(values), bool), best)
    kept = min(_KEPT_COMPONENTS, basis.z.shape[1])
    matrix = np.hstack([weight.T, np.eye(basis.z.shape[1], kept)])
    doubt = tuple((i, -1) for i in range(wanted.shape[1]))
    projection = basis.projection(matrix, np.append(offset, np.zeros(kept)), "none", doubt)
    features = np.hstack([tried[best], basis.z[:, :kept]])
    return Probe(projection, features.astype(np.float32))


class _Basis:
    """The values in their principal components, with a variance of 1 on average."""

    def __init__(self, values: Floats, seed: int) -> None:
        _check_unlike(values)
        most = min(_COMPONENTS, len(values) - 1, values.shape[1])
        pca = PCA(most, svd_solver="full" if values.shape[1] <= 512 else "randomized")
        pca.set_params(random_state=seed).fit(values.astype(np.float64))
        kept = pca.explained_variance_ > 1e-9 * pca.explained_variance_[0]
        self._center = pca.mean_
        scale = np.sqrt(pca.explained_variance_[kept].mean())
        self._axes = pca.components_[kept].T / scale
        self.z = (values - self._center) @ self._axes

    def projection(
        self,
        matrix: NDArray[Any],
        offset: NDArray[Any],
        scores: Scores,
        doubt: tuple[tuple[int, int], ...],
    ) -> Projection:
        parts = (self._center, self._axes @ matrix, offset)
        center, whole, moved = (np.ascontiguousarray(part, np.float32) for part in parts)
        return Projection(center, whole, moved, scores, doubt)


def _check_unlike(values: Floats) -> None:
    if not np.ptp(values, axis=0).any():
        raise NoTapError(
            f"all {len(values)} samples have the same features: check that they differ"
        )


def _margin(classes: int) -> tuple[tuple[int, int], ...]:
    return ((classes, 1),)


def _softmax(z: NDArray[Any]) -> NDArray[np.float64]:
    shifted = np.exp(z - z.max(1, keepdims=True))
    result: NDArray[np.float64] = shifted / shifted.sum(1, keepdims=True)
    return result
