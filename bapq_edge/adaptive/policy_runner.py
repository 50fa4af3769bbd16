"""The runner: takes one input through the stages of a policy and counts what came of it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol

from ..bank.boundary import Precision
from ..engine.graph import Part
from ..errors import RequestError
from ..policy import Choice, Policy, PolicyContext
from ..telemetry import logger
from .drift import DriftDetector, ExpectedRegions

__all__ = ["Answer", "PolicyRunner", "RunPart"]

_MOST_ANSWERS = 8
"""A policy that asks for more would go on for ever."""

_AGAIN_WEIGHT = 0.2
"""Of the last time that an input was answered again, in the running mean of such times."""


class RunPart(Protocol):
    """Runs a part of the graph: `planning.passes.Passes.run`.

    Gives the values by name, the bits per weight that were read, and whether a lower level stood in
    for the one of the precision. `names` are outputs of the part, None: all of them.
    """

    def __call__(
        self, part: Part, precision: Precision, feed: Mapping[str, Any], names: Sequence[str] | None
    ) -> tuple[dict[str, Any], float, bool]:
        """Run it."""
        ...


class Answer(NamedTuple):
    """What came of one input."""

    outputs: dict[str, Any]
    """Outputs by name: those asked for, and those that the policy reads."""
    bits: float
    """Weight bits read per weight, all passes together."""
    precision: Precision
    """Precision that the answer was made at."""
    region: int | None
    """Region of the input; None: the policy told none."""
    escalated: bool
    """Whether the input was answered again."""
    late: bool
    """Whether it was not answered again for want of time."""
    degraded: bool
    """Whether a lower level stood in for one that could not be read, in any pass."""


class PolicyRunner:
    """Steers the runs of a session by a policy. Safe to use from several threads."""

    def __init__(
        self, policy: Policy, default: Precision, tell: Callable[[str, str], object]
    ) -> None:
        """`default` is run where the policy does not say; `tell(kind, reason)` records events."""
        self._policy = policy
        self._default = default
        self._tell = tell
        self.splits: bool = bool(getattr(policy, "splits", False))
        """Whether the policy looks between the two halves of the graph."""
        self._reads: tuple[str, ...] = tuple(getattr(policy, "reads", ()))
        self.shares: Mapping[Precision, float] = _shares_of(policy) or {default: 1.0}
        """Share of the runs that read each precision, as far as the policy tells."""
        expected = getattr(policy, "expected_regions", None)
        self._drift = DriftDetector(expected) if isinstance(expected, ExpectedRegions) else None
        self._lock = threading.Lock()
        self._rerun_s: float | None = None

    def answer(self, run: RunPart, feed: Mapping[str, Any], names: Iterable[str]) -> Answer:
        """Answer one input; `names` are the outputs that the caller wants."""
        started_s = time.perf_counter()
        asked = list(dict.fromkeys([*names, *self._reads]))
        precision, region, late = self._default, None, False
        total_bits, degraded = 0.0, False

        def ask(stage: Literal["start", "gate", "answer"], values: Mapping[str, Any]) -> bool:
            """Whether the precision is another one now."""
            nonlocal precision, region, late
            elapsed_s = time.perf_counter() - started_s
            context = PolicyContext(stage, {**feed, **values}, precision, elapsed_s, self._rerun_s)
            choice = self._policy.choose(context)
            logger.debug("policy at %s of %s: %s", stage, precision, choice)
            if choice is None:
                return False
            if not isinstance(choice, Choice):
                raise RequestError(
                    f"the policy's choose() gave {type(choice).__name__}, expected Choice or None"
                )
            changed = choice.precision != precision
            precision, late = choice.precision, choice.late
            region = region if choice.region is None else choice.region
            return changed

        def run_pass(
            part: Part, values: Mapping[str, Any], names: Sequence[str] | None
        ) -> dict[str, Any]:
            nonlocal total_bits, degraded
            outputs, bits, lower = run(part, precision, values, names)
            total_bits += bits
            degraded |= lower
            return outputs

        ask("start", feed)
        for answers in range(_MOST_ANSWERS):
            begun_s = time.perf_counter()
            values: Mapping[str, Any] = feed
            if self.splits:
                tap = run_pass("head", feed, None)
                if not answers:
                    ask("gate", tap)
                values = {**feed, **tap}
            outputs = run_pass("body" if self.splits else "whole", values, asked)
            if answers:
                self._learn(time.perf_counter() - begun_s)
            made_at = precision
            if not ask("answer", outputs):
                self._note(region, late)
                again = answers > 0
                return Answer(outputs, total_bits, made_at, region, again, late, degraded)
        raise RequestError(f"the policy asked for more than {_MOST_ANSWERS} answers to one input")

    def _learn(self, rerun_s: float) -> None:
        before = self._rerun_s
        weight = 1.0 if before is None else _AGAIN_WEIGHT
        self._rerun_s = weight * rerun_s + (1 - weight) * (before or 0.0)

    def _note(self, region: int | None, late: bool) -> None:
        if late:
            self._tell("latency", "an answer in doubt stands: another would have come too late")
        if region is None or self._drift is None:
            return
        with self._lock:
            reason = self._drift.saw(region)
        if reason is not None:
            self._tell("drift", reason)


def _shares_of(policy: Policy) -> dict[Precision, float]:
    shares = getattr(policy, "shares", None) or {}
    if not isinstance(shares, Mapping) or not all(isinstance(key, Precision) for key in shares):
        raise RequestError(
            "the policy's shares are no mapping from a Precision to the share of runs: give "
            "{Precision(level=8): 1.0}, or leave them out"
        )
    return dict(shares)
