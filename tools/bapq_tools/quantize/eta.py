"""How much of the quantizing is done: guessed from shapes at first, then from what was seen."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from bapq_edge.bank.layout import Level

from ..calibration.forward_passes import FLOAT, Chains, run
from ..calibration.input_statistics import row_count, rows_wanted
from ..calibration.reference_model import Stage, observed, observed_use
from ..calibration.samples import CalibrationData
from ..onnx_graph.ir import HeavyLayer
from .sensitivity import SAMPLES, measured_levels

_TRUST = 0.02
"""Share of a kind of work after which its own speed counts as much as that of all work."""


class Effort:
    """Keeps what is planned and done of each kind of work, in guessed and in true seconds.

    Guesses of one kind may all be wrong by the same factor; what is left of it is then told by the
    time that it has taken so far.
    """

    def __init__(self, advance: Callable[[float], None] = lambda share: None) -> None:
        """`advance` is told the share of the whole done since its last call."""
        self._advance = advance
        self._told = 0.0
        self._planned: Counter[str] = Counter()
        self._done: Counter[str] = Counter()
        self._took: Counter[str] = Counter()

    def plan(self, kind: str, guess_s: float) -> None:
        """Announce work."""
        self._planned[kind] += guess_s

    @contextlib.contextmanager
    def doing(self, kind: str, guess_s: float) -> Iterator[None]:
        """Context of planned work."""
        started_s = time.perf_counter()
        yield
        self._took[kind] += time.perf_counter() - started_s
        self._done[kind] += guess_s
        if self.share > self._told:
            self._advance(self.share - self._told)
            self._told = self.share

    @property
    def share(self) -> float:
        """What is done of all that is planned, 0 to 1, by the time it takes."""
        took_s = sum(self._took.values())
        if not took_s:
            return 0.0
        speed = took_s / max(sum(self._done.values()), 1e-9)
        left_s = 0.0
        for kind, planned in self._planned.items():
            if planned <= self._done[kind]:
                continue
            trust = _TRUST * planned
            own = (self._took[kind] + trust * speed) / (self._done[kind] + trust)
            left_s += own * (planned - self._done[kind])
        return took_s / (took_s + left_s)


@dataclass(frozen=True)
class StageCosts:
    """Guessed seconds of one stage, on one core."""

    forward_s: float
    """one sample in one chain"""
    look_s: float
    """statistics of all layers"""
    round_s: dict[str, float] = field(default_factory=dict)
    """by layer"""


def costs_of(chains: Chains, stages: Sequence[Stage]) -> list[StageCosts]:
    """Costs of every stage; runs one sample through the float model to know times and shapes."""
    costs = []
    tensors = chains.tensors(FLOAT, 0)
    for stage in stages:
        forward_s = 0.0
        outputs = sorted(stage.writes)
        if stage.nodes and outputs:
            read = {name: tensors[name] for name in stage.reads}
            session = chains.session(stage.nodes, read, outputs)
            feeds = {**chains.weight_feeds(FLOAT, stage.nodes), **read}
            tensors.update(run(session, outputs, feeds, 0))  # the first run takes longer
            started_s = time.perf_counter()
            run(session, outputs, feeds, 0)
            forward_s = time.perf_counter() - started_s
        tensors = {name: value for name, value in tensors.items() if name in stage.live}
        look_s, alike = 0.0, set()
        for layer in stage.layers:
            if not observed(layer) or _is_gathered(layer):
                continue
            use = observed_use(layer)
            x, columns = tensors[use.activation_input], layer.weight.shape[1]
            groups = use.conv.group if use.conv else 1
            seen = min(row_count(x, use.conv) * chains.samples, rows_wanted(columns))
            look_s += _look_s(seen, *layer.weight.shape, groups, use.activation_input in alike)
            alike.add(use.activation_input)
        rounds = {layer.name: round_s(layer, observed(layer)) for layer in stage.layers}
        costs.append(StageCosts(forward_s, look_s, rounds))
    return costs


def output_errors_s(
    levels: Sequence[Level], later: Sequence[StageCosts], data: CalibrationData
) -> float:
    """Guess for measuring what a layer's levels do to the outputs; `later` stages are run."""
    runs = len(measured_levels(levels)) * min(SAMPLES, data.samples)
    return runs * sum(costs.forward_s for costs in later)


def round_s(layer: HeavyLayer, calibrated: bool) -> float:
    """Guess for choosing a layer's codes; fitted to times of 64x64 to 512x4608 weights."""
    rows, columns = layer.weight.shape
    if not calibrated or _is_gathered(layer):
        return 3e-7 * rows * columns
    return columns * (5.4e-11 * columns**2 + 9.8e-10 * rows * columns + 8.3e-7 * rows + 1.2e-4)


def _look_s(seen: int, rows: int, columns: int, groups: int, again: bool) -> float:
    """Guess for the statistics of a layer, `again` where another has the same input."""
    gram = 0.0 if again else 0.5 * seen * columns**2
    drift = min(seen * columns**2 + rows * columns**2, 2 * seen * rows * columns // groups)
    return groups * (1e-10 * (gram + drift) + 3e-8 * seen * columns)


def _is_gathered(layer: HeavyLayer) -> bool:
    return any(use.operator == "Gather" for use in layer.uses)
