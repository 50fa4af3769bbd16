"""Fits a gate that skips rows: its regions are inputs of one class, which need only some rows."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from bapq_edge.adaptive.boundary_model import BoundaryModel
from bapq_edge.bank.boundary import Boundary, BoundaryArrays, Precision, Stage
from bapq_edge.bank.layout import Level
from bapq_edge.errors import NoTapError, RequestError

from ..boundary.features import Probe, class_probe
from ..boundary.folds import held_out
from ..boundary.operating_points import HeldOut
from ..boundary.rewrite import Split, rewrite
from ..boundary.study import Study, Tap
from ..boundary.taps import Cut
from .pruning import RowPruning, Samples, prune_rows

__all__ = ["RowGate", "fit_row_gate"]

_CLASS_WEIGHT = 1e-3
"""Weight of a class score beside the margin, where the nearest centre is sought."""


@dataclass(frozen=True)
class RowGate:
    """A boundary model whose regions skip rows, and how the bank must be rewritten for it."""

    pruning: RowPruning
    model: Boundary
    arrays: BoundaryArrays
    split: Split | None

    def write(self, bank: str | os.PathLike[str], out: str | os.PathLike[str]) -> None:
        """Write the bank again for it, with it alone; see `rewrite`."""
        rewrite(
            bank,
            out,
            row_order=self.pruning.row_order,
            chunk_rows=self.pruning.chunk_rows,
            boundary=[(self.model, self.arrays)],
            split=self.split,
        )


def fit_row_gate(
    study: Study,
    rows: NDArray[np.intp],
    level: Level,
    *,
    tolerance: float,
    doubt: float = 0.15,
    confidence: float = 0.9,
    seed: int = 0,
    name: str = "rows",
) -> RowGate:
    """Fit a probe of the reference's class, and find the rows that inputs of each class can spare.

    Region 0 holds the share `doubt` of the inputs, those whose class the probe is least sure of;
    nothing else tells it apart, so it can spare the fewest. The other regions hold one class each.
    The tap is the last tensor before the first layer, or else the only input. Of the samples
    `rows` half is fitted to, and half measures what is lost: see `prune_rows`.

    Raises RequestError where the model is no classifier, NoTapError, and what `prune_rows` raises.
    """
    if study.judge.kind != "argmax":
        raise RequestError(
            f"rows are skipped by class, but what is judged is the {study.judge}: a gate of rows "
            "is for classifiers"
        )
    precision = Precision(level=level)
    last = held_out(study.groups[rows], seed)
    own, rest = rows[~last], rows[last]
    tap, cut = _gate_tap(study, precision)
    probe = class_probe(tap.flat(own), study.classes[own], study.groups[own], seed)
    classes = probe.projection.matrix.shape[1]
    regions = classes + 1
    precisions = (precision, *(Precision(level=level, region=region) for region in range(regions)))
    stage: Stage = "gate" if cut else "start"
    model = Boundary(
        name=name,
        stage=stage,
        tap=tap.name,
        base=precision,
        pool=tap.pool,
        scores="logits",
        features=classes,
        kind="kmeans",
        regions=regions,
        nodes=0,
        precisions=precisions,
        points=1,
        samples=len(rest),
        confidence=confidence,
    )
    arrays: BoundaryArrays = {
        "center": probe.projection.center,
        "projection": probe.projection.matrix,
        "offset": probe.projection.offset,
        "mix": np.ones(regions, np.float32),
        **_centers(probe, doubt),
    }
    device = BoundaryModel(model, arrays)
    found = {i: device.region_of(tap.values[i]) for i in (*own, *rest)}
    fitted, measured = (
        Samples([study.feeds[i] for i in part], np.array([found[i] for i in part]))
        for part in (own, rest)
    )
    pruning = prune_rows(
        study.bank.path,
        precision,
        fitted,
        measured,
        [study.wanted[i] for i in rest],
        study.judge.output,
        study.judge.agreement,
        regions=regions,
        tolerance=tolerance,
    )
    held = HeldOut(
        np.column_stack([study.losses(precision)[rest], pruning.losses]),
        study.groups[rest],
        True,
        confidence,
    )
    arrays |= _measured(study, level, pruning, measured.regions, held)
    arrays |= {"skipped": pruning.skipped, "row_values": pruning.row_values}
    split = None if cut is None else (*study.halves(cut), cut.head_layers)
    return RowGate(pruning, replace(model, points=len(arrays["assignment"])), arrays, split)


def _gate_tap(study: Study, precision: Precision) -> tuple[Tap, Cut | None]:
    """Find the tap of the gate: no layer has run by then, so all of them can spare rows."""
    cuts = study.graph.cuts()
    if cuts and cuts[0].head_layers == 0:
        return study.tap(cuts[0], precision), cuts[0]
    if len(study.inputs) != 1:
        raise NoTapError(
            f"the model has {len(study.inputs)} inputs, and no single tensor before its first "
            "layer: a gate of rows needs one"
        )
    return study.input_tap(study.inputs[0].name), None


def _centers(probe: Probe, doubt: float) -> BoundaryArrays:
    """Make centres that amount to: little margin, region 0; else the class of the top score.

    Of features z and margin m, centre c > 0 lies at z = w at class c, m = 2t, and centre 0 at the
    origin. Then c is nearer than 0 where 2t m + w z_c > 2t² + w²/2, and nearest of all classes
    where z_c is the largest. With a small w, that is m > t.
    """
    classes = probe.projection.matrix.shape[1]
    threshold = float(np.quantile(probe.features[:, classes], doubt))
    scale = np.ones(classes + 2, np.float32)
    scale[-1] = 0  # the entropy tells no more than the margin
    centers = np.zeros((classes + 1, classes + 2))
    weight = _CLASS_WEIGHT * threshold
    centers[1:, :classes] = weight * np.eye(classes)
    centers[1:, classes] = 2 * threshold
    return {"scale": scale, "centers": centers}


def _measured(
    study: Study,
    level: Level,
    pruning: RowPruning,
    regions: NDArray[np.intp],
    held: HeldOut,
) -> BoundaryArrays:
    """Measure the regions and both operating points on the held-out samples."""
    count = len(pruning.skipped)
    here = [regions == region for region in range(count)]
    loss, bound = np.ones((count, count + 1)), np.ones((count, count + 1))
    for region, mine in enumerate(here):
        for precision, losses in ((0, held.losses[:, 0]), (1 + region, held.losses[:, 1])):
            if mine.any():
                loss[region, precision] = losses[mine].mean()
            bound[region, precision] = held.upper(losses, mine)
    whole, spared = _bits(study, level, pruning)
    mix = np.bincount(regions, minlength=count) / len(regions)
    points = [
        (1 + np.arange(count), whole - float(mix @ spared), held.losses[:, 1]),
        (np.zeros(count), whole, held.losses[:, 0]),
    ]
    if held.losses[:, 1].mean() <= held.losses[:, 0].mean():
        del points[1]  # it reads more for no better answers
    elif not spared.any():
        del points[0]
    outlook = [[bits, 1 - losses.mean(), 1 - held.upper(losses)] for _, bits, losses in points]
    return {
        "mix": mix.astype(np.float32),
        "loss": loss.astype(np.float32),
        "loss_bound": bound.astype(np.float32),
        "assignment": np.array([assigned for assigned, _, _ in points], np.uint8),
        "outlook": np.array(outlook, np.float32),
    }


def _bits(study: Study, level: Level, pruning: RowPruning) -> tuple[float, NDArray[np.float64]]:
    """The bits per weight of a run, and how many of them each region spares, (regions,)."""
    layers, weights = study.bank.manifest.layers, study.bank.weights
    whole, spared = 0.0, np.zeros(len(pruning.skipped))
    for layer in layers:
        bits = study.bank.level_of(layer, level)
        whole += bits * layer.weights / weights
        spared += bits * pruning.skipped_rows.get(layer.name, 0) * layer.columns / weights
    return whole, spared
