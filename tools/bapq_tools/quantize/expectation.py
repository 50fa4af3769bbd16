"""What plans lose, measured: the finished bank runs a dozen of them on samples that were held out.

The sensitivity table adds up what single layers lose, and layers act on each other. So the errors
of mixtures are measured and a power law is put through them: it corrects the sum, and keeps the
order of mixtures. Uniform levels, whose codes were chosen for each other, are told as measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import onnx

from bapq_edge.answers import AnswerJudge
from bapq_edge.bank.layout import Level
from bapq_edge.bank.manifest import Expected, ExpectedPoint
from bapq_edge.bank.reader import Bank
from bapq_edge.engine.executor import execute
from bapq_edge.engine.graph import Graph, open_graph
from bapq_edge.engine.store import Store
from bapq_edge.planning.planner import ChunkCosts, Plan, Request, chunk_costs, plan

from ..calibration.float_answers import FloatAnswers
from ..calibration.forward_passes import FLOAT, Tensors
from ..calibration.samples import CalibrationData
from .sensitivity import relative_square_error

__all__ = ["ExpectedPlan", "expected_plans", "measure_plans", "plan_count"]

_MIXTURES = 7
"""Number of mixtures, spread from the lowest level to level 8."""

_TOLD_BITS = 3.0
"""A mixture that is measured besides: the build tells what to expect of it."""

_NEAR = 0.75
"""What fewer bits still stand for it, where chunks are large."""

_EXPONENTS = (0.25, 2.0)
"""Bounds of the power law: a steeper or flatter one is an accident of few points."""

_DIGITS = 6
"""Significant digits that are stored."""


@dataclass(frozen=True)
class ExpectedPlan:
    """What a plan does, measured on held-out samples."""

    plan: str
    """Such as "level 4", or "3 bits"."""
    bits: float
    """Nominal bits per weight."""
    answers: float
    """Agreement with the float model, or cosine to its outputs: mean over the samples."""
    error: float
    """Relative error of the outputs: norm of the error over their norm."""
    weight_bytes: int
    """Bytes that a run reads, or holds in memory."""


def expected_plans(bank: Bank) -> Iterator[ExpectedPlan]:
    """What to expect of the levels and of 3 bits, as far as they were measured; most bits first."""
    expected = bank.manifest.expected
    points = () if expected is None else expected.points[::-1]
    costs = chunk_costs(bank)
    mixtures = [p.bits for p in points if p.level == 0 and _NEAR <= p.bits / _TOLD_BITS <= 1]
    for point in points:
        name, weight_bytes = f"level {point.level}", 0
        if point.level in bank.levels:
            weight_bytes = plan(costs, Request(level=point.level)).resident_bytes
        elif mixtures and point.bits == max(mixtures):
            name = f"{_TOLD_BITS:g} bits"
            # As it was measured: what is expected now may speak for a level.
            measured = replace(costs, expected=None)
            request = Request(bits=_TOLD_BITS, highest_level=_levels(costs)[0])
            weight_bytes = plan(measured, request).resident_bytes
        else:
            continue
        error = math.sqrt(point.error)
        yield ExpectedPlan(name, point.bits, point.answers, error, weight_bytes)


def measure_plans(
    bank: Bank,
    data: CalibrationData,
    answers: FloatAnswers,
    workers: int,
    *,
    held_out: bool,
    advance: Callable[[], None] = lambda: None,
) -> Expected | None:
    """Run plans of the bank on the samples of the float answers.

    `held_out` tells whether codes were chosen without these samples. None where no tensor of the
    float answers is in the bank's graph.
    """
    graph, names = _judged_graph(bank, answers.tensors[0])
    if not names:
        return None
    wanted = [{name: tensors[name] for name in names} for tensors in answers.tensors]
    judge = AnswerJudge.of(wanted[0])
    costs = chunk_costs(bank)
    store = Store(bank)
    points: list[ExpectedPoint] = []
    try:
        opened = Graph(open_graph(graph, store, threads=1), str(bank.path))
        for level, made in _plans(costs):
            store.publish(made.levels, made.pinned, made.ring_bytes, None, threads=1)

            def once(sample: int) -> tuple[float, float]:
                found, _ = execute(store, opened, data.feed(sample), names)
                error = relative_square_error(found, wanted[sample], answers.free_to_shift)
                return error, judge.answer(found, wanted[sample])

            with ThreadPoolExecutor(workers) as pool:
                judged = np.array(list(pool.map(once, range(data.samples))))
            error, agreeing = (float(f"{mean:.{_DIGITS}g}") for mean in judged.mean(0))
            point = ExpectedPoint(
                level=level,
                bits=float(f"{made.bits_per_weight:.{_DIGITS}g}"),
                table=float(f"{made.predicted_error:.{_DIGITS}g}"),
                error=error,
                answers=agreeing,
            )
            points.append(point)
            advance()
    finally:
        store.close()
    factor, exponent = _power_law([point for point in points if point.level == 0])
    ordered = sorted(points, key=lambda point: (point.bits, -point.level))
    return Expected(data.samples, held_out, judge.measure, factor, exponent, tuple(ordered))


def plan_count(levels: Sequence[Level]) -> int:
    """Number of plans that are run at most."""
    return len([level for level in levels if level != FLOAT]) + _MIXTURES + 1


def _plans(costs: ChunkCosts) -> Iterator[tuple[int, Plan]]:
    """Every level below 32 with its plan, and under 0 mixtures between them that differ."""
    levels = _levels(costs)
    uniform = {level: plan(costs, Request(level=level)) for level in levels}
    yield from uniform.items()
    # Where layers lack levels, a run at one has other bits.
    low, high = (uniform[level].bits_per_weight for level in (levels[-1], levels[0]))
    if low >= high:
        return
    # Somewhat inside: next to a uniform level a mixture is that level, or nearly.
    mixtures = np.geomspace(min(1.2 * low, high), max(0.85 * high, low), _MIXTURES).tolist()
    if low < _TOLD_BITS < high:
        mixtures.append(_TOLD_BITS)
    seen = {made.levels.tobytes() for made in uniform.values()}
    for bits in mixtures:
        made = plan(costs, Request(bits=max(bits, low), highest_level=levels[0]))
        if made.levels.tobytes() not in seen:
            seen.add(made.levels.tobytes())
            yield 0, made


def _levels(costs: ChunkCosts) -> list[Level]:
    """The levels that lose something."""
    return [level for level in costs.levels if level != FLOAT] or list(costs.levels)


def _power_law(points: Sequence[ExpectedPoint]) -> tuple[float, float]:
    """Factor and exponent of the least squares line through the logarithms of table and error."""
    known = [(point.table, point.error) for point in points if point.table and point.error]
    if not known:
        return 1.0, 1.0
    x, y = np.log(np.array(known)).T
    exponent = 1.0
    if (spread := x - x.mean()).any() and len(known) > 2:
        exponent = float(np.clip(spread @ (y - y.mean()) / (spread @ spread), *_EXPONENTS))
    factor = float(np.exp(y.mean() - exponent * x.mean()))
    return float(f"{factor:.{_DIGITS}g}"), float(f"{exponent:.{_DIGITS}g}")


def _judged_graph(bank: Bank, wanted: Tensors) -> tuple[bytes, list[str]]:
    """The bank's graph with judged tensors as outputs, as far as it has them, and their names."""
    model = onnx.load_model_from_string(bank.graph_bytes())
    made = {name for node in model.graph.node for name in node.output}
    names = [name for name in wanted if name in made]
    outputs = {item.name for item in model.graph.output}
    for name in names:
        if name not in outputs:
            info = onnx.ValueInfoProto(name=name)
            info.type.tensor_type.elem_type = onnx.TensorProto.FLOAT
            model.graph.output.append(info)
    return model.SerializeToString(), names
