"""The report of a fit, for people and for programs."""

from __future__ import annotations

from dataclasses import dataclass

from bapq_edge.units import counted

__all__ = ["FitReport", "ModelReport", "PointReport", "StaticReport"]


@dataclass(frozen=True)
class StaticReport:
    """Every input at one precision, on the held-out samples."""

    precision: str
    bits: float
    agreement: float
    agreement_bound: float
    """Lower bound at the fit's confidence."""


@dataclass(frozen=True)
class PointReport:
    """An operating point, on the held-out samples."""

    bits: float
    """Mean weight bits read per weight and run."""
    agreement: float
    agreement_bound: float
    shares: dict[str, float]
    """Share of the inputs, by the precision that they end at."""


@dataclass(frozen=True)
class ModelReport:
    """One boundary model."""

    name: str
    stage: str
    tap: str
    base: str
    head_share: float
    """Share of the weights before the tap of a gate."""
    kind: str
    features: int
    regions: int
    precisions: tuple[str, ...]
    mix: list[float]
    """Share of the held-out samples by region, the riskiest first."""
    loss: list[list[float]]
    """Loss by region and precision, 1 - agreement."""
    loss_bound: list[list[float]]
    """Upper bounds of the loss, each at the fit's confidence."""
    points: list[PointReport]
    """Operating points, by rising bits."""
    chosen: int | None
    """Index of the point of fewest bits that keeps the target."""


@dataclass(frozen=True)
class FitReport:
    """What `fit` found and wrote."""

    bank: str
    agreement: str
    """How answers were compared."""
    samples: int
    held_out: int
    """Number of samples that nothing was fitted to; all figures are theirs."""
    groups: int
    """Number of groups of the held-out samples."""
    confidence: float
    target_agreement: float | None
    batched: bool
    """Whether samples of a batch were seen not to touch each other, so that those in doubt are
    answered again alone; false, too, where no model escalates."""
    static: list[StaticReport]
    models: list[ModelReport]
    """All that were fitted; those of `left_out` are not in the bank."""
    static_plan: StaticReport | None
    """The plan for all inputs of fewest bits that keeps the target, of those tried in order."""
    left_out: list[str]
    """Names of models that a static plan makes needless: it keeps the target with no more bits."""

    def __str__(self) -> str:
        """List what people want to know: one line per precision and operating point."""
        lines = [
            f"{self.bank}: {self.agreement}, {counted(self.samples, 'sample')}, "
            f"{self.held_out} held out; bounds at confidence {self.confidence:g}"
        ]
        lines += [
            f"static {each.precision}: {_figures(each)}"
            for each in sorted(self.static, key=lambda each: each.bits)
        ]
        for model in self.models:
            base = f" at {model.base}" if model.stage != "start" else ""
            lines.append(
                f"{model.name}: {counted(model.regions, 'region')} by {model.kind} of "
                f"{counted(model.features, 'feature')} of {model.tap!r}{base}, "
                f"{counted(len(model.points), 'operating point')}"
            )
            for i in _shown(model):
                point = model.points[i]
                shares = ", ".join(
                    f"{precision} {share:.0%}" for precision, share in point.shares.items()
                )
                kept = f", keeps {self.target_agreement:g}" if i == model.chosen else ""
                lines.append(f"  {_figures(point)}; {shares}{kept}")
        if (plan := self.static_plan) is not None and self.left_out:
            lines.append(
                f"{', '.join(self.left_out)} left out: {plan.precision} for all inputs keeps "
                f"{self.target_agreement:g} with no more bits, {plan.bits:.2f}; --keep-all keeps "
                "what was fitted"
            )
        if any(
            model.stage == "answer" and model.name not in self.left_out for model in self.models
        ):
            again = "only its samples in doubt are" if self.batched else "all of it is"
            lines.append(f"of a batch {again} answered again")
        return "\n".join(lines)


_SHOWN_POINTS = 5


def _shown(model: ModelReport) -> list[int]:
    """The indices of the chosen point and of some others, spread over the bits."""
    last = len(model.points) - 1
    spread = {round(i * last / (_SHOWN_POINTS - 1)) for i in range(_SHOWN_POINTS)}
    return sorted(spread | ({model.chosen} if model.chosen is not None else set()))


def _figures(each: StaticReport | PointReport) -> str:
    bound = f"(at least {each.agreement_bound:.4f})"
    return f"{each.bits:.2f} bits, agreement {each.agreement:.4f} {bound}"
