"""Runs samples through a bank at several precisions, and keeps scores alone.

One pass over the data: a sample is answered by the float model and by every session, scored, and
let go. Arrays stay in their files, of which one is open at a time.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from bapq_edge.array_files import map_arrays
from bapq_edge.bank.reader import Bank
from bapq_edge.engine.graph import RUN_INPUT
from bapq_edge.errors import (
    CalibrationArrayError,
    CalibrationError,
    CalibrationWarning,
    LabelError,
    MissingPlaneWarning,
    NoReferenceError,
)
from bapq_edge.session import Session

from ..build_support.progress import Progress
from ..calibration.float_model import open_float_model, run_graph
from ..calibration.samples import (
    CalibrationData,
    CalibrationPart,
    CalibrationSource,
    check_calibration_source,
    load_calibration,
    parts_of,
)
from ..onnx_graph.importers.onnx_file import check_model_source
from .intervals import Score, score_of
from .metrics import FLOAT, Metric, find_metric, read_metric

__all__ = ["Evaluation", "Row", "Subject", "evaluate"]

_FLOAT_ROW = "float32"


@dataclass(frozen=True)
class Subject:
    """A precision to be judged: a level, bits, or a policy."""

    name: str
    options: Mapping[str, Any]
    """What `Session` is opened with."""


@dataclass(frozen=True)
class Row:
    """What one precision was found to be worth."""

    name: str
    bits_per_weight: float
    """Mean over the runs."""
    degraded: int
    """Number of runs whose weights could not be read at their level."""
    scores: dict[str, Score]
    """By the column; the float model has none against itself."""


@dataclass(frozen=True)
class Evaluation:
    """The whole result."""

    bank: str
    digest: str
    """That of the bank."""
    samples: int
    metric: str
    reference: str | None
    """What the float model's answers are of: a file, or level 32; None: there was neither."""
    columns: list[str]
    """What answers were compared with, or the name of the user's function."""
    rows: list[Row]


def evaluate(
    bank: str | os.PathLike[str],
    data: CalibrationSource,
    subjects: Sequence[Subject],
    *,
    labels: str | None = None,
    model: str | os.PathLike[str] | None = None,
    metric: str | None = None,
    judged: str | None = None,
    threads: int | None = None,
    progress: bool = False,
) -> Evaluation:
    """Judge every subject on all samples.

    `labels` is an .npy file with one label per sample, or the name of an array that stands beside
    the inputs in the data. The float model is `model`, or else level 32 of the bank.

    Raises:
        CalibrationError: the data; see `load_calibration`.
        LabelError: labels are missing, of another number than the samples, or of no class.
        MetricError: an unknown metric, one that does not fit the outputs, or fails.
        NoReferenceError: there is nothing to compare with.
        RequestError: a precision that the bank does not have, or a model of other inputs.
    """
    asked = read_metric(metric)
    check_calibration_source(data)
    opened = Bank.open(bank)
    if model is not None:
        check_model_source(model)
    elif 32 not in opened.levels and labels is None:
        held = ", ".join(map(str, opened.levels))
        raise NoReferenceError(
            f"{opened.path} holds the levels {held} and not 32, so there is nothing to compare "
            "with: give the float model with --model MODEL.onnx, or --labels"
        )
    source = _Labels(labels)
    with contextlib.ExitStack() as stack:
        graph = onnx.load_model_from_string(opened.graph_bytes()).graph
        inputs = [item for item in graph.input if item.name != RUN_INPUT]
        names = [item.name for item in graph.output]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", MissingPlaneWarning)  # it is told already
            sessions = [
                (subject, stack.enter_context(Session(bank, **subject.options)))
                for subject in subjects
            ]
            reference = _reference(stack, opened, model, inputs, names, threads)
        parts = list(parts_of(data))
        judging = _Judging(asked, judged)
        samples = 0
        with Progress(progress).stage("evaluate", len(parts)) as advance:
            for number, part in enumerate(parts):
                loaded = source.load(part, inputs)
                if len(parts) == 1:
                    _warn_of_known_samples(opened, loaded)
                source.check_count(samples + loaded.samples, last=number == len(parts) - 1)
                for sample in range(loaded.samples):
                    feed, label = loaded.feed(sample), source.label(samples)
                    wanted = None
                    if reference is not None:
                        wanted = dict(zip(names, reference.answer(feed), strict=True))
                        judging.add(_FLOAT_ROW, wanted, wanted, label)
                    for subject, session in sessions:
                        found = dict(zip(names, session.run(names, feed), strict=True))
                        judging.add(subject.name, found, wanted, label)
                    samples += 1
                    advance(1 / loaded.samples)
        rows = []
        if reference is not None:
            scores = judging.scores(_FLOAT_ROW)
            scores.pop(FLOAT, None)  # against itself
            rows.append(Row(_FLOAT_ROW, 32.0, 0, scores))
        for subject, session in sessions:
            stats = session.stats()
            scores = judging.scores(subject.name)
            rows.append(Row(subject.name, stats.mean_bits_per_weight, stats.degraded, scores))
    return Evaluation(
        bank=str(opened.path),
        digest=opened.manifest.digest,
        samples=samples,
        metric=judging.metric.name,
        reference=None if reference is None else reference.name,
        columns=judging.metric.columns(reference is not None, labels is not None),
        rows=rows,
    )


