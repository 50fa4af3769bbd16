"""The policies that come with the runtime: static, gate and escalate."""

from __future__ import annotations

from collections.abc import Mapping

from .bank.boundary import Wish
from .bank.reader import Bank
from .boundary import BoundaryModel, OperatingPoint
from .errors import RequestError
from .policy import Choice, Moment, Policy

__all__ = ["Escalate", "Gate", "Static", "open_policy"]


class Static:
    """Every input at the same wish."""

    def __init__(self, wish: Wish) -> None:
        self.mix = {wish: 1.0}
        self._choice = Choice(wish)

    def choose(self, moment: Moment) -> Choice | None:
        """The one wish, then nothing more."""
        return self._choice if moment.stage == "start" else None


class Gate:
    """An early tensor finds the region, and the region the precision of the rest."""

    def __init__(self, model: BoundaryModel, point: OperatingPoint) -> None:
        self.model, self.point = model, point
        self.splits = model.description.stage == "gate"
        self.mix: Mapping[Wish, float] = model.share_of(point)

    def choose(self, moment: Moment) -> Choice | None:
        """At the tap the region's wish; before it, what the tap is computed at."""
        if moment.stage != self.model.description.stage:
            return Choice(self.model.description.base) if moment.stage == "start" else None
        region = self.model.region_of(moment.values[self.model.description.tap])
        return Choice(self.point.wishes[region], region)


class Escalate:
    """Answers at a low precision, and again at a higher one where the answer is in doubt."""

    def __init__(
        self, model: BoundaryModel, point: OperatingPoint, latency_s: float | None = None
    ) -> None:
        """`latency_s`: an answer that would come later than this is not asked for."""
        self.model, self.point, self._latency_s = model, point, latency_s
        description = model.description
        self.reads = (description.tap,)
        # Every input is answered at the base first.
        self.mix: Mapping[Wish, float] = {**model.share_of(point), description.base: 1.0}

    def choose(self, moment: Moment) -> Choice | None:
        """The base, then what the region of its answer asks for."""
        description = self.model.description
        if moment.stage == "start":
            return Choice(description.base)
        if moment.wish != description.base:
            return None
        region = self.model.region_of(moment.values[description.tap])
        wish = self.point.wishes[region]
        late = wish != description.base and self._is_late(moment)
        return Choice(description.base if late else wish, region, late=late)

    def _is_late(self, moment: Moment) -> bool:
        if self._latency_s is None:
            return False
        # Nothing is known of the first; what the base took is the least that it can take.
        again_s = moment.elapsed_s if moment.again_s is None else moment.again_s
        return moment.elapsed_s + again_s > self._latency_s


def open_policy(
    bank: Bank,
    name: str | None,
    *,
    target_agreement: float | None = None,
    bits: float | None = None,
    latency_s: float | None = None,
) -> Policy:
    """The gate or escalate policy of a bank's boundary models, at its best operating point.

    `name` is "gate" or "escalate", or None: whichever meets the target with fewer bits. Raises
    RequestError where the bank has no such model, or none that can keep the target.
    """
    stages = {
        "gate": ("start", "gate"),
        "escalate": ("answer",),
        None: ("start", "gate", "answer"),
    }
    if name not in stages:
        raise RequestError(
            f'policy {name!r} is unknown: choose "static", "gate" or "escalate", or give an object '
            "with a method choose(moment)"
        )
    models = [
        BoundaryModel.of(bank, entry.model)
        for entry in bank.manifest.boundary
        if entry.model.stage in stages[name]
    ]
    if not models:
        wanted = "boundary model" if name is None else f"boundary model to {name} with"
        raise RequestError(f"{bank.path} has no {wanted}: make one with 'bapq fit'")
    found, refusals = [], []
    for model in models:
        try:
            found.append((model, model.point(target_agreement, bits)))
        except RequestError as error:
            refusals.append(error)
    if not found:
        raise refusals[0]
    if bits is None:
        model, point = min(found, key=lambda each: each[1].bits)
    else:
        model, point = max(found, key=lambda each: (each[1].agreement, -each[1].bits))
    if model.description.stage == "answer":
        return Escalate(model, point, latency_s)
    return Gate(model, point)
