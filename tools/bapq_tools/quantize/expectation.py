"""What plans lose, measured: the finished bank runs a dozen of them on samples that were held out.

The sensitivity table adds up what single layers lose, and layers act on each other. So the errors
of mixtures are measured and a power law is put through them: it corrects the sum, and keeps the
order of mixtures. Uniform levels, whose codes were chosen for each other, are told as measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

from bapq_edge.bank.fields import Measure
from bapq_edge.bank.layout import Level
from bapq_edge.bank.manifest import Expected, ExpectedPoint
from bapq_edge.bank.reader import Bank
from bapq_edge.engine.executor import execute
from bapq_edge.engine.graph import Graph, open_graph
from bapq_edge.engine.store import Store
from bapq_edge.planning.planner import ChunkCosts, Plan, Request, chunk_costs, plan

from ..calibration.forward_passes import FLOAT, ForwardPasses, Tensors
from ..calibration.reference_model import Reference, weight_feeds
from ..calibration.samples import CalibrationData
from ..onnx_graph.ir import HeavyLayer, LayerPlan
from .sensitivity import relative_square_error

__all__ = ["FloatAnswers", "float_answers", "measure_plans", "plan_count"]

_MIXTURES = 8
"""Number of mixtures, spread from the lowest level to level 8."""

_EXPONENTS = (0.25, 2.0)
"""Bounds of the power law: a steeper or flatter one is an accident of few points."""

_DIGITS = 6
"""Significant digits that are stored."""


@dataclass(frozen=True)
class FloatAnswers:
    """What plans are compared with."""

    tensors: list[Tensors]
    """The judged tensors of the float model, by name, for each sample."""
    free_to_shift: frozenset[str]
    """Those whose rows a Softmax reads."""


def float_answers(
    model: onnx.ModelProto, plan: LayerPlan, data: CalibrationData, workers: int, folder: Path
) -> FloatAnswers:
    """Run the float model on samples.

    What does not fit in memory meanwhile goes to `folder`. Raises CalibrationError where the model
    fails on a sample.
    """
    reference = Reference(model, plan)

    def feeds(_: Level, layer: HeavyLayer) -> dict[str, np.ndarray]:
        return weight_feeds(layer, layer.weight, layer.bias)

    passes = ForwardPasses(reference, data, (), feeds, workers, folder)
    for stage in reference.stages():
        passes.run(stage)
    judged = reference.judged_tensors()
    answers = []
    for sample in range(data.samples):
        tensors = passes.tensors(FLOAT, sample)
        answers.append({name: tensors[name] for name in judged if name in tensors})
    return FloatAnswers(answers, reference.softmax_inputs())


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
    judge = _Judge(wanted)
    costs = chunk_costs(bank)
    opened = Graph(open_graph(graph, threads=1), str(bank.path))
    store = Store(bank)
    points: dict[bytes, ExpectedPoint] = {}
    try:
        for made in _plans(costs):
            store.publish(made.levels, made.pinned, made.ring_bytes, None, threads=1)

            def once(sample: int) -> tuple[float, float]:
                found, _ = execute(store, opened, data.feed(sample), names)
                error = relative_square_error(found, wanted[sample], answers.free_to_shift)
                return error, judge.answer(found, sample)

            with ThreadPoolExecutor(workers) as pool:
                judged = np.array(list(pool.map(once, range(data.samples))))
            error, agreeing = (float(f"{mean:.{_DIGITS}g}") for mean in judged.mean(0))
            points[made.levels.tobytes()] = ExpectedPoint(
                level=made.uniform_level or 0,
                bits=float(f"{made.bits_per_weight:.{_DIGITS}g}"),
                table=float(f"{made.predicted_error:.{_DIGITS}g}"),
                error=error,
                answers=agreeing,
            )
            advance()
    finally:
        store.close()
    factor, exponent = _power_law([point for point in points.values() if point.level == 0])
    ordered = sorted(points.values(), key=lambda point: (point.bits, -point.level))
    return Expected(data.samples, held_out, judge.measure, factor, exponent, tuple(ordered))


def plan_count(levels: Sequence[Level]) -> int:
    """Number of plans that are run at most."""
    return len([level for level in levels if level != FLOAT]) + _MIXTURES


def _plans(costs: ChunkCosts) -> Iterator[Plan]:
    """Every level below 32, and mixtures between them that differ."""
    levels = [level for level in costs.levels if level != FLOAT] or list(costs.levels)
    for level in levels:
        yield plan(costs, Request(level=level))
    if len(levels) < 2:
        return
    seen = set()
    # Somewhat inside: next to a uniform level a mixture is that level, or nearly.
    for bits in np.geomspace(1.2 * levels[-1], 0.85 * levels[0], _MIXTURES):
        request = Request(bits=max(float(bits), levels[-1]), highest_level=levels[0])
        made = plan(costs, request)
        if made.uniform_level is None and made.levels.tobytes() not in seen:
            seen.add(made.levels.tobytes())
            yield made


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


class _Judge:
    """How answers are told for people: as agreement of classes, or as cosine."""

    def __init__(self, wanted: Sequence[Tensors]) -> None:
        """A tensor of two axes and at least two columns holds scores of classes, unless its rows
        have norm 1; everything else is judged by its direction."""
        self._wanted = wanted
        scores = [name for name, value in wanted[0].items() if _holds_scores(value)]
        self._scores = scores[0] if scores else None
        self.measure: Measure = "agreement" if scores else "cosine"

    def answer(self, found: Tensors, sample: int) -> float:
        """Of one sample: the share of rows with the float model's class, or the mean cosine."""
        wanted = self._wanted[sample]
        if self._scores is not None:
            a, b = found[self._scores], wanted[self._scores]
            return float(np.mean(a.argmax(1) == b.argmax(1)))
        return float(np.mean([_cosine(found[name], value) for name, value in wanted.items()]))


def _holds_scores(value: np.ndarray) -> bool:
    if value.ndim != 2 or value.shape[1] < 2:
        return False
    norms = np.linalg.norm(value.astype(np.float64), axis=1)
    return not bool(np.allclose(norms, 1, atol=1e-3))


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a.astype(np.float64).ravel(), b.astype(np.float64).ravel()
    norm = float(np.linalg.norm(a) * np.linalg.norm(b))
    if not np.isfinite(norm):
        return 0.0
    return float(np.clip(a @ b / norm, -1, 1)) if norm else float(not a.any() and not b.any())
