"""The policies that come with the runtime: static, gate and escalate."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ..bank.boundary import Precision, StaticPoint
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
        regions = self.model.regions_of(context.values[self.model.description.tap])
        region = self.model.most_in_doubt(regions)
        return Choice(self.point.precisions[region], region, regions=regions.tolist())


class Escalate:
    """Answers at a low precision, and again at a higher one where the answer is in doubt.

    Of a batch the samples in doubt are asked for again, at the precision of the one most in doubt.
    """

    def __init__(self, model: BoundaryModel, point: OperatingPoint) -> None:
        self.model, self.point = model, point
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
        regions = self.model.regions_of(context.values[description.tap])
        region = self.model.most_in_doubt(regions)
        doubted = [self.point.precisions[each] != description.base for each in regions]
        return Choice(
            self.point.precisions[region],
            region,
            samples=np.flatnonzero(doubted).tolist(),
            regions=regions.tolist(),
        )


def _expected_regions(model: BoundaryModel) -> ExpectedRegions:
    return ExpectedRegions(model.region_shares, model.description.samples)


def open_policy(
    bank: Bank,
    policy: Policy | str | None,
    *,
    target_agreement: float | None = None,
    bits: float | None = None,
) -> Policy:
    """The gate or escalate policy of a bank's boundary models, at its best operating point.

    `policy` is "gate" or "escalate", or None: whatever meets the target with the fewest bits, a
    precision for all inputs that a fit has measured included. An object is the caller's own policy,
    and is returned as it is. Raises RequestError where the bank has no such model, or none that can
    keep the target.
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
    static = None
    if policy is None and target_agreement is not None:
        static = _static_point(bank, target_agreement)
    if not models and static is None:
        wanted = "boundary model" if policy is None else f"boundary model to {policy} with"
        raise RequestError(f"{bank.path} has no {wanted}: make one with 'bapq fit'")
    found, refusals = [], []
    for model in models:
        try:
            found.append((model, model.point(target_agreement, bits)))
        except RequestError as error:
            refusals.append((model, error))
    if not found and static is None:
        # The model that comes nearest says what can be had.
        _, refusal = min(refusals, key=lambda each: _distance(each[0], bits is None))
        raise refusal
    if static is not None and all(static.bits <= point.bits for _, point in found):
        return Static(static.precision)
    if bits is None:
        model, point = min(found, key=lambda each: each[1].bits)
    else:
        model, point = max(found, key=lambda each: (each[1].agreement, -each[1].bits))
    if model.description.stage == "answer":
        return Escalate(model, point)
    return Gate(model, point)


def _static_point(bank: Bank, target_agreement: float) -> StaticPoint | None:
    """The precision of fewest bits that was measured to keep the target for all inputs."""
    points = [
        point for point in bank.manifest.static or () if point.agreement_bound >= target_agreement
    ]
    return min(points, key=lambda point: point.bits, default=None)


def _distance(model: BoundaryModel, by_agreement: bool) -> float:
    """Smaller for a model that can state more agreement, or be run at fewer bits."""
    if by_agreement:
        return -max(point.agreement_bound for point in model.points)
    return min(point.bits for point in model.points)
