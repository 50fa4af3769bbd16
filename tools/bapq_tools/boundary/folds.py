"""Splits samples; those of one group never stand on both sides."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["folds_of", "held_out"]


def folds_of(groups: NDArray[np.intp], folds: int, seed: int) -> NDArray[np.intp]:
    """Number the fold of each sample, (n,); folds are of about equal sizes."""
    names, members = np.unique(groups, return_inverse=True)
    order = np.random.default_rng(seed).permutation(len(names))
    fold_of = np.empty(len(names), np.intp)
    fold_of[order] = np.arange(len(names)) % folds
    return fold_of[members]


def held_out(groups: NDArray[np.intp], seed: int) -> NDArray[np.bool_]:
    """Choose about half of the samples, (n,)."""
    return np.equal(folds_of(groups, 2, seed), 1)
