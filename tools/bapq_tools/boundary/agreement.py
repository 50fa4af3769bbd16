"""Judges whether answers agree with those of the reference."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bapq_edge.answers import cosine
from bapq_edge.bank.boundary import Agreement, Scores
from bapq_edge.errors import BoundaryError, RequestError

__all__ = ["Judge", "find_judge", "parse_agreement"]

Outputs = Sequence[NDArray[Any]]
"""One array per sample, (1, ...)."""


@dataclass(frozen=True)
class Judge:
    """How answers are compared."""

    output: str
    kind: Agreement
    tolerance: float = 0.0
    """Largest difference of a value, for the kind "tolerance"."""
    scores: Scores = "none"
    """What the output holds, for the kind "argmax"."""

    def __str__(self) -> str:
        """Describe the comparison for people."""
        limit = f" of {self.tolerance:g}" if self.kind == "tolerance" else ""
        return f"{self.kind}{limit} of output {self.output!r}"

    @property
    def binary(self) -> bool:
        """Whether an answer agrees or does not, with nothing between."""
        return self.kind != "cosine"

    def classes(self, outputs: Outputs) -> NDArray[np.intp]:
        """The class with the highest score, (n,); -1 where a score is no number."""
        return np.array([-1 if np.isnan(found).any() else found.argmax() for found in outputs])

    def agreement(self, found: Outputs, wanted: Outputs) -> NDArray[np.float64]:
        """Compare answers sample by sample: (n,), from 0 to 1."""
        if self.kind == "argmax":
            return np.array(self.classes(found) == self.classes(wanted), np.float64)
        pairs = zip(found, wanted, strict=True)
        if self.kind == "cosine":
            return np.array([max(cosine(a, b), 0.0) for a, b in pairs])
        return np.array([float(np.abs(a - b).max(initial=0) <= self.tolerance) for a, b in pairs])


def parse_agreement(text: str | None) -> tuple[Agreement | None, float]:
    """Read `argmax`, `cosine` or `tolerance:X` as kind and tolerance; raises RequestError."""
    kind, _, limit = (text or "").partition(":")
    try:
        if text is None:
            return None, 0.0
        if kind == "tolerance" and 0 <= float(limit) < math.inf:
            return "tolerance", float(limit)
    except ValueError:
        pass
    if kind in ("argmax", "cosine") and text == kind:
        return ("argmax" if kind == "argmax" else "cosine"), 0.0
    raise RequestError(f"agreement {text!r} is unknown: choose argmax, cosine or tolerance:X")


def find_judge(
    references: Mapping[str, Outputs], agreement: str | None = None, output: str | None = None
) -> Judge:
    """Find the output that is judged and how, from the reference's answers by output.

    An output with numbers of two axes and at least two columns holds class scores and is judged by
    its arg-max, unless its rows have norm 1; those, and outputs of more axes, by their cosine.

    Raises RequestError where several outputs could be judged, or what was asked for does not fit,
    BoundaryError where the rule finds no kind, or an answer holds NaN or infinity.
    """
    kind, tolerance = parse_agreement(agreement)
    floats = [name for name, found in references.items() if found[0].dtype.kind == "f"]
    if output is not None and output not in references:
        raise RequestError(
            f"output {output!r} is unknown: the model has {', '.join(map(repr, references))}"
        )
    if output is None:
        if len(floats) != 1:
            raise RequestError(
                f"the model has {len(floats)} outputs of floats ({', '.join(floats) or 'none'}): "
                "name the one that is judged with --judge"
            )
        output = floats[0]
    found = references[output]
    if output not in floats:
        raise RequestError(
            f"output {output!r} holds {found[0].dtype}, only floats can be judged: name another"
        )
    for sample, array in enumerate(found):
        if not np.isfinite(array).all():
            raise BoundaryError(
                f"the reference's output {output!r} holds NaN or infinity for sample {sample}: "
                "leave that sample out"
            )
    shape = found[0].shape
    if len(shape) == 0 or any(len(array) != 1 for array in found):
        raise BoundaryError(
            f"output {output!r} has shape {shape} for one sample: a boundary model decides input "
            "by input, so the first axis must have length 1; export the model with a free one"
        )
    scored = len(shape) == 2 and shape[1] >= 2
    scores = _scores_of(found) if scored else "none"
    if kind is None:
        if scored:
            kind = "cosine" if scores == "none" else "argmax"
        elif len(shape) > 2:
            kind = "cosine"
        else:
            raise BoundaryError(
                f"output {output!r} has shape {shape}, which is no row of class scores: say with "
                "--agreement tolerance:X how far a value may be off"
            )
    if kind == "argmax":
        if not scored:
            raise RequestError(
                f"output {output!r} has shape {shape}, an arg-max needs (1, classes): choose "
                "--agreement cosine or tolerance:X"
            )
        return Judge(output, kind, scores="logits" if scores == "none" else scores)
    return Judge(output, kind, tolerance)


def _scores_of(found: Outputs) -> Scores:
    """Tell what rows of class scores are; "none" where they are embeddings of norm 1."""
    rows = np.concatenate(found).astype(np.float64)
    if rows.min() >= 0 and np.allclose(rows.sum(1), 1, atol=1e-3):
        return "probabilities"
    return "none" if np.allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-3) else "logits"
