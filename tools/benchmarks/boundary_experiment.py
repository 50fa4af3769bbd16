"""One model of `benchmarks.boundary`: its bank, its fits, and what is measured of them."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bapq_edge import Session
from bapq_edge.adaptive.boundary_model import BoundaryModel, OperatingPoint
from bapq_edge.bank.boundary import Precision
from bapq_edge.bank.reader import Bank
from bapq_edge.errors import RequestError
from bapq_tools import build_bank
from bapq_tools.boundary.fit import Fit, fit_models
from bapq_tools.boundary.rewrite import rewrite
from bapq_tools.boundary.study import Study
from benchmarks.zoo import make_model
from benchmarks.zoo.digits import INPUT_NAMES, load_digits_split, scale_images
from benchmarks.zoo.distorted import distort
from benchmarks.zoo.minilm import encode, minilm_dir
from benchmarks.zoo.sentences import load_sentences

from .cases import load_case
from .models import WORK

DIGITS = ("digits_cnn", "digits_mlp", "digits_resnet")
NAMES = (*DIGITS, "minilm")
SPLITS = 5
COPIES = 4
FITTED = {"minilm": 300}
"""Groups that a split takes to fit; 400 of the digits."""
TARGETS = (0.97, 0.99, 0.995)
GATE_BITS = (1.25, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0)
ESCALATE_BITS = {"minilm": 5.2}
"""The best point of so many bits is measured too; 3.4 of the digits."""
STATIC_BITS = (1.25, 1.5, 1.75, 2.25, 2.5, 2.75, 3.0, 3.25, 3.5, 4.5, 5.0, 5.2, 6.0)
ESCALATE = {
    "minilm": ("4:8", "4.25b:8", "4.5b:8", "4.75b:8"),
}
DIGITS_ESCALATE = ("1:8", "2:8", "4:8")
RESIDENT_SHARE = 0.35
"""Share of the bytes of level 8 that the run on the device may hold."""


@dataclass(frozen=True)
class SampleSplit:
    """Samples by number."""

    fitted: np.ndarray
    test: np.ndarray


@dataclass(frozen=True)
class Outcome:
    """Results of one operating point, or plan, on the test samples of one split."""

    bits: float
    agreement: float
    clean: float
    """Agreement on the undistorted images among them."""
    again: float = 0.0
    """Share of the samples that are answered again."""


class Experiment:
    """One model, its bank, and what the bank answers to all samples at every precision."""

    def __init__(self, name: str) -> None:
        self.name = name
        folder = WORK / name
        folder.mkdir(parents=True, exist_ok=True)
        self.model, self.bank = folder / "model.onnx", folder / "boundary.bank"
        make_model(name, str(self.model))
        built = folder / "built.bank"
        case = load_case(name, self.model)
        build_bank(
            self.model, built, calibration=case.calibration, levels=(8, 4, 2, 1), progress=False
        )
        self.bank = rewrite(built, self.bank, chunk_rows=self._chunk_rows(built))
        self.feeds, self.groups, self.clean = samples_of(name)
        self.study = Study(
            self.bank,
            self.feeds,
            self.model,
            judge=case.judged_output,
            groups=self.groups,
            progress=False,
        )
        self.static = [
            *(Precision(level=level) for level in (1, 2, 4, 8)),
            *map(_bits, STATIC_BITS),
        ]
        self.escalate = ESCALATE.get(name, DIGITS_ESCALATE)

    def _chunk_rows(self, built: Path) -> dict[str, int]:
        """Chunks of one tile where the model is small: the ring is then small, too."""
        if self.name == "minilm":
            return {}
        return {layer.name: 16 for layer in Bank.open(built).manifest.layers}

    def fits(self) -> tuple[list[SampleSplit], list[Fit]]:
        """The splits, and what is fitted to each."""
        splits = [self._split(seed) for seed in range(SPLITS)]
        return splits, [
            fit_models(self.study, rows=split.fitted, escalate=self.escalate, seed=seed)
            for seed, split in enumerate(splits)
        ]

    def measure(self, splits: list[SampleSplit], fits: list[Fit]) -> dict[str, Any]:
        """The rows of all tables."""
        return {
            "model": self.name,
            "escalate": self._escalate_rows(splits, fits),
            "gate": self._gate_rows(splits, fits),
            "targets": self._target_rows(splits, fits),
            "device": self._device_rows(splits[0], fits[0]),
        }

    def _split(self, seed: int) -> SampleSplit:
        groups = np.unique(self.groups)
        order = np.random.default_rng(seed).permutation(groups)
        fitted = np.isin(self.groups, order[: FITTED.get(self.name, 400)])
        return SampleSplit(np.flatnonzero(fitted), np.flatnonzero(~fitted))

    def outcome(self, model: BoundaryModel, point: OperatingPoint, rows: np.ndarray) -> Outcome:
        """An operating point on some samples, by what the bank answers at each precision."""
        about = model.description
        regions = self.regions(model, rows)
        precisions = [point.precisions[region] for region in regions]
        losses = np.array([self._loss(model, w)[i] for w, i in zip(precisions, rows, strict=True)])
        again = np.array(
            [about.stage == "answer" and precision != about.base for precision in precisions]
        )
        bits = np.array([self._bits(model, precision) for precision in precisions])
        clean = self.clean[rows]
        return Outcome(
            float(bits.mean()),
            1 - float(losses.mean()),
            1 - float(losses[clean].mean()),
            float(again.mean()),
        )

    def regions(self, model: BoundaryModel, rows: np.ndarray) -> np.ndarray:
        """The regions of samples, (rows,)."""
        about = model.description
        if about.stage == "answer":
            tap = self.study.answer_tap(about.base).values
        elif about.stage == "start":
            tap = self.study.input_tap(about.tap).values
        else:
            tap = self.study.tap(self._cut(model), about.base).values
        return model.regions(np.concatenate([model.features(tap[row]) for row in rows]))

    def _loss(self, model: BoundaryModel, precision: Precision) -> np.ndarray:
        about = model.description
        if about.stage != "gate":
            return self.study.losses(precision)
        return self.study.split_losses(self._cut(model), about.base, precision)

    def _cut(self, model: BoundaryModel) -> Any:
        return self.study.graph.cut(model.description.tap)

    def _bits(self, model: BoundaryModel, precision: Precision) -> float:
        about, bits = model.description, self.study.runner.bits
        if about.stage == "answer":
            return bits(precision) + (bits(about.base) if precision != about.base else 0)
        if about.stage == "gate":
            head = self._cut(model).head_layers
            return bits(about.base, slice(head)) + bits(precision, slice(head, None))
        return bits(precision)

    def static_outcome(self, most_bits: float, rows: np.ndarray) -> Outcome:
        """The plan of no more bits that agrees most on these very samples."""
        outcomes = [
            Outcome(
                self.study.runner.bits(precision),
                1 - float(self.study.losses(precision)[rows].mean()),
                1 - float(self.study.losses(precision)[rows][self.clean[rows]].mean()),
            )
            for precision in self.static
        ]
        allowed = [each for each in outcomes if each.bits <= most_bits + 1e-6]
        return max(allowed, key=lambda each: (each.agreement, -each.bits))

    def _escalate_rows(self, splits: list[SampleSplit], fits: list[Fit]) -> list[list[str]]:
        rows = []
        most_bits = ESCALATE_BITS.get(self.name, 3.4)
        for index, pair in enumerate(self.escalate):
            for asked in (*({"target_agreement": t} for t in TARGETS), {"bits": most_bits}):
                found, static = [], []
                for split, fit in zip(splits, fits, strict=True):
                    model = models_of(fit, ("answer",))[index]
                    try:
                        point = model.point(**asked)
                    except RequestError:
                        continue
                    found.append(self.outcome(model, point, split.test))
                    static.append(self.static_outcome(found[-1].bits, split.test))
                text = f"{most_bits} bits" if "bits" in asked else f"{asked['target_agreement']:g}"
                if len(found) < SPLITS:
                    rows.append([pair, text, *_refused(len(found)), *["-"] * 5])
                    continue
                rows.append(
                    [
                        pair,
                        text,
                        _mean([each.bits for each in found], 2),
                        _percent([each.again for each in found]),
                        _mean([each.agreement for each in found]),
                        _mean([each.clean for each in found]),
                        _mean([each.agreement for each in static]),
                        _mean([each.bits for each in static], 2),
                    ]
                )
        return rows

    def _gate_rows(self, splits: list[SampleSplit], fits: list[Fit]) -> list[list[str]]:
        rows = []
        for asked in GATE_BITS:
            found, static = [], []
            for split, fit in zip(splits, fits, strict=True):
                for model in models_of(fit, ("start", "gate"))[:1]:
                    try:
                        point = model.point(bits=asked)
                    except RequestError:
                        continue
                    found.append(self.outcome(model, point, split.test))
                    static.append(self.static_outcome(found[-1].bits, split.test))
            if len(found) < SPLITS:
                continue
            gains = [a.agreement - b.agreement for a, b in zip(found, static, strict=True)]
            won = float(np.mean(gains)) > float(np.std(gains))
            rows.append(
                [
                    f"{asked:g} bits",
                    _mean([each.bits for each in found], 2),
                    _mean([each.agreement for each in found]),
                    _mean([each.agreement for each in static]),
                    _mean([each.bits for each in static], 2),
                    _mean(gains),
                    "yes" if won else "no",
                ]
            )
        return rows

    def _target_rows(self, splits: list[SampleSplit], fits: list[Fit]) -> list[list[str]]:
        """Measure what a session with this target would choose, over all models of the bank."""
        rows = []
        for target in TARGETS:
            found, names = [], []
            for split, fit in zip(splits, fits, strict=True):
                points = []
                for model in models_of(fit, ("start", "gate", "answer")):
                    try:
                        points.append((model.point(target), model))
                    except RequestError:
                        continue
                if points:
                    point, model = min(points, key=lambda each: each[0].bits)
                    found.append(self.outcome(model, point, split.test))
                    names.append(model.description.name)
            if not found:
                rows.append([f"{target:g}", "refused", "-", "-", "-"])
                continue
            rows.append(
                [
                    f"{target:g}",
                    ", ".join(sorted(set(names)))
                    + ("" if len(found) == SPLITS else f"; {SPLITS - len(found)} refused"),
                    _mean([each.bits for each in found], 2),
                    _mean([each.agreement for each in found]),
                    f"{min(each.agreement for each in found):.4f}",
                ]
            )
        return rows

    def _device_rows(self, split: SampleSplit, fit: Fit) -> list[list[str]]:
        """One split, run sample by sample as an application would."""
        fitted = rewrite(
            self.bank, self.bank.with_name("fitted.bank"), boundary=fit.models, split=fit.split
        )
        eight = Bank.open(fitted).weight_bytes(8)
        most_bits = ESCALATE_BITS.get(self.name, 3.4)
        rows = []
        for policy in ("escalate", "gate"):
            if models_of(fit, ("answer",) if policy == "escalate" else ("start", "gate")):
                budget = int(RESIDENT_SHARE * eight)
                rows.append(self._on_device(fitted, policy, most_bits, split, budget, eight))
        return rows

    def _on_device(
        self, bank: Path, policy: Any, bits: float, split: SampleSplit, budget: int, eight: int
    ) -> list[str]:
        with Session(bank, policy=policy, bits=bits, threads=1, weight_budget=budget) as session:
            agreed, largest = [], 0
            seconds: dict[bool, list[float]] = {False: [], True: []}
            judge, wanted = self.study.judge, self.study.wanted
            for row in split.test:
                before = session.stats().escalated
                started_s = time.perf_counter()
                (y,) = session.run([judge.output], self.study.feeds[row])
                run_s = time.perf_counter() - started_s
                stats = session.stats()
                seconds[stats.escalated > before].append(run_s)
                largest = max(largest, stats.resident_bytes)
                agreed.append(float(judge.agreement([y], [wanted[row]])[0]))
        again = seconds[True]
        return [
            f"{policy}, {bits} bits",
            f"{stats.mean_bits_per_weight:.2f}",
            f"{stats.escalated / stats.runs:.1%}",
            f"{np.mean(agreed):.4f}",
            f"{largest / eight:.0%}",
            f"{stats.streamed_bytes / stats.runs / 1024:.1f} KiB/run",
            f"{np.median(seconds[False]) * 1e6:.0f} us",
            f"{np.median(again) * 1e6:.0f} us" if again else "-",
        ]


def samples_of(name: str) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """Feed of all samples, the group of each, and which are undistorted."""
    if name == "minilm":
        _, held_out = load_sentences()
        count = len(held_out)
        return encode(held_out, minilm_dir()), np.arange(count), np.ones(count, bool)
    kind = name.removeprefix("digits_")
    images = load_digits_split().x_test[:, 0]
    copies = [images, *(distort(images, seed) for seed in range(COPIES))]
    x = np.concatenate(copies)[:, None]
    if kind == "mlp":
        x = x.reshape(len(x), 64)
    elif kind == "resnet":
        x = scale_images(x, 32)
    groups = np.tile(np.arange(len(images)), COPIES + 1)
    return {INPUT_NAMES[kind]: x}, groups, np.arange(len(x)) < len(images)


def models_of(fit: Fit, stages: tuple[str, ...]) -> list[BoundaryModel]:
    """Boundary models of a fit."""
    return [BoundaryModel(about, arrays) for about, arrays in fit.models if about.stage in stages]


def _bits(bits: float) -> Precision:
    return Precision(bits=bits)


def _mean(values: list[float], digits: int = 4) -> str:
    return f"{np.mean(values):.{digits}f} ± {np.std(values):.{digits}f}"


def _percent(values: list[float]) -> str:
    return f"{np.mean(values):.1%} ± {np.std(values):.1%}"


def _refused(count: int) -> list[str]:
    return [f"refused in {SPLITS - count} of {SPLITS} splits"]
