"""What a build did."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from bapq_edge.bank.coverage import Coverage
from bapq_edge.bank.fields import Measure
from bapq_edge.bank.layout import Level, Plane, level_within
from bapq_edge.bank.manifest import Manifest
from bapq_edge.bank.reader import Bank

from .build_support.progress import Progress
from .quantize.expectation import ExpectedPlan, expected_plans
from .quantize.prune import PruneReport

__all__ = ["BuildReport", "report_of"]


@dataclass(frozen=True)
class BuildReport:
    """The outcome of a build. It may be given wherever the path of its bank may."""

    bank: str
    """Path of the bank."""
    layers: int
    weights: int
    plane_bytes: dict[Plane, int]
    kept_in_float: int
    """Number of nodes with weights that stay with the graph engine."""
    coverage: float
    """Share of the weights that is in planes."""
    weights_in_float: dict[str, int]
    """Number of weights that stay in float, by reason."""
    calibration_samples: int
    relative_error: dict[Level, float]
    """Without calibration data: relative error of the weights per level. Else empty: see
    `expected`."""
    stage_seconds: dict[str, float]
    remaining_ratio: dict[str, float] = field(default_factory=dict)
    """Share of the weights that are not zero, for each layer that was pruned."""
    remaining_ratio_in_all: float = 1.0
    """Share of all weights that pruning left."""
    pruned_rows: int = 0
    """Rows of pruned layers that are zero as a whole: their output is their bias."""
    dropped_rows: int = 0
    """Number of these rows that are not stored."""
    expected: tuple[ExpectedPlan, ...] = ()
    """What to expect of the levels and of 3 bits; empty where nothing was measured."""
    measured_samples: int = 0
    """Number of samples that this was measured on."""
    measure: Measure | None = None
    """What `ExpectedPlan.answers` are."""

    def __fspath__(self) -> str:
        """The path of the bank."""
        return self.bank


def report_of(
    out: Path,
    manifest: Manifest,
    coverage: Coverage,
    stages: Progress,
    pruned: dict[str, PruneReport],
) -> BuildReport:
    """Sum up a build whose bank stands at `out`."""
    weights = coverage.in_planes

    def average(level: Level) -> float:
        errors = (
            layer.relative_error[level_within(layer.levels, level)] * layer.rows * layer.columns
            for layer in manifest.layers
        )
        return sum(errors) / weights

    told = manifest.expected
    zeroed = sum(report.weights - report.remaining for report in pruned.values())
    return BuildReport(
        bank=str(out),
        layers=len(manifest.layers),
        weights=weights,
        plane_bytes={plane: entry.bytes for plane, entry in manifest.planes.items()},
        kept_in_float=len(manifest.kept_in_float),
        coverage=coverage.share,
        weights_in_float=coverage.in_float,
        calibration_samples=manifest.calibration.samples if manifest.calibration else 0,
        relative_error={} if told else {level: average(level) for level in manifest.levels},
        stage_seconds=stages.seconds,
        remaining_ratio={name: report.remaining_ratio for name, report in pruned.items()},
        remaining_ratio_in_all=1 - zeroed / weights,
        pruned_rows=sum(int(report.zero_rows.sum()) for report in pruned.values()),
        dropped_rows=sum(layer.rows - layer.stored_rows for layer in manifest.layers),
        expected=tuple(expected_plans(Bank.open(out))),
        measured_samples=told.samples if told else 0,
        measure=told.measure if told else None,
    )
