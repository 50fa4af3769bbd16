"""How much of the quantizing is done: guessed from sizes, corrected by the time that work takes."""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ..onnx_graph.ir import HeavyLayer

_TRUST = 0.02
"""Share of a kind of work after which its own speed counts more than the guess."""


@dataclass
class _Work:
    """One kind of work, in guessed seconds, and the seconds that it has taken so far."""

    planned_s: float = 0.0
    done_s: float = 0.0
    took_s: float = 0.0

    @property
    def left_s(self) -> float:
        """The time left, by the speed so far: guesses of a kind are wrong by about one factor."""
        trust_s = _TRUST * self.planned_s + 1e-9
        return (self.planned_s - self.done_s) * (self.took_s + trust_s) / (self.done_s + trust_s)


class Eta:
    """Tells the share of the whole work that is done, by the time that it takes."""

    def __init__(self, advance: Callable[[float], None]) -> None:
        """`advance` is told the share that was done since its last call."""
        self._advance, self._told = advance, 0.0
        self._kinds: defaultdict[str, _Work] = defaultdict(_Work)

    def plan(self, kind: str, guess_s: float) -> None:
        """Announce work."""
        self._kinds[kind].planned_s += guess_s

    @contextlib.contextmanager
    def doing(self, kind: str, guess_s: float) -> Iterator[None]:
        """Context of planned work."""
        started_s = time.perf_counter()
        yield
        self._kinds[kind].took_s += time.perf_counter() - started_s
        self._kinds[kind].done_s += guess_s
        took_s = sum(work.took_s for work in self._kinds.values())
        share = took_s / (took_s + sum(work.left_s for work in self._kinds.values()))
        if share > self._told:
            self._advance(share - self._told)
            self._told = share


def forward_s(layers: int, samples: int) -> float:
    """Guess for running samples through some layers."""
    return 1e-4 * layers * samples


def statistics_s(layer: HeavyLayer, passes: int) -> float:
    """Guess for the statistics of a layer's input."""
    columns: int = layer.weight.shape[1]
    return 1e-6 * passes * columns**2


def codes_s(layer: HeavyLayer, calibrated: bool) -> float:
    """Guess for choosing a layer's codes on one core."""
    columns = layer.weight.shape[1]
    return 1e-9 * layer.weight.size * (columns + 1000 if calibrated else 300)
