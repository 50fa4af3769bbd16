"""Fits the boundary models of a bank and writes it again with them."""

from __future__ import annotations

import numbers
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeGuard

import numpy as np
import onnx
from numpy.typing import ArrayLike

from bapq_edge.bank.boundary import Boundary, BoundaryArrays, StaticPoint
from bapq_edge.bank.manifest import Batched
from bapq_edge.bank.writer import check_bank_target
from bapq_edge.errors import (
    BoundaryDroppedWarning,
    BoundaryWarning,
    NoTapError,
    RequestError,
    TargetNotMetError,
)

from ..build_support.progress import Progress
from ..calibration.samples import CalibrationSource
from .batches import find_batched
from .fitted_model import FittedModel
from .model_fitter import ModelFitter
from .precisions import default_pairs, parse_pair
from .report import FitReport, ModelReport, StaticReport
from .rewrite import Split, rewrite
from .study import Study

__all__ = ["Fit", "fit", "fit_models"]


@dataclass(frozen=True)
class Fit:
    """Boundary models, ready to be written."""

    models: list[tuple[Boundary, BoundaryArrays]]
    split: Split | None
    batched: Batched | None
    """What is known of batches, where a model escalates."""
    static: list[StaticPoint]
    """Plans for all inputs, where a target is asked for."""
    report: FitReport


def fit(
    bank: str | os.PathLike[str],
    calibration: CalibrationSource,
    model: str | os.PathLike[str] | onnx.ModelProto | None = None,
    *,
    target_agreement: float | None = None,
    tap: Sequence[str] = (),
    agreement: str | None = None,
    judge: str | None = None,
    escalate: Sequence[str] = (),
    out: str | os.PathLike[str] | None = None,
    groups: ArrayLike | None = None,
    confidence: float = 0.9,
    seed: int = 0,
    keep_all: bool = False,
    progress: bool = True,
) -> FitReport:
    """Fit boundary models to a bank, and write it again with them in place of any others.

    Args:
        bank: the bank.
        calibration: an .npz file or a mapping, one array per model input, samples on the first
            axis; a folder of such files, or a list, where samples differ in size. Best are samples
            that the bank was not built with.
        model: the float model that answers are to agree with; None is level 32 of the bank.
        target_agreement: 0 to 1; the fit fails unless held-out samples show that some boundary
            model, or a plan for all inputs, keeps it. Models that need no fewer bits than such a
            plan are left out.
        tap: tensors to try for the gate, in place of those that are found.
        agreement: argmax, cosine or tolerance:X; None: as the outputs look
            (docs/how-to/adaptive.md).
        judge: the output that is judged; None is the only one of floats.
        escalate: pairs such as "2:8" or "4.6b:8", from which precision to which; none: from every
            level to the highest.
        out: the bank to write; None is `bank` itself.
        groups: (samples,) integers; samples of one group, such as views of one object, never stand
            on both sides of a split.
        confidence: of every bound.
        seed: of the splits.
        keep_all: leave no model out.
        progress: show it on stderr.

    Raises:
        BoundaryError: TooFewSamplesError, SingleClassError, NoTapError, TargetNotMetError.
        RequestError: what was asked for cannot be had.
        BankError: the bank.
        CalibrationError: the samples.
        ModelError: the float model.
        InputFileError: one of the files is missing or cannot be read.
        StorageError: the disk.
    """
    _check_request(target_agreement, confidence, seed)
    for name, value in (("tap", tap), ("escalate", escalate)):
        if isinstance(value, str):
            raise RequestError(f"{name} is {value!r:.80}: give a list, such as [{value!r:.80}]")
    if out is not None:
        check_bank_target(Path(out))
    with Study(
        bank,
        calibration,
        model,
        agreement=agreement,
        judge=judge,
        groups=groups,
        progress=progress,
    ) as study:
        found = fit_models(
            study,
            target_agreement=target_agreement,
            tap=tap,
            escalate=escalate,
            confidence=confidence,
            seed=seed,
            keep_all=keep_all,
        )
    target = os.fspath(bank if out is None else out)
    with Progress(progress).stage("write"), warnings.catch_warnings():
        # Models of an earlier fit are to be replaced.
        warnings.simplefilter("ignore", BoundaryDroppedWarning)
        rewrite(
            bank,
            target,
            boundary=found.models,
            split=found.split,
            batched=found.batched,
            static=found.static,
        )
    return replace(found.report, bank=target)


