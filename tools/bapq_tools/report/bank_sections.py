"""What a bank tells about itself: coverage, bytes, errors, plans, boundary models, boards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from bapq_edge.adaptive.boundary_model import BoundaryModel
from bapq_edge.bank.layout import PLANES_OF_LEVEL
from bapq_edge.bank.reader import Bank
from bapq_edge.planning.planner import Request, chunk_costs, plan
from bapq_edge.units import counted, format_size

from .board_section import board_section
from .charts import line_chart
from .page import section, table
from .run_costs import RunCosts

__all__ = ["bank_sections"]

_PLANS = 40
_MIB = 1 << 20


def bank_sections(bank: Bank, run: RunCosts | str, profiles: Sequence[str] = ()) -> Iterator[str]:
    """The sections, most important first; `run` and `profiles`: see `board_section`."""
    yield _coverage(bank)
    yield _front(bank)
    yield _layers(bank)
    for entry in bank.manifest.boundary:
        yield _boundary(BoundaryModel.of(bank, entry.model))
    yield board_section(bank, run, profiles)


def _coverage(bank: Bank) -> str:
    manifest = bank.manifest
    kept = sum(node.weights for node in manifest.kept_in_float)
    share = bank.weights / (bank.weights + kept)
    calibration = manifest.calibration
    seen = counted(calibration.samples, "calibration sample") if calibration else "no calibration"
    levels = [
        [str(level), f"{bank.bits_per_weight(level):.2f}", format_size(bank.weight_bytes(level))]
        for level in bank.levels
    ]
    nodes = [
        [node.name, node.operator, f"{node.weights:,}", node.reason]
        for node in manifest.kept_in_float
    ]
    return section(
        "Coverage",
        f"{counted(bank.weights, 'weight')} in {counted(len(manifest.layers), 'layer')}, "
        f"{share:.1%} of all weights; {seen}.",
        table(["level", "bits per weight", "bytes"], levels),
        table(["kept in float", "operator", "weights", "why"], nodes) if nodes else "",
    )


def _front(bank: Bank) -> str:
    costs = chunk_costs(bank)

    def place(request: Request) -> tuple[float, float]:
        found = plan(costs, request)
        return (found.resident_bytes + found.streamed_bytes) / _MIB, found.predicted_error

    bits = np.geomspace(min(bank.levels), max(bank.levels), _PLANS)
    points = [place(Request(bits=float(wanted))) for wanted in bits]
    marked = [(f"level {level}", *place(Request(level=level))) for level in bank.levels]
    marked = [mark for mark in marked if mark[2] > 0]
    chart = line_chart(
        [("the planner's plans", sorted(points))],
        x_label="MiB of weights in memory",
        y_label="error that the plan expects",
        logarithmic=True,
        marked=marked,
    )
    return section(
        "Error against bytes",
        "Each point of the line is a plan of so many bits per weight. The error is the sum of the "
        "chunks' sensitivities: it compares plans of this bank, and no other.",
        chart,
    )


def _layers(bank: Bank) -> str:
    levels = [level for level in bank.levels if level != 32]
    heads = ["layer", "shape", *(f"bytes {level}" for level in levels)]
    heads += [f"error {level}" for level in levels]
    rows = []
    for layer in bank.manifest.layers:
        sizes, errors = [], []
        for level in levels:
            own = bank.level_of(layer, level)
            tables = [bank.chunks(plane)[layer.chunk_range] for plane in PLANES_OF_LEVEL[own]]
            sizes.append(format_size(sum(int(each["bytes"].sum()) for each in tables)))
            errors.append(f"{layer.relative_error[own]:.4f}" if own != 32 else "0")
        rows.append([layer.name, f"{layer.rows} x {layer.columns}", *sizes, *errors])
    return section(
        "Layers",
        "Bytes that each level reads, and the relative error of the layer's output there.",
        table(heads, rows),
    )


def _boundary(model: BoundaryModel) -> str:
    about = model.description
    kind = "A gate" if about.stage != "answer" else "An escalation"
    points = [
        [f"{point.bits:.2f}", f"{point.agreement:.4f}", f"{point.agreement_bound:.4f}"]
        for point in model.points
    ]
    line = [(point.bits, point.agreement) for point in model.points]
    bound = [(point.bits, point.agreement_bound) for point in model.points]
    return section(
        f"Boundary model {about.name}",
        f"{kind} at {about.tap}: {about.kind} of {counted(about.regions, 'region')}, held out "
        f"{counted(about.samples, 'sample')}; bounds at {about.confidence:.0%} confidence.",
        line_chart(
            [("measured", sorted(line)), ("or more", sorted(bound))],
            x_label="bits per weight",
            y_label="agreement with the float model",
        ),
        table(["bits", "agreement", "or more"], points),
    )
