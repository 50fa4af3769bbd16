"""Fits boundary models: half of the samples find features and regions, the others measure them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from bapq_edge.adaptive.boundary_model import BoundaryModel
from bapq_edge.bank.boundary import (
    Boundary,
    BoundaryArrays,
    Precision,
    Stage,
    StaticPoint,
)
from bapq_edge.errors import (
    BoundaryWarning,
    NoTapError,
    RequestError,
    SingleClassError,
    TooFewSamplesError,
)

from .features import Floats, Probe, class_probe, loss_probe, own_scores
from .fitted_model import FittedModel
from .folds import held_out
from .operating_points import HeldOut, operating_points, region_losses
from .precisions import gate_precisions
from .regions import (
    LEAST_SAMPLES,
    Partition,
    Task,
    choose_regions,
    loss_left,
    nothing_found,
    precisions_of,
)
from .report import StaticReport
from .study import Study, Tap
from .taps import Cut

__all__ = ["ModelFitter"]

_LEAST_GROUPS = 8
"""Least number on both sides of the split: folds of one group would say nothing of others."""

_STATIC_BITS = (32.0, 8.0, 6.0, 5.0, 4.5, 4.0, 3.5, 3.0, 2.5, 2.0, 1.5, 1.0)
"""Plans for all inputs that are tried, in this order."""

_MOST_CUTS = 3
"""Most cuts that are tried: each is run over all samples, at two precisions."""


@dataclass(frozen=True)
class _GateCandidate:
    """A gate, before it is measured."""

    tap: Tap
    base: Precision
    cut: Cut | None
    bits: NDArray[np.float64]
    """Bits of a run at each precision, (precisions,)."""
    probe: Probe
    partition: Partition
    left: float
    """The loss that is left, as `choose_regions` has it."""


class ModelFitter:
    """The samples of one fit, and the models that they give."""

    def __init__(self, study: Study, rows: NDArray[np.intp], confidence: float, seed: int) -> None:
        """Split the samples; raises TooFewSamplesError, SingleClassError, BoundaryError."""
        self._study, self._confidence, self._seed = study, confidence, seed
        last = held_out(study.groups[rows], seed)
        self._own, self._rest = rows[~last], rows[last]
        _check_enough(study.groups[self._own], study.groups[self._rest])
        if study.judge.kind == "argmax":
            classes = np.unique(study.classes[rows])
            if len(classes) == 1:
                raise SingleClassError(
                    f"the reference answers class {classes[0]} to all {len(rows)} samples: give "
                    "samples of every class that the application meets"
                )
        self._precisions = gate_precisions(study.bank, study.runner)
        self._bits = np.array([study.runner.bits(precision) for precision in self._precisions])
        self._losses = np.column_stack([study.losses(precision) for precision in self._precisions])
        self.held = self._held(self._losses)

    def static(self) -> list[StaticReport]:
        """Measure all inputs at one precision, for each precision of the gate."""
        return [
            StaticReport(
                str(precision), bits, 1 - float(losses.mean()), 1 - self.held.upper(losses)
            )
            for precision, bits, losses in zip(
                self._precisions, self._bits.tolist(), self.held.losses.T, strict=True
            )
        ]

    def static_points(self, target: float) -> list[StaticPoint]:
        """Plans for all inputs, from the highest level down to the first that misses the target.

        A bound is the least of its own and those of all plans before: whoever takes the last that
        keeps the target has tested them in a fixed order and stopped at the first failure.
        """
        study, tried, bound = self._study, set(), 1.0
        points: list[StaticPoint] = []
        levels = study.bank.levels[1 if study.bank.levels[0] == 32 else 0 :] or (32,)
        for bits in (bits for bits in _STATIC_BITS if min(levels) <= bits <= max(levels)):
            precision = Precision(int(bits)) if bits in levels else Precision(bits=bits)  # type: ignore[arg-type]
            used = study.runner.bits(precision)
            if used in tried:
                continue
            tried.add(used)
            held = self._held(study.losses(precision)[:, None])
            bound = min(bound, 1 - held.upper(held.losses[:, 0]))
            points.append(StaticPoint(precision, used, 1 - float(held.losses.mean()), bound))
            if bound < target:
                break
        return points

    def answer(self, base: Precision, goal: Precision) -> FittedModel:
        """Fit a model that tells from the answer at `base` whether `goal` must answer again.

        Raises RequestError where that is no higher precision, NoTapError where the answer is always
        the same.
        """
        study, own = self._study, self._own
        bits = np.array([study.runner.bits(precision) for precision in (base, goal)])
        if bits[1] <= bits[0]:
            raise RequestError(
                f"escalation from {base} to {goal} goes from {bits[0]:g} bits to {bits[1]:g}: "
                "choose a higher precision to go to"
            )
        bits[1] += bits[0]  # the first answer has been paid for
        tap = study.answer_tap(base)
        losses = np.column_stack([study.losses(base), study.losses(goal)])
        values = tap.flat(own)
        if study.judge.kind == "argmax":
            probe = own_scores(values, study.judge.scores, study.classes[own])
        else:
            probe = loss_probe(values, losses[own, :1], study.groups[own], self._seed)
        task = self._task(losses, bits, (float(bits[0]), float(bits[1])), escalates=True)
        partition, _ = choose_regions(probe.features, probe.projection.doubt, task)
        name = f"answer-{_short(base)}-{_short(goal)}"
        return self._measured(
            _model(name, "answer", tap, base, (base, goal), probe, partition),
            probe,
            partition,
            tap,
            losses,
            bits,
            precisions_of(np.arange(partition.count), partition.count, task),
        )

    def gate(self, names: Sequence[str]) -> FittedModel | None:
        """Fit the best gate; None, with a warning, where none is better than static plans.

        Taps are compared as if head and body ran at one precision; the best is then measured with
        the head at its own. Raises NoTapError for a name that gives no gate.
        """
        span = float(self._bits.min()), float(self._bits.max())
        plain = self._task(self._losses, self._bits, span)
        found: list[_GateCandidate] = []
        for tap, base, cut in self._taps(names):
            bits = self._bits_behind(cut, base)
            task = replace(plain, bits=bits)
            try:
                probe = self._probe(tap.flat(self._own))
            except NoTapError as error:
                _no_gate(f"tap {tap.name!r}: {error}", names)
                continue
            partition, left = choose_regions(probe.features, probe.projection.doubt, task)
            found.append(_GateCandidate(tap, base, cut, bits, probe, partition, left))
        if not found:
            _no_gate("the graph has no tap that features can be taken from", names)
            return None
        best = min(found, key=lambda each: each.left)
        if not names and best.left >= loss_left(nothing_found, best.probe.features, plain):
            _no_gate("no tap tells inputs apart better than static plans do", names)
            return None
        return self._measured_gate(best, span)

    def _measured_gate(self, best: _GateCandidate, span: tuple[float, float]) -> FittedModel:
        losses, cut = self._losses, best.cut
        if cut is not None:
            columns = [
                self._study.split_losses(cut, best.base, precision)
                for precision in self._precisions
            ]
            losses = np.column_stack(columns)
        task = self._task(losses, best.bits, span)
        stage: Stage = "start" if cut is None else "gate"
        partition = best.partition
        return self._measured(
            _model(
                "gate", stage, best.tap, best.base, tuple(self._precisions), best.probe, partition
            ),
            best.probe,
            partition,
            best.tap,
            losses,
            best.bits,
            precisions_of(partition.of(best.probe.features), partition.count, task),
            cut,
        )

    def _taps(self, names: Sequence[str]) -> Iterator[tuple[Tap, Precision, Cut | None]]:
        """The taps to try, and the precisions that their heads run at."""
        study, cheapest = self._study, self._precisions[0]
        inputs = [item.name for item in study.inputs]
        if names:
            own = [name for name in inputs if name in names]
            cuts = [study.graph.cut(name) for name in names if name not in inputs]
        else:
            own = inputs if len(inputs) == 1 else []
            cuts = study.graph.cuts()
            if len(cuts) > _MOST_CUTS:
                spread = np.linspace(0, len(cuts) - 1, _MOST_CUTS).round().astype(int)
                cuts = [cuts[i] for i in spread]
        for name in own:
            try:
                yield study.input_tap(name), cheapest, None
            except NoTapError:
                if names:
                    raise
        for cut in cuts:
            # The error of a head at a low level would be in every answer.
            base = self._precisions[-1]
            try:
                yield study.tap(cut, base), base, cut
            except NoTapError:
                if names:
                    raise

    def _bits_behind(self, cut: Cut | None, base: Precision) -> NDArray[np.float64]:
        """The bits of a run whose head runs at `base`, (precisions,)."""
        if cut is None:
            return self._bits
        bits, head = self._study.runner.bits, cut.head_layers
        first = bits(base, slice(0, head))
        return np.array(
            [first + bits(precision, slice(head, None)) for precision in self._precisions]
        )

    def _probe(self, values: Floats) -> Probe:
        study, own = self._study, self._own
        groups = study.groups[own]
        if study.judge.kind == "argmax":
            return class_probe(values, study.classes[own], groups, self._seed)
        return loss_probe(values, self._losses[own], groups, self._seed)

    def _task(
        self,
        losses: NDArray[np.float64],
        bits: NDArray[np.float64],
        span: tuple[float, float],
        escalates: bool = False,
    ) -> Task:
        groups = self._study.groups[self._own]
        return Task(losses[self._own], bits, groups, span, self._seed, escalates)

    def _held(self, losses: NDArray[np.float64]) -> HeldOut:
        rest, study = self._rest, self._study
        return HeldOut(losses[rest], study.groups[rest], study.judge.binary, self._confidence)

    def _measured(
        self,
        model: Boundary,
        probe: Probe,
        partition: Partition,
        tap: Tap,
        losses: NDArray[np.float64],
        bits: NDArray[np.float64],
        assignment: NDArray[np.uint8],
        cut: Cut | None = None,
    ) -> FittedModel:
        """Complete a model with what it does to the samples that it has not seen."""
        projection, held = probe.projection, self._held(losses)
        arrays: BoundaryArrays = {
            "center": projection.center,
            "projection": projection.matrix,
            "offset": projection.offset,
            "mix": np.zeros(partition.count, "<f4"),
            **partition.arrays,
        }
        device = BoundaryModel(model, arrays)
        # One by one, as the device does: sums of many rows at once may round otherwise.
        regions = np.array([device.region_of(tap.values[row]) for row in self._rest])
        points = operating_points(assignment, bits, regions, held)
        bounds = [
            [
                held.upper(held.losses[:, precision], regions == region)
                for precision in range(len(bits))
            ]
            for region in range(partition.count)
        ]
        arrays |= {
            "mix": (np.bincount(regions, minlength=partition.count) / len(regions)).astype("<f4"),
            "loss": region_losses(regions, held.losses, partition.count).astype("<f4"),
            "loss_bound": np.array(bounds, "<f4"),
            "assignment": points.assignment,
            "outlook": points.outlook.astype("<f4"),
        }
        described = replace(
            model,
            points=len(points.assignment),
            samples=len(regions),
            confidence=self._confidence,
        )
        return FittedModel(described, arrays, cut)


def _model(
    name: str,
    stage: Stage,
    tap: Tap,
    base: Precision,
    precisions: tuple[Precision, ...],
    probe: Probe,
    partition: Partition,
) -> Boundary:
    """Describe a model; what is measured is filled in later."""
    return Boundary(
        name=name,
        stage=stage,
        tap=tap.name,
        base=base,
        pool=tap.pool,
        scores=probe.projection.scores,
        features=probe.projection.matrix.shape[1],
        kind=partition.kind,
        regions=partition.count,
        nodes=len(partition.arrays.get("node_feature", ())),
        precisions=precisions,
        points=1,
        samples=1,
        confidence=0.5,
    )


def _short(precision: Precision) -> str:
    """The precision for a name: 8, or 4p6b."""
    return (
        str(precision.level) if precision.bits is None else f"{precision.bits:g}b".replace(".", "p")
    )


def _no_gate(reason: str, names: Sequence[str]) -> None:
    if names:
        raise NoTapError(reason)
    warnings.warn(f"no gate: {reason}", BoundaryWarning, stacklevel=4)


def _check_enough(*sides: NDArray[np.intp]) -> None:
    """Raise TooFewSamplesError unless both sides of the split are enough for two regions."""
    samples, least = sum(map(len, sides)), 2 * LEAST_SAMPLES
    if min(map(len, sides)) < least:
        raise TooFewSamplesError(
            f"{samples} samples are too few for 2 regions of {LEAST_SAMPLES} on both sides of the "
            f"split: give {2 * least} or more, better 1000"
        )
    groups = [len(np.unique(side)) for side in sides]
    if min(groups) < _LEAST_GROUPS:
        raise TooFewSamplesError(
            f"{sum(groups)} groups are too few to split: give {2 * _LEAST_GROUPS} or more"
        )
