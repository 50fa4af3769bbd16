"""How near answers come to others, as people are told: by class, or by direction."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

__all__ = ["AnswerJudge", "cosine", "holds_scores", "same_class"]

Answers = Mapping[str, NDArray[Any]]
"""Output tensors by name."""


@dataclass(frozen=True)
class AnswerJudge:
    """Compares answers as agreement of classes, or as cosine."""

    scores: str | None
    """The output that holds scores of classes; None: answers are judged by their direction."""

    @classmethod
    def of(cls, wanted: Answers) -> AnswerJudge:
        """The judge that fits these answers: by the first output that holds scores, if one does."""
        return cls(next((name for name, value in wanted.items() if holds_scores(value)), None))

    @property
    def measure(self) -> Literal["agreement", "cosine"]:
        """What `answer` gives."""
        return "cosine" if self.scores is None else "agreement"

    def answer(self, found: Answers, wanted: Answers) -> float:
        """The share of rows with the wanted class, or the mean cosine over the wanted outputs."""
        if self.scores is not None:
            return same_class(found[self.scores], wanted[self.scores])
        return float(np.mean([cosine(found[name], value) for name, value in wanted.items()]))


def holds_scores(value: NDArray[Any]) -> bool:
    """Whether the tensor has two axes and at least two columns, and is no row of embeddings.

    Rows of norm 1 are embeddings, unless they are probabilities, of which one may be sure.
    """
    if value.ndim != 2 or value.shape[1] < 2 or value.dtype.kind != "f":
        return False
    rows = value.astype(np.float64)
    if rows.min(initial=0) >= 0 and np.allclose(rows.sum(1), 1, atol=1e-3):
        return True
    return not bool(np.allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-3))


def same_class(found: NDArray[Any], wanted: NDArray[Any]) -> float:
    """The share of rows, (rows, classes) each, whose highest score is in the same column.

    A row with NaN is of no class.
    """
    numbers = ~np.isnan(found).any(1)
    return float(np.mean((found.argmax(1) == wanted.argmax(1)) & numbers))


def cosine(found: NDArray[Any], wanted: NDArray[Any]) -> float:
    """The cosine between two tensors of one size, -1 to 1; two of zeros have 1.

    Where a value is not finite it is 0: such an answer agrees in nothing.
    """
    a, b = found.astype(np.float64).ravel(), wanted.astype(np.float64).ravel()
    norms = float(np.linalg.norm(a) * np.linalg.norm(b))
    if norms == 0:
        return float(not a.any() and not b.any())
    if not np.isfinite(norms):
        return 0.0
    return float(np.clip(a @ b / norms, -1, 1))