class _Judging:
    """The scores so far, by row and column."""

    def __init__(self, asked: str | Metric | None, judged: str | None) -> None:
        self._asked = asked
        self._judged = judged
        self._metric = asked if isinstance(asked, Metric) else None
        self._scores: dict[str, dict[str, list[float]]] = {}

    @property
    def metric(self) -> Metric:
        """The one that was asked for, or that fits the first answer."""
        assert self._metric is not None
        return self._metric

    def add(self, row: str, found: Any, wanted: Any, label: Any) -> None:
        """Score an answer."""
        if self._metric is None:
            assert not isinstance(self._asked, Metric)
            self._metric = find_metric(self._asked, self._judged, found)
        columns = self._scores.setdefault(row, {})
        for column, score in self._metric.scores(found, wanted, label).items():
            columns.setdefault(column, []).append(score)

    def scores(self, row: str) -> dict[str, Score]:
        """Means and intervals of a row."""
        return {
            column: score_of(values, self.metric.share)
            for column, values in self._scores.get(row, {}).items()
        }


class _Labels:
    """One label per sample: from a file of their own, or from an array beside the inputs."""

    def __init__(self, source: str | None) -> None:
        self._name: str | None = None
        self._labels: Any = None
        self._first = 0
        """Number of the sample that the first of the labels at hand belongs to."""
        if source is None:
            return
        if Path(source).suffix not in (".npy", ".npz"):
            self._name = source
            return
        found = _read(source)
        if isinstance(found, dict):
            if len(found) != 1:
                raise LabelError(
                    f"{source} holds the arrays {', '.join(found)}: write the labels alone"
                )
            (found,) = found.values()
        self._labels = _checked_labels(source, found)

    def load(self, part: CalibrationPart, inputs: Sequence[onnx.ValueInfoProto]) -> CalibrationData:
        """The samples of a part, and with it its labels."""
        where = "the data" if isinstance(part, Mapping) else os.fspath(part)
        arrays = part if isinstance(part, Mapping) else _read(part)
        if self._name is not None:
            if not isinstance(arrays, Mapping) or self._name not in arrays:
                held = (
                    ", ".join(arrays) if isinstance(arrays, Mapping) else "one array without name"
                )
                raise LabelError(
                    f"{where} holds {held} and no labels {self._name!r}: name an array of it, or "
                    "an .npy file"
                )
            self._first += 0 if self._labels is None else len(self._labels)
            self._labels = _checked_labels(self._name, arrays[self._name])
            arrays = {name: array for name, array in arrays.items() if name != self._name}
        if isinstance(arrays, np.ndarray):
            if len(inputs) != 1:
                raise CalibrationArrayError(
                    f"{where} holds one array, the model has {len(inputs)} inputs: write an .npz "
                    "with an array for each"
                )
            arrays = {inputs[0].name: arrays}
        try:
            return load_calibration(arrays, inputs)
        except CalibrationError as error:
            raise type(error)(f"{where}: {error}") from error

    def check_count(self, samples: int, *, last: bool) -> None:
        """Raise LabelError unless there are labels for so many samples, and no more in the end."""
        if self._labels is None:
            return
        labels = self._first + len(self._labels)
        if labels < samples or ((last or self._name is not None) and labels != samples):
            raise LabelError(
                f"there are {labels} labels for {samples} samples: give each sample one"
            )

    def label(self, sample: int) -> Any:
        """That of a sample, counted through all parts; None without labels."""
        return None if self._labels is None else self._labels[sample - self._first]


def _read(path: str | os.PathLike[str]) -> Any:
    try:
        return map_arrays(path)
    except ValueError as error:
        raise CalibrationError(str(error)) from error


def _checked_labels(name: str, labels: Any) -> Any:
    labels = np.asarray(labels)
    if labels.ndim == 0:
        raise LabelError(f"labels {name} are a single value: give one per sample")
    return labels


@dataclass(frozen=True)
class _Reference:
    """The float model, wherever it comes from."""

    name: str
    answer: Callable[[Mapping[str, Any]], list[Any]]
    """Outputs for a feed, in the order of the bank's."""


def _reference(
    stack: contextlib.ExitStack,
    bank: Bank,
    model: str | os.PathLike[str] | None,
    inputs: Sequence[onnx.ValueInfoProto],
    outputs: Sequence[str],
    threads: int | None,
) -> _Reference | None:
    if model is not None:
        name = os.fspath(model)
        session = open_float_model(model, [item.name for item in inputs], outputs)
        return _Reference(name, lambda feed: run_graph(session, outputs, feed, name))
    if 32 not in bank.levels:
        return None
    opened = stack.enter_context(Session(bank.path, level=32, threads=threads))
    return _Reference("level 32 of the bank", partial(opened.run, outputs))


def _warn_of_known_samples(bank: Bank, data: CalibrationData) -> None:
    built_with = bank.manifest.calibration
    if built_with is not None and built_with.blake2b == data.blake2b:
        warnings.warn(
            f"{bank.path} was built with these very samples, so low levels may do better on them "
            "than on others: give samples that it has not seen",
            CalibrationWarning,
            stacklevel=3,
        )
