"""The policies that come with the runtime: static, gate and escalate."""

from __future__ import annotations

from collections.abc import Mapping

from ..bank.boundary import Precision
from ..bank.reader import Bank
from ..errors import RequestError
from ..policy import Choice, Policy, PolicyContext
from .boundary_model import BoundaryModel, OperatingPoint
from .drift import ExpectedRegions

__all__ = ["Escalate", "Gate", "Static", "open_policy"]


class Static:
    """Every input at the same precision."""

    def __init__(self, precision: Precision) -> None:
        self.shares = {precision: 1.0}
        self._choice = Choice(precision)

    def choose(self, context: PolicyContext) -> Choice | None:
        """The one precision, then nothing more."""
        return self._choice if context.stage == "start" else None


class Gate:
    """An early tensor finds the region, and the region the precision of the rest."""

    def __init__(self, model: BoundaryModel, point: OperatingPoint) -> None:
        self.model, self.point = model, point
        self.expected_regions = _expected_regions(model)
        self.splits = model.description.stage == "gate"
        self.shares: Mapping[Precision, float] = model.share_of(point)

    def choose(self, context: PolicyContext) -> Choice | None:
        """At the tap the region's precision; before it, what the tap is computed at."""
        if context.stage != self.model.description.stage:
            return Choice(self.model.description.base) if context.stage == "start" else None
        region = self.model.region_of(context.values[self.model.description.tap])
        return Choice(self.point.precisions[region], region)


class Escalate:
    """Answers at a low precision, and again at a higher one where the answer is in doubt."""

    def __init__(
        self, model: BoundaryModel, point: OperatingPoint, latency_s: float | None = None
    ) -> None:
        """`latency_s`: an answer that would come later than this is not asked for."""
        self.model, self.point, self._latency_s = model, point, latency_s
        self.expected_regions = _expected_regions(model)
        description = model.description
        self.reads = (description.tap,)
        # Every input is answered at the base first.
        self.shares: Mapping[Precision, float] = {**model.share_of(point), description.base: 1.0}

    def choose(self, context: PolicyContext) -> Choice | None:
        """The base, then what the region of its answer asks for."""
        description = self.model.description
        if context.stage == "start":
            return Choice(description.base)
        if context.precision != description.base:
            return None
        region = self.model.region_of(context.values[description.tap])
        precision = self.point.precisions[region]
        late = precision != description.base and self._is_late(context)
        return Choice(description.base if late else precision, region, late=late)

    def _is_late(self, context: PolicyContext) -> bool:
        if self._latency_s is None:
            return False
        # Nothing is known of the first; what the base took is the least that it can take.
        rerun_s = context.elapsed_s if context.rerun_s is None else context.rerun_s
        return context.elapsed_s + rerun_s > self._latency_s


def _expected_regions(model: BoundaryModel) -> ExpectedRegions:
    return ExpectedRegions(model.region_shares, model.description.samples)


def open_policy(
    bank: Bank,
    policy: Policy | str | None,
    *,
    target_agreement: float | None = None,
    bits: float | None = None,
    latency_s: float | None = None,
) -> Policy:
    """The gate or escalate policy of a bank's boundary models, at its best operating point.

    `policy` is "gate" or "escalate", or None: whichever meets the target with fewer bits. An object
    is the caller's own policy, and is returned as it is. Raises RequestError where the bank has no
    such model, or none that can keep the target.
    """
    if not isinstance(policy, str | None):
        return policy
    stages: dict[str | None, tuple[str, ...]] = {
        "gate": ("start", "gate"),
        "escalate": ("answer",),
        None: ("start", "gate", "answer"),
    }
    models = [
        BoundaryModel.of(bank, entry.model)
        for entry in bank.manifest.boundary
        if entry.model.stage in stages[policy]
    ]
    if not models:
        wanted = "boundary model" if policy is None else f"boundary model to {policy} with"
        raise RequestError(f"{bank.path} has no {wanted}: make one with 'bapq fit'")
    found, refusals = [], []
    for model in models:
        try:
            found.append((model, model.point(target_agreement, bits)))
        except RequestError as error:
            refusals.append((model, error))
    if not found:
        # The model that comes nearest says what can be had.
        _, refusal = min(refusals, key=lambda each: _distance(each[0], bits is None))
        raise refusal
    if bits is None:
        model, point = min(found, key=lambda each: each[1].bits)
    else:
        model, point = max(found, key=lambda each: (each[1].agreement, -each[1].bits))
    if model.description.stage == "answer":
        return Escalate(model, point, latency_s)
    return Gate(model, point)


def _distance(model: BoundaryModel, by_agreement: bool) -> float:
    """Smaller for a model that can state more agreement, or be run at fewer bits."""
    if by_agreement:
        return -max(point.agreement_bound for point in model.points)
    return min(point.bits for point in model.points)
