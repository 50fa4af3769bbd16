"""Scores of one answer: against the float model's, against a label, or by a function of the user's.

A metric gives for every sample one score by the column that it stands in.
"""

from __future__ import annotations

import importlib.util
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bapq_edge.answers import AnswerJudge, cosine, holds_scores, same_class
from bapq_edge.errors import EvaluationError, LabelError, MetricError
from bapq_edge.input_files import check_input_file

__all__ = ["BUILT_IN", "FLOAT", "LABELS", "Metric", "find_metric", "read_metric"]

FLOAT, LABELS = "float model", "labels"
"""Columns: what the answers are compared with."""

Outputs = Mapping[str, Any]
UserFunction = Callable[[dict[str, Any], dict[str, Any] | None, Any], float]

BUILT_IN = ("top1", "cosine", "iou")
"""Metrics by name: each is 1 at best."""

_OWN = "or give a function of your own, --metric FILE.py:FUNCTION"


class Metric(ABC):
    """Scores answers sample by sample."""

    name: str
    share = False
    """Whether a mean of scores of 0 and 1 is a share of samples that are right."""

    @abstractmethod
    def columns(self, with_float: bool, with_labels: bool) -> list[str]:
        """The columns that `scores` fills, given what there is to compare with."""

    @abstractmethod
    def scores(self, found: Outputs, wanted: Outputs | None, label: Any) -> dict[str, float]:
        """The scores of one sample; `wanted` and `label` are None where there is none.

        Raises EvaluationError for outputs of another shape than the wanted ones, LabelError for a
        label that does not fit the output, MetricError.
        """


@dataclass(frozen=True)
class _BuiltIn(Metric):
    """Compares an output, or all of them, with its like."""

    name: str
    outputs: Sequence[str]
    share: bool = False

    def columns(self, with_float: bool, with_labels: bool) -> list[str]:
        return [FLOAT] * with_float + [LABELS] * with_labels

    def scores(self, found: Outputs, wanted: Outputs | None, label: Any) -> dict[str, float]:
        scores = {}
        if wanted is not None:
            for name in self.outputs:
                if found[name].shape != wanted[name].shape:
                    raise EvaluationError(
                        f"output {name!r} has shape {found[name].shape} in the bank and "
                        f"{wanted[name].shape} in the float model: give the model that the bank "
                        "was built from"
                    )
            each = [_LIKE[self.name](found[name], wanted[name]) for name in self.outputs]
            scores[FLOAT] = float(np.mean(each))
        if label is not None:
            if len(self.outputs) > 1:
                raise LabelError(
                    f"labels belong to one output, the model has {', '.join(self.outputs)}: name "
                    "it with --judge"
                )
            value = np.asarray(found[self.outputs[0]])
            scores[LABELS] = _LABELLED[self.name](value, np.asarray(label))
        return scores


@dataclass(frozen=True)
class _User(Metric):
    """Calls `function(outputs, wanted, label)`."""

    name: str
    function: UserFunction
    share: bool = True

    def columns(self, with_float: bool, with_labels: bool) -> list[str]:
        return [self.name]

    def scores(self, found: Outputs, wanted: Outputs | None, label: Any) -> dict[str, float]:
        try:
            score = float(
                self.function(dict(found), None if wanted is None else dict(wanted), label)
            )
        except Exception as error:  # whatever the user's code raises
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise MetricError(f"the metric {self.name} failed: {reason}") from error
        if not math.isfinite(score):
            raise MetricError(f"the metric {self.name} gave {score}: give a finite number")
        return {self.name: score}


def read_metric(text: str | None) -> str | Metric | None:
    """The metric's name, or the one in a file of the user's, loaded; None: by the outputs.

    Raises MetricError, InputFileError.
    """
    if text is None or text in BUILT_IN:
        return text
    path, _, name = text.rpartition(":")
    if not path.endswith(".py") or not name:
        raise MetricError(f"metric {text!r} is unknown: choose {', '.join(BUILT_IN)}, {_OWN}")
    check_input_file(path)
    spec = importlib.util.spec_from_file_location(Path(path).stem, os.path.abspath(path))
    assert spec is not None and spec.loader is not None  # as the name ends in .py
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the user's code raises
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise MetricError(f"{path} cannot be loaded: {reason}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise MetricError(
            f"{path} has no function {name!r}: write def {name}(outputs, wanted, label)"
        )
    return _User(name, function)


