"""Fits a gate that skips rows and writes the bank with it: `bapq fit --skip-rows`."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import ArrayLike

from bapq_edge.bank.boundary import Precision
from bapq_edge.bank.layout import Level
from bapq_edge.bank.writer import check_bank_target
from bapq_edge.errors import BoundaryError, RequestError, UnknownLevelError
from bapq_edge.units import counted

from ..boundary.study import Study
from ..build_support.progress import Progress
from ..calibration.samples import CalibrationSource
from .row_gate import fit_row_gate

__all__ = ["RowsReport", "fit_rows"]


@dataclass(frozen=True)
class RowsReport:
    """What was found and written; agreements are of held-out samples."""

    bank: str
    level: int
    tolerance: float
    samples: int
    regions: int
    confidence: float
    bits_whole: float
    """Weight bits per weight and run where no row is skipped."""
    bits: float
    agreement: float
    agreement_bound: float
    """Lower bound at the confidence."""
    skipped: dict[str, float]
    """Share of the rows that a run skips on average, by layer."""

    def __str__(self) -> str:
        """Say it in a few lines."""
        lines = [
            f"{self.bank}: {counted(self.regions, 'region')} of "
            f"{counted(self.samples, 'sample')}, level {self.level}, at most {self.tolerance:g} of "
            "the answers lost in each",
            f"{self.bits:.2f} bits instead of {self.bits_whole:.2f}, agreement "
            f"{self.agreement:.4f} (at least {self.agreement_bound:.4f} at confidence "
            f"{self.confidence:g})",
        ]
        lines += [f"  {name}: {share:.0%} of the rows" for name, share in self.skipped.items()]
        return "\n".join(lines)


def fit_rows(
    bank: str | os.PathLike[str],
    calibration: CalibrationSource,
    model: str | os.PathLike[str] | onnx.ModelProto | None = None,
    *,
    level: Level,
    tolerance: float = 0.01,
    judge: str | None = None,
    out: str | os.PathLike[str] | None = None,
    groups: ArrayLike | None = None,
    confidence: float = 0.9,
    seed: int = 0,
    progress: bool = True,
) -> RowsReport:
    """Fit a gate that skips rows at one level, and write the bank again with it alone.

    Args:
        bank: the bank.
        calibration: samples, as for `bapq_tools.fit`.
        model: the float model that answers are to agree with; None is level 32 of the bank.
        level: the level that the rows are skipped at.
        tolerance: share of its answers that a region may lose, above 0 and below 1.
        judge: the output that is judged; None is the only one of floats.
        out: the bank to write; None is `bank` itself.
        groups: as for `bapq_tools.fit`.
        confidence: of the bound.
        seed: of the split.
        progress: show it on stderr.

    Raises:
        BoundaryError: no region can spare rows, or what `bapq_tools.fit` raises of its kind.
        RequestError: the model is no classifier, or a setting cannot be had.
        BankError, CalibrationError, ModelError, InputFileError, StorageError.
    """
    if not 0 < tolerance < 1:
        raise RequestError(f"tolerance is {tolerance:g}, must be above 0 and below 1")
    if out is not None:
        check_bank_target(Path(out))
    with Study(
        bank, calibration, model, agreement="argmax", judge=judge, groups=groups, progress=progress
    ) as study:
        if level not in study.bank.levels:
            held = ", ".join(map(str, study.bank.levels))
            raise UnknownLevelError(f"level {level} is not in the bank, it has {held}")
        with Progress(progress).stage("skip rows"):
            gate = fit_row_gate(
                study,
                np.arange(study.samples),
                level,
                tolerance=tolerance,
                confidence=confidence,
                seed=seed,
            )
        if not gate.pruning.skipped.any():
            raise BoundaryError(
                f"no region can spare rows at a tolerance of {tolerance:g}: allow more, or give "
                f"more than {study.samples} samples, as each region needs {1 / tolerance:.0f}"
            )
        layers, whole_bits = study.bank.manifest.layers, study.runner.bits(Precision(level=level))
    target = os.fspath(bank if out is None else out)
    gate.write(bank, target)
    mix = gate.arrays["mix"].astype(np.float64)
    bits, agreement, bound = (float(value) for value in gate.arrays["outlook"][0])
    skipped = gate.pruning.skipped_rows
    return RowsReport(
        bank=target,
        level=level,
        tolerance=tolerance,
        samples=study.samples,
        regions=len(mix),
        confidence=confidence,
        bits_whole=whole_bits,
        bits=bits,
        agreement=agreement,
        agreement_bound=bound,
        skipped={
            layer.name: float(mix @ skipped[layer.name]) / layer.rows
            for layer in layers
            if layer.name in skipped
        },
    )
