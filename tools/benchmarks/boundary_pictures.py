"""Pictures of boundary models: agreement against bits, and regions in the feature space."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from bapq_edge.adaptive.boundary_model import BoundaryModel
from bapq_tools.boundary.fit import Fit

from .boundary_experiment import Experiment, SampleSplit

__all__ = ["draw"]

_COLOURS = {"static": "#777777", "gate": "#2a7f62", "1:8": "#e0912f", "2:8": "#b8432f"}


def draw(experiment: Experiment, splits: list[SampleSplit], fits: list[Fit], folder: Path) -> None:
    """Write boundary_<model>_curve.svg and, for classifiers, boundary_<model>_regions.svg."""
    folder.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context({"svg.hashsalt": "bapq", "font.size": 9, "svg.fonttype": "none"}):
        _curve(experiment, splits, fits, folder / f"boundary_{experiment.name}_curve.svg")
        model = _watched(experiment, fits[0])
        if model is not None and model.description.scores != "none":
            target = folder / f"boundary_{experiment.name}_regions.svg"
            _regions(experiment, splits[0], model, target)


def _watched(experiment: Experiment, fit: Fit) -> BoundaryModel | None:
    answers = [each for each in fit.models if each[0].stage == "answer"]
    pairs = dict(zip(experiment.escalate, answers, strict=True))
    return BoundaryModel(*pairs["2:8"]) if "2:8" in pairs else None


def _curve(
    experiment: Experiment, splits: list[SampleSplit], fits: list[Fit], target: Path
) -> None:
    figure = Figure(figsize=(6.4, 4))
    axes = figure.add_subplot()
    for number, (split, fit) in enumerate(zip(splits, fits, strict=True)):
        lines = {
            "static": [experiment.static_outcome(b, split.test) for b in (1, 1.5, 2, 3, 4, 6, 8)]
        }
        answers = iter(experiment.escalate)
        for about, arrays in fit.models:
            model = BoundaryModel(about, arrays)
            name = next(answers) if about.stage == "answer" else "gate"
            if name in _COLOURS or experiment.name == "minilm":
                points = [experiment.outcome(model, point, split.test) for point in model.points]
                lines[name] = points
        for name, outcomes in lines.items():
            axes.plot(
                [each.bits for each in outcomes],
                [100 * each.agreement for each in outcomes],
                ".-",
                color=_COLOURS.get(name),
                alpha=1.0 if number == 0 else 0.25,
                label=name.replace(":", " → ") if number == 0 else None,
                linewidth=1,
            )
    axes.set_xlabel("weight bits read per weight, mean")
    axes.set_ylabel("agreement with float32, %")
    axes.set_title(f"{experiment.name}: samples not seen, five splits")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(target, metadata={"Date": None}, bbox_inches="tight", dpi=110)


def _regions(
    experiment: Experiment, split: SampleSplit, model: BoundaryModel, target: Path
) -> None:
    rows = split.test
    taps = experiment.study.answer_tap(model.description.base).values
    features = model.features(np.concatenate([taps[row] for row in rows]))
    regions = model.regions(features)
    margin, entropy = features[:, -2], features[:, -1]
    lost = experiment.study.losses(model.description.base)[rows] > 0
    figure = Figure(figsize=(6.4, 4))
    axes = figure.add_subplot()
    dots = axes.scatter(
        margin, entropy, c=regions, cmap="RdYlGn", s=6, linewidths=0, rasterized=True
    )
    axes.scatter(
        margin[lost], entropy[lost], marker="x", color="black", s=30, linewidths=1,
        label="answer differs from float32",
    )  # fmt: skip
    figure.colorbar(dots, label="region, the riskiest first")
    axes.set_xlabel("margin of the scores at 2 bits")
    axes.set_ylabel("entropy, nats")
    axes.set_title(f"{experiment.name}: regions of the answer at 2 bits, samples not seen")
    axes.legend()
    figure.savefig(target, metadata={"Date": None}, bbox_inches="tight", dpi=110)
