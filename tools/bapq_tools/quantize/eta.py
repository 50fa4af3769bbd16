"""The progress of the quantizing: guessed from sizes, corrected by the time that work takes."""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterator

from ..onnx_graph.ir import HeavyLayer


class Eta:
    """Tells the share of the whole work that is done, each kind of work by its speed so far."""

    def __init__(self, advance: Callable[[float], None]) -> None:
        """`advance` is told the share that was done since its last call."""
        self._advance, self._told = advance, 0.0
        self._planned_s: defaultdict[str, float] = defaultdict(float)  # by kind, as guessed
        self._done_s: defaultdict[str, float] = defaultdict(float)  # of this, by the same guess
        self._took_s: defaultdict[str, float] = defaultdict(float)

    def plan(self, kind: str, guess_s: float) -> None:
        """Announce work."""
        self._planned_s[kind] += guess_s

    @contextlib.contextmanager
    def doing(self, kind: str, guess_s: float) -> Iterator[None]:
        """Context of planned work."""
        started_s = time.perf_counter()
        yield
        self._took_s[kind] += time.perf_counter() - started_s
        self._done_s[kind] += guess_s
        took_s = sum(self._took_s.values())
        share = took_s / (took_s + sum(map(self._left_s, self._planned_s)))
        if share > self._told:
            self._advance(share - self._told)
            self._told = share

    def _left_s(self, kind: str) -> float:
        planned_s, done_s = self._planned_s[kind], self._done_s[kind]
        trust_s = 0.02 * planned_s + 1e-9  # after so much, its own speed counts more than the guess
        return (planned_s - done_s) * (self._took_s[kind] + trust_s) / (done_s + trust_s)


def forward_s(layers: int, runs: int) -> float:
    """Guess for so many runs of a sample through some layers."""
    return 1e-4 * layers * runs


def statistics_s(layer: HeavyLayer, runs: int) -> float:
    """Guess for the statistics of a layer's input, over so many runs of a sample."""
    return runs * (1e-4 + 2.5e-10 * float(layer.weight.shape[1]) ** 2)


def codes_s(layer: HeavyLayer, calibrated: bool) -> float:
    """Guess for choosing a layer's codes on one core."""
    return 1e-9 * layer.weight.size * (layer.weight.shape[1] + 1000 if calibrated else 300)
