"""A fitted boundary model, and its report."""

from __future__ import annotations

from dataclasses import dataclass

from bapq_edge.adaptive.boundary_model import BoundaryModel, OperatingPoint
from bapq_edge.bank.boundary import Boundary, BoundaryArrays

from .report import ModelReport, PointReport
from .taps import Cut

__all__ = ["FittedModel"]


@dataclass(frozen=True)
class FittedModel:
    """A fitted boundary model."""

    model: Boundary
    arrays: BoundaryArrays
    cut: Cut | None
    """Where it splits the graph, if it does."""

    @property
    def points(self) -> list[OperatingPoint]:
        """The operating points, by rising bits."""
        return BoundaryModel(self.model, self.arrays).points

    def report(self, target: float | None) -> ModelReport:
        """Report the model, with the point that the device would choose for the target."""
        device, model = BoundaryModel(self.model, self.arrays), self.model
        chosen = None
        if target is not None:
            kept = [i for i, point in enumerate(device.points) if point.agreement_bound >= target]
            chosen = kept[0] if kept else None
        return ModelReport(
            name=model.name,
            stage=model.stage,
            tap=model.tap,
            base=str(model.base),
            head_share=self.cut.share if self.cut else 0.0,
            kind=model.kind,
            features=model.all_features,
            regions=model.regions,
            precisions=tuple(map(str, model.precisions)),
            mix=self.arrays["mix"].tolist(),
            loss=self.arrays["loss"].tolist(),
            loss_bound=self.arrays["loss_bound"].tolist(),
            points=[
                PointReport(
                    point.bits,
                    point.agreement,
                    point.agreement_bound,
                    {str(precision): share for precision, share in device.share_of(point).items()},
                )
                for point in device.points
            ],
            chosen=chosen,
        )
