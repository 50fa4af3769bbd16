"""Rows that inputs of one class can do without: what skipping them saves, and what it costs.

    PYTHONPATH=tools python -m benchmarks.region_pruning [NAME ...] [--format table|md|json]

A split holds 300 of the 600 test images out, with a distorted copy of each. The fit sees the other
images, test, calibration and training, with four distorted copies; half of them choose what is
skipped. Five splits; figures are mean and standard deviation over them, times are of the first one.
Banks hold level 8; one thread.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bapq_edge import Session
from bapq_edge.adaptive.boundary_model import BoundaryModel
from bapq_edge.bank.boundary import Precision
from bapq_edge.bank.layout import Level
from bapq_edge.bank.reader import Bank
from bapq_edge.engine.executor import execute
from bapq_edge.engine.graph import Graph, open_graph
from bapq_edge.engine.store import Store
from bapq_tools import build_bank
from bapq_tools.boundary.study import Study
from bapq_tools.build_support.progress import Progress
from bapq_tools.row_skipping.row_gate import RowGate, fit_row_gate
from benchmarks.zoo import make_model
from benchmarks.zoo.digits import INPUT_NAMES, load_digits_split, scale_images
from benchmarks.zoo.distorted import distort

from .cases import load_case
from .models import WORK
from .tables import add_format, add_names, print_table

NAMES = ("digits_cnn", "digits_resnet", "digits_mlp")
LEVEL: Level = 8
SPLITS = 5
COPIES = 4
STRENGTH = 0.5
"""Strength of the distortions: a device meets inputs a little unlike those of the data set."""
HELD_OUT = 300
TOLERANCE = 0.0075
DOUBT = 0.2
TIMED_INPUTS = 60
TIMED_ROUNDS = 9


@dataclass(frozen=True)
class Outcome:
    """Results of one split."""

    share: dict[str, float]
    """Share of skipped rows over the held-out images, by layers of which some are skipped."""
    rows: float
    """Share of all rows of these layers."""
    weights: float
    """Share of all weights of the bank."""
    lost: tuple[float, float]
    """Agreement lost by skipping, of the held-out images and of distorted copies."""
    accuracy_lost: float


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="benchmarks.region_pruning")
    add_names(parser, NAMES)
    add_format(parser, "json")
    arguments = parser.parse_args()
    names = arguments.names or NAMES
    results = []
    with Progress(True).stage("splits", SPLITS * len(names)) as advance:
        for name in names:
            results.append(measure(name, advance))
    if arguments.format == "json":
        print(json.dumps(results, indent=1))
        return 0
    for title, heads, key in TABLES:
        rows = [[each["model"], *row] for each in results for row in each[key]]
        print_table(title, ("model", *heads), rows, arguments.format)
    return 0


TABLES = (
    (
        f"Rows skipped, points lost on {HELD_OUT} images not seen",
        (
            "rows skipped",
            "of all weights",
            "agreement lost",
            "distorted",
            "right answers lost",
            "worst split",
        ),
        "summary",
    ),
    ("Rows skipped by layer, mean of the splits", ("layer", "splits", "skipped"), "layers"),
    (
        "Time of a run and of those layers in it; bytes read by a run that streams all weights",
        ("", "run", "those layers", "read"),
        "cost",
    ),
)


def measure(name: str, advance: Callable[[], None]) -> dict[str, Any]:
    """Rows of all tables."""
    folder = WORK / name
    folder.mkdir(parents=True, exist_ok=True)
    model, built, out = (folder / f for f in ("model.onnx", "level8.bank", "rows.bank"))
    make_model(name, str(model))
    build_bank(
        model,
        built,
        calibration=load_case(name, model).calibration,
        levels=(LEVEL,),
        progress=False,
    )
    feeds, groups, labels = samples_of(name)
    outcomes, cost = [], []
    with Study(built, feeds, model, groups=groups, progress=False) as study:
        for seed in range(SPLITS):
            fitted, clean, distorted = split_of(groups, seed)
            gate = fit_row_gate(study, fitted, LEVEL, tolerance=TOLERANCE, doubt=DOUBT, seed=seed)
            gate.write(built, out)
            outcomes.append(judged(study, gate, out, clean, distorted, labels))
            if seed == 0 and gate.pruning.skipped_rows:
                cost = costs(study, gate, out, clean[:TIMED_INPUTS])
            advance()
    layers = sorted({layer for each in outcomes for layer in each.share})
    return {
        "model": name,
        "summary": [
            [
                _percent([each.rows for each in outcomes]),
                _percent([each.weights for each in outcomes]),
                _points([each.lost[0] for each in outcomes]),
                _points([each.lost[1] for each in outcomes]),
                _points([each.accuracy_lost for each in outcomes]),
                f"{100 * max(max(each.lost[0], each.accuracy_lost) for each in outcomes):.2f}",
            ]
        ],
        "layers": [
            [layer, str(len(found)), f"{100 * np.mean(found):.0f} %"]
            for layer in layers
            if (found := [each.share[layer] for each in outcomes if layer in each.share])
        ],
        "cost": cost,
    }


def samples_of(name: str) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """Feed of all samples and the image that each shows, test images first; labels of those."""
    kind = name.removeprefix("digits_")
    split = load_digits_split()
    images = np.concatenate([split.x_test, split.x_calibration, split.x_train])[:, 0]
    copies = [images, *(distort(images, seed, STRENGTH) for seed in range(COPIES))]
    x = np.concatenate(copies)[:, None]
    if kind == "mlp":
        x = x.reshape(len(x), 64)
    elif kind == "resnet":
        x = scale_images(x, 32)
    groups = np.tile(np.arange(len(images)), COPIES + 1)
    return {INPUT_NAMES[kind]: x}, groups, split.y_test


def split_of(groups: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Numbers of the samples to fit to, of held-out images, and of a distorted copy of each."""
    images = int(groups.max()) + 1
    test = np.random.default_rng(seed).permutation(600)[:HELD_OUT]
    fitted = np.flatnonzero(~np.isin(groups, test))
    return fitted, test, test + images