def find_metric(name: str | None, judged: str | None, answers: Outputs) -> Metric:
    """A built-in metric for outputs that look like these; `judged` names the one that counts.

    Without a name it is "top1" where an output holds scores of classes, else "cosine". Raises
    MetricError.
    """
    if judged is not None and judged not in answers:
        raise MetricError(f"output {judged!r} is unknown: the model has {', '.join(answers)}")
    there = {key: value for key, value in answers.items() if judged in (None, key)}
    arrays = {key: value for key, value in there.items() if isinstance(value, np.ndarray)}
    if name is None:
        floats = {key: value for key, value in arrays.items() if value.dtype.kind == "f"}
        name = "cosine" if AnswerJudge.of(floats).scores is None else "top1"
    fits = [key for key, value in arrays.items() if _FITS[name](value)]
    if not fits:
        shapes = ", ".join(f"{key} {list(np.shape(value))}" for key, value in there.items())
        raise MetricError(f"{name} needs {_NEEDS[name]}, there is {shapes}: choose another, {_OWN}")
    if name == "cosine":
        return _BuiltIn(name, fits)
    scored = [key for key in fits if holds_scores(arrays[key])] or fits
    return _BuiltIn(name, scored[:1], share=name == "top1")


# ---- the built-in ones ----


def _top1_labelled(found: NDArray[Any], label: NDArray[Any]) -> float:
    _check_label(label, len(found), found.shape[1])
    return float(np.mean(_classes(found) == label.ravel()))


def _classes(scores: NDArray[Any]) -> NDArray[np.intp]:
    """Class of every row, or of every place; -1 where a score is no number."""
    return np.where(np.isnan(scores).any(1), -1, scores.argmax(1))


def _cosine_labelled(found: NDArray[Any], label: NDArray[Any]) -> float:
    if label.size != found.size or label.dtype.kind not in "fiu":
        raise LabelError(
            f"a label is {label.dtype} of shape {label.shape}, the output has {found.shape}: "
            "cosine needs as many numbers"
        )
    return cosine(found, label)


def _iou(found: NDArray[Any], wanted: NDArray[Any]) -> float:
    return _overlap(_map(found), _map(wanted))


def _iou_labelled(found: NDArray[Any], label: NDArray[Any]) -> float:
    places = _map(found)
    _check_label(label, places.size, found.shape[1] if found.dtype.kind == "f" else None)
    return _overlap(places, label.reshape(places.shape))


def _map(value: NDArray[Any]) -> NDArray[Any]:
    """The class of every place."""
    return _classes(value) if value.dtype.kind == "f" else value


def _overlap(found: NDArray[Any], wanted: NDArray[Any]) -> float:
    """Intersection over union, mean over the classes that are in either map."""
    shares = []
    for number in np.union1d(found, wanted):
        a, b = found == number, wanted == number
        shares.append(np.count_nonzero(a & b) / np.count_nonzero(a | b))
    return float(np.mean(shares))


def _check_label(label: NDArray[Any], size: int, classes: int | None) -> None:
    if label.size != size or label.dtype.kind not in "iub":
        raise LabelError(
            f"a label is {label.dtype} of shape {label.shape}, the output needs {size} whole "
            "numbers: the classes"
        )
    if classes is not None and not ((label >= 0) & (label < classes)).all():
        raise LabelError(
            f"labels reach from {label.min()} to {label.max()}, the output has the classes 0 to "
            f"{classes - 1}: number them as the model does"
        )


_LIKE: dict[str, Callable[[NDArray[Any], NDArray[Any]], float]] = {
    "top1": same_class,
    "cosine": cosine,
    "iou": _iou,
}
_LABELLED: dict[str, Callable[[NDArray[Any], NDArray[Any]], float]] = {
    "top1": _top1_labelled,
    "cosine": _cosine_labelled,
    "iou": _iou_labelled,
}
_FITS: dict[str, Callable[[NDArray[Any]], bool]] = {
    "top1": lambda value: value.ndim == 2 and value.shape[1] >= 2 and value.dtype.kind == "f",
    "cosine": lambda value: value.dtype.kind == "f",
    "iou": lambda value: value.ndim >= 3 and (value.dtype.kind in "iub" or value.shape[1] >= 2),
}
_NEEDS = {
    "top1": "an output of scores, (rows, classes)",
    "cosine": "an output of floats",
    "iou": "an output of scores, (rows, classes, height, width), or a map of whole numbers",
}
