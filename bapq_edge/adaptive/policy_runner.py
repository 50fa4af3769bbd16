"""The runner: takes one input through the stages of a policy and counts what came of it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

from ..bank.boundary import Precision
from ..engine.cut_off import TimeIsUpError
from ..engine.graph import Part
from ..errors import LateAnswerWarning, RequestError
from ..policy import Choice, Policy, PolicyContext
from ..telemetry import AnswerCounts, logger, warn_caller
from .batches import BatchTaker
from .drift import DriftDetector, ExpectedRegions

__all__ = ["Answer", "PolicyRunner", "RunPart"]

_MOST_ANSWERS = 8
"""A policy that asks for more would go on for ever."""

_AGAIN_WEIGHT = 0.2
"""Of the last time that an input was answered again, in the running mean of such times."""


_TOO_LATE = "another would have come too late"

_Stage = Literal["start", "gate", "answer"]


class RunPart(Protocol):
    """Runs a part of the graph: `planning.passes.Passes.run`.

    Gives the values by name, the bits per weight that were read, and whether a lower level stood in
    for the one of the precision. `names` are outputs of the part, None: all of them. Raises
    TimeIsUpError where it is not done at `until_s` of time.perf_counter().
    """

    def __call__(
        self,
        part: Part,
        precision: Precision,
        feed: Mapping[str, Any],
        names: Sequence[str] | None,
        *,
        until_s: float | None = None,
    ) -> tuple[dict[str, Any], float, bool]:
        """Run it."""
        ...


class Answer(NamedTuple):
    """What came of one input."""

    outputs: dict[str, Any]
    """Outputs by name: those asked for, and those that the policy reads."""
    bits: float
    """Weight bits read per weight, all passes together."""
    degraded: bool
    """Whether a lower level stood in for one that could not be read, in any pass."""
    counts: AnswerCounts
    """What statistics count of it."""


@dataclass
class _Tally:
    """What the passes of one run come to."""

    answers: int = 0
    bits: float = 0.0
    degraded: bool = False
    region: int | None = None
    regions: Sequence[int] = ()
    escalated_samples: int = 0
    whole_batch: bool = False

    @property
    def samples(self) -> int:
        """Samples of the input, as far as a policy told."""
        return max(len(self.regions), 1)

    def add_choice(self, choice: Choice | None) -> None:
        """Take note of the regions that it tells."""
        if choice is not None and choice.region is not None:
            self.region = choice.region
        if choice is not None and choice.regions is not None:
            self.regions = choice.regions

    def answer(self, outputs: dict[str, Any], late: bool) -> Answer:
        """All of it, with the outputs."""
        counts = AnswerCounts(
            region=self.region,
            escalated=self.answers > 1,
            late=late,
            samples=self.samples,
            escalated_samples=self.escalated_samples,
            whole_batch=self.whole_batch,
        )
        return Answer(outputs, self.bits, self.degraded, counts)


class PolicyRunner:
    """Steers the runs of a session by a policy. Safe to use from several threads."""

    def __init__(
        self,
        policy: Policy,
        default: Precision,
        tell: Callable[[str, str], object],
        *,
        batches: BatchTaker,
        latency_s: float | None = None,
    ) -> None:
        """`default` is run where the policy does not say; `tell(kind, reason)` records events.

        An answer that would come later than `latency_s` after the run began is not asked for.
        """
        self._policy = policy
        self._default = default
        self._tell = tell
        self._batches = batches
        self._latency_s = latency_s
        self.splits: bool = bool(getattr(policy, "splits", False))
        """Whether the policy looks between the two halves of the graph."""
        self._reads: tuple[str, ...] = tuple(getattr(policy, "reads", ()))
        self.shares: Mapping[Precision, float] = _shares_of(policy) or {default: 1.0}
        """Share of the runs that read each precision, as far as the policy tells."""
        expected = getattr(policy, "expected_regions", None)
        self._drift = DriftDetector(expected) if isinstance(expected, ExpectedRegions) else None
        self._lock = threading.Lock()
        self._rerun_s: float | None = None

    def answer(
        self,
        run: RunPart,
        feed: Mapping[str, Any],
        names: Iterable[str],
        deadline_s: float | None = None,
    ) -> Answer:
        """Answer one input; `names` are the outputs that the caller wants.

        An answer that is made again is given up `deadline_s` after the beginning, and the one
        before stands.
        """
        started_s = time.perf_counter()
        until_s = None if deadline_s is None else started_s + deadline_s
        asked = list(dict.fromkeys([*names, *self._reads]))
        tally = _Tally()

        def ask(stage: _Stage, values: Mapping[str, Any], at: Precision) -> Choice | None:
            elapsed_s = time.perf_counter() - started_s
            context = PolicyContext(stage, {**feed, **values}, at, elapsed_s, self._rerun_s)
            choice = self._choose(context)
            tally.add_choice(choice)
            return choice

        def run_part(
            part: Part,
            precision: Precision,
            values: Mapping[str, Any],
            names: Sequence[str] | None,
            until_s: float | None = None,
        ) -> dict[str, Any]:
            outputs, bits, lower = run(part, precision, values, names, until_s=until_s)
            tally.bits += bits
            tally.degraded |= lower
            return outputs

        def run_again(given: Mapping[str, Any], precision: Precision) -> dict[str, Any]:
            if not self.splits:
                return run_part("whole", precision, given, asked, until_s)
            tap = run_part("head", precision, given, None, until_s)
            return run_part("body", precision, {**given, **tap}, asked, until_s)

        choice = ask("start", {}, self._default)
        precision = self._default if choice is None else choice.precision
        if self.splits:
            tap = run_part("head", precision, feed, None)
            choice = ask("gate", tap, precision)
            precision = precision if choice is None else choice.precision
            outputs = run_part("body", precision, {**feed, **tap}, asked)
        else:
            outputs = run_part("whole", precision, feed, asked)
        while True:
            tally.answers += 1
            choice = ask("answer", outputs, precision)
            late = _TOO_LATE if choice is not None and choice.late else None
            if choice is not None and choice.precision != precision:
                late = self._lateness(time.perf_counter() - started_s, deadline_s)
                if late is None:
                    try:
                        outputs = self._answer_again(run_again, feed, outputs, choice, tally)
                        precision = choice.precision
                        continue
                    except TimeIsUpError:
                        late = "the deadline passed while another was made"
            self._note(tally, late)
            return tally.answer(outputs, late is not None)

    def _choose(self, context: PolicyContext) -> Choice | None:
        choice = self._policy.choose(context)
        logger.debug("policy at %s of %s: %s", context.stage, context.precision, choice)
        if not isinstance(choice, Choice | None):
            raise RequestError(
                f"the policy's choose() gave {type(choice).__name__}, expected Choice or None"
            )
        return choice

    def _answer_again(
        self,
        run_again: Callable[[Mapping[str, Any], Precision], dict[str, Any]],
        feed: Mapping[str, Any],
        outputs: dict[str, Any],
        choice: Choice,
        tally: _Tally,
    ) -> dict[str, Any]:
        """The outputs with the samples in doubt answered again, or all where they hang together."""
        if tally.answers == _MOST_ANSWERS:
            raise RequestError(
                f"the policy asked for more than {_MOST_ANSWERS} answers to one input"
            )
        begun_s = time.perf_counter()
        samples = choice.samples
        part = None if samples is None else self._batches.take(feed, outputs, samples)
        if samples is not None and part is not None:
            found = run_again(part, choice.precision)
            if self._batches.put_back(outputs, samples, found):
                tally.escalated_samples += len(samples)
                self._learn(time.perf_counter() - begun_s)
                return outputs
        found = run_again(feed, choice.precision)
        tally.escalated_samples += tally.samples
        tally.whole_batch |= samples is not None and len(samples) < tally.samples
        self._learn(time.perf_counter() - begun_s)
        return found

    def _lateness(self, elapsed_s: float, deadline_s: float | None) -> str | None:
        """Why another answer would be late; None: it would not."""
        limits_s = [limit for limit in (self._latency_s, deadline_s) if limit is not None]
        # Nothing is known of the first; what the base took is the least that it can take.
        rerun_s = elapsed_s if self._rerun_s is None else self._rerun_s
        return _TOO_LATE if limits_s and elapsed_s + rerun_s > min(limits_s) else None

    def _learn(self, rerun_s: float) -> None:
        before = self._rerun_s
        weight = 1.0 if before is None else _AGAIN_WEIGHT
        self._rerun_s = weight * rerun_s + (1 - weight) * (before or 0.0)

    def _note(self, tally: _Tally, late: str | None) -> None:
        if late is not None:
            reason = f"an answer in doubt stands: {late}"
            self._tell("latency", reason)
            warn_caller(reason, LateAnswerWarning)
        if self._drift is None or tally.region is None:
            return
        with self._lock:
            for region in tally.regions or (tally.region,):
                if (change := self._drift.saw(region)) is not None:
                    self._tell("drift", change)


def _shares_of(policy: Policy) -> dict[Precision, float]:
    shares = getattr(policy, "shares", None) or {}
    if not isinstance(shares, Mapping) or not all(isinstance(key, Precision) for key in shares):
        raise RequestError(
            "the policy's shares are no mapping from a Precision to the share of runs: give "
            "{Precision(level=8): 1.0}, or leave them out"
        )
    return dict(shares)