def judged(
    study: Study,
    gate: RowGate,
    bank: Path,
    clean: np.ndarray,
    distorted: np.ndarray,
    labels: np.ndarray,
) -> Outcome:
    """Measure the device's answers to held-out samples."""
    answers: dict[int, int] = {}
    regions: dict[int, int] = {}
    bits = float(gate.arrays["outlook"][0, 0])  # of the point that skips
    with Session(bank, policy="gate", bits=bits, threads=1) as session:
        for i in (*clean, *distorted):
            (output,) = session.run([study.judge.output], study.feeds[i])
            answers[i], region = int(output.argmax()), session.stats().region
            assert region is not None
            regions[i] = region
    opened = Bank.open(bank)
    skipped = {
        name: found[[regions[i] for i in clean]]
        for name, found in gate.pruning.skipped_rows.items()
    }
    rows = sum(opened.layer(name).stored_rows for name in skipped)
    weights = sum(found.mean() * opened.layer(name).columns for name, found in skipped.items())
    before = np.array([int(answer.argmax()) for answer in study.answers(Precision(level=LEVEL))])
    lost = []
    for part in (clean, distorted):
        now = np.array([answers[i] for i in part]) == study.classes[part]
        lost.append(float((before[part] == study.classes[part]).mean() - now.mean()))
    right = np.mean([answers[i] == labels[i] for i in clean])
    return Outcome(
        {
            name: float(found.mean()) / opened.layer(name).stored_rows
            for name, found in skipped.items()
        },
        float(sum(found.mean() for found in skipped.values())) / max(rows, 1),
        float(weights) / opened.weights,
        (lost[0], lost[1]),
        float((before[clean] == labels[clean]).mean() - right),
    )


class Engine:
    """A bank's whole graph and its store, on one thread and without a session around them."""

    def __init__(self, path: Path, values: np.ndarray | None = None) -> None:
        """`values` (regions, rows) stand in for skipped rows."""
        bank = Bank.open(path)
        self._store = Store(bank)
        self._graph = Graph(open_graph(bank.graph_bytes(), self._store, 1), str(path))
        sizes = bank.chunks("p4")["bytes"] + bank.chunks("r8")["bytes"]
        self.chunks, self._ring_bytes = len(sizes), 3 * int(sizes.max())
        rows = sum(layer.stored_rows for layer in bank.manifest.layers)
        for each in np.zeros((1, rows), np.float32) if values is None else values:
            self._store.add_region(each)

    def plan(self, skipped: np.ndarray, region: int, streamed: bool = False) -> Callable[[], None]:
        """Make runs skip these chunks, and pin the others or stream them."""
        return partial(
            self._store.publish,
            np.where(skipped, 0, LEVEL).astype(np.uint8),
            np.full(self.chunks, not streamed),
            self._ring_bytes if streamed else 0,
            None,
            1,
            kept=np.full(self.chunks, 0 if streamed else 255, np.uint8),
            region=region,
        )

    def run(self, feed: dict[str, np.ndarray]) -> float:
        """One run; how long it took, in seconds."""
        started_s = time.perf_counter()
        execute(self._store, self._graph, feed)
        return time.perf_counter() - started_s

    @property
    def read_bytes(self) -> int:
        """Since it was opened."""
        return self._store.stats().read_bytes

    def close(self) -> None:
        """Give the memory back."""
        self._store.close()