def fit_models(
    study: Study,
    *,
    rows: ArrayLike | None = None,
    target_agreement: float | None = None,
    tap: Sequence[str] = (),
    escalate: Sequence[str] = (),
    confidence: float = 0.9,
    seed: int = 0,
    keep_all: bool = False,
) -> Fit:
    """Fit to the samples of these numbers (None: to all of them); writes nothing.

    About half of them find features and regions; what is stated is measured on the others.
    Arguments and errors are those of `fit`.
    """
    _check_request(target_agreement, confidence, seed)
    chosen = _checked_rows(rows, study.samples)
    pairs = [parse_pair(text) for text in escalate] or default_pairs(study.bank)
    for precision in {precision for pair in pairs for precision in pair}:
        study.runner.plan(precision)  # refuses a level or bits that cannot be
    fitter = ModelFitter(study, chosen, confidence, seed)
    gate = fitter.gate(tap)
    found = [] if gate is None else [gate]
    for base, goal in pairs:
        try:
            found.append(fitter.answer(base, goal))
        except NoTapError as error:
            warnings.warn(f"no escalation from {base}: {error}", BoundaryWarning, stacklevel=2)
    if not found:
        raise NoTapError("no boundary model can be fitted, for the reasons in the warnings above")
    reports = [each.report(target_agreement) for each in found]
    target = 0.0 if target_agreement is None else target_agreement
    static = fitter.static_points(target) if target else []
    enough = [point for point in static if point.agreement_bound >= target]
    plan = min(enough, key=lambda point: point.bits, default=None)
    if target and plan is None and all(each.chosen is None for each in reports):
        raise TargetNotMetError(_refusal(target, fitter, found))
    left_out = []
    if plan is not None and not keep_all:
        left_out = [each.name for each in reports if _is_needless(each, plan.bits)]
    found = [each for each in found if each.model.name not in left_out]
    escalates = any(each.model.stage == "answer" for each in found)
    batched = find_batched(study) if escalates else None
    report = FitReport(
        bank=str(study.bank.path),
        agreement=str(study.judge),
        samples=len(chosen),
        held_out=len(fitter.held.losses),
        groups=len(np.unique(fitter.held.groups)),
        confidence=confidence,
        target_agreement=target_agreement,
        batched=batched is not None,
        static=_all_static(fitter.static(), static),
        models=reports,
        static_plan=None if plan is None else _static_report(plan),
        left_out=left_out,
    )
    cut = next((each.cut for each in found if each.cut is not None), None)
    split = None if cut is None else (*study.halves(cut), cut.head_layers)
    return Fit([(each.model, each.arrays) for each in found], split, batched, static, report)


def _is_needless(model: ModelReport, static_bits: float) -> bool:
    """Whether a plan for all inputs keeps the target with no more bits than the model."""
    return model.chosen is None or model.points[model.chosen].bits >= static_bits


def _all_static(found: list[StaticReport], points: list[StaticPoint]) -> list[StaticReport]:
    """What was measured for all inputs; of one precision the bound that holds for a choice."""
    reports = {each.precision: each for each in found}
    reports |= {str(point.precision): _static_report(point) for point in points}
    return list(reports.values())


def _static_report(point: StaticPoint) -> StaticReport:
    return StaticReport(str(point.precision), point.bits, point.agreement, point.agreement_bound)


def _check_request(target_agreement: object, confidence: object, seed: object) -> None:
    if target_agreement is not None and not (
        _is_real(target_agreement) and 0 < target_agreement <= 1
    ):
        raise RequestError(
            f"target agreement is {target_agreement!r:.80}, must be above 0 and at most 1"
        )
    if not (_is_real(confidence) and 0.5 <= confidence < 1):
        raise RequestError(f"confidence is {confidence!r:.80}, must be from 0.5 to below 1")
    if not (_is_real(seed) and isinstance(seed, numbers.Integral) and seed >= 0):
        raise RequestError(f"seed is {seed!r:.80}, must be a whole number from 0 on")


def _is_real(value: object) -> TypeGuard[float]:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _checked_rows(rows: ArrayLike | None, samples: int) -> np.ndarray:
    if rows is None:
        return np.arange(samples)
    found = np.asarray(rows)
    fits = found.ndim == 1 and found.dtype.kind in "iu" and len(np.unique(found)) == len(found)
    if not fits or (len(found) and not 0 <= found.min() <= found.max() < samples):
        raise RequestError(
            f"rows are {found.dtype} of shape {found.shape}, expected numbers from 0 to "
            f"{samples - 1}, each once"
        )
    return found


def _refusal(target: float, fitter: ModelFitter, found: Sequence[FittedModel]) -> str:
    """Say why the target is not met, and which one can be."""
    points = [(point, each) for each in found for point in each.points]
    best, model = max(points, key=lambda pair: (pair[0].agreement_bound, -pair[0].bits))
    held = fitter.held
    text = (
        f"agreement {target:g} is not shown by {len(held.losses)} held-out samples: at most "
        f"{best.agreement_bound:.4f} at confidence {held.confidence:g}, by {model.model.name} at "
        f"{best.bits:.2f} bits (measured {best.agreement:.4f})"
    )
    if best.agreement < target:
        return f"{text}: ask for less, or build the bank with higher levels"
    return f"{text}: ask for less, or give more samples"