def costs(study: Study, gate: RowGate, bank: Path, samples: np.ndarray) -> list[list[str]]:
    """Rows of a table: the bank as built, and its rows skipped by region.

    The time of the layers of which rows are skipped is what a run takes longer than one that skips
    all their chunks.
    """
    tap = (
        study.tap(study.graph.cuts()[0], Precision(level=LEVEL))
        if gate.split
        else study.input_tap(gate.model.tap)
    )
    device = BoundaryModel(gate.model, gate.arrays)
    regions = [device.region_of(tap.values[i]) for i in samples]
    plain, empty, skipping = (
        Engine(study.bank.path),
        Engine(study.bank.path),
        Engine(bank, gate.arrays["row_values"]),
    )
    masks = gate.arrays["skipped"] > 0
    none = np.zeros(plain.chunks, bool)
    opened = Bank.open(study.bank.path)
    without = none.copy()
    for name in gate.pruning.skipped_rows:
        without[opened.layer(name).chunk_range] = True
    empty.plan(without, 0)()
    timed = ("built", "skipped", "switched", "empty", "region")
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    read: dict[str, list[int]] = {"built": [], "skipped": []}
    for i, region in zip(samples, regions, strict=True):
        feed = dict(study.feeds[i])
        plan, other = skipping.plan(masks[region], region), skipping.plan(masks[0], 0)
        plain.plan(none, 0)()
        plan()
        for engine in (plain, skipping, empty):
            engine.run(feed)  # brings what is missing into memory
        rounds: dict[str, list[float]] = {name: [] for name in seconds}
        for _ in range(TIMED_ROUNDS):
            rounds["built"].append(plain.run(feed))
            rounds["skipped"].append(skipping.run(feed))
            rounds["empty"].append(empty.run(feed))
        for _ in range(TIMED_ROUNDS):
            other()
            skipping.run(feed)
            started_s = time.perf_counter()
            plan()
            skipping.run(feed)
            rounds["switched"].append(time.perf_counter() - started_s)
            started_s = time.perf_counter()
            device.region_of(tap.values[i])
            rounds["region"].append(time.perf_counter() - started_s)
        for name, found in rounds.items():
            seconds[name].append(float(np.median(found)))
        plain.plan(none, 0, streamed=True)()
        skipping.plan(masks[region], region, streamed=True)()
        for name, engine in (("built", plain), ("skipped", skipping)):
            engine.run(feed)
            before = engine.read_bytes
            for _ in range(TIMED_ROUNDS):
                engine.run(feed)
            read[name].append((engine.read_bytes - before) // TIMED_ROUNDS)
    for engine in (plain, empty, skipping):
        engine.close()
    rows = []
    whole = {name: float(np.mean(found)) for name, found in seconds.items()}
    layers = {name: found - whole["empty"] for name, found in whole.items()}
    bytes_ = {name: float(np.mean(found)) for name, found in read.items()}
    for name, text in (
        ("built", "as built"),
        ("skipped", "rows skipped"),
        ("switched", "and plan switched"),
    ):
        now = bytes_.get(name)
        rows.append(
            [
                text,
                _change(whole[name], whole["built"], 1e6, "µs"),
                _change(layers[name], layers["built"], 1e6, "µs"),
                "-" if now is None else _change(now, bytes_["built"], 1 / 1024, "KiB"),
            ]
        )
    rows.append(["finding the region", f"{1e6 * whole['region']:.0f} µs", "-", "-"])
    return rows


def _change(now: float, before: float, factor: float, unit: str) -> str:
    text = f"{factor * now:.0f} {unit}"
    return text if now == before else f"{text} ({100 * (now / before - 1):+.0f} %)"


def _percent(values: list[float]) -> str:
    return f"{100 * np.mean(values):.1f} ± {100 * np.std(values):.1f} %"


def _points(values: list[float]) -> str:
    return f"{100 * np.mean(values):.2f} ± {100 * np.std(values):.2f}"


if __name__ == "__main__":
    sys.exit(main())
