"""Finds the chunks that a region can skip, by skipping them.

Each chunk by itself says what it costs; then the cheapest are skipped together, as many as keep the
answers of the region's held-out samples.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from bapq_edge.bank.boundary import Precision
from bapq_edge.bank.layer import Layer
from bapq_edge.bank.reader import Bank
from bapq_edge.errors import BoundaryWarning

from ..boundary.runner import Feed, Runner, Skip
from ..calibration.reference_model import logits_tensor
from .grouping import most_skipped

__all__ = [
    "Agreement",
    "Answers",
    "RegionSkips",
    "SkipSearch",
    "chunk_weights",
    "worthwhile_layers",
]

Answers = Sequence[NDArray[Any]]
"""One array per sample."""

Agreement = Callable[[Answers, Answers], NDArray[np.float64]]
"""Agreement of answers with those of the reference, from 0 to 1: (n,)."""

_TRIED_SAMPLES = 24
"""Number of samples of a region that the cost of each chunk is measured by."""

_STEPS = 12
"""Number of steps in which the chunks that a region may skip are tried."""

_PAYING_SHARE = 0.2
"""Least share of the rows of a layer that is skipped on average. Less is not worth smaller chunks,
rows out of order, and a value per region for each of them."""


@dataclass(frozen=True)
class _Region:
    """The facts that the search has of a region."""

    number: int | None
    """Number by `Runner.add_region`; None where no row may be skipped."""
    held_out: Sequence[Feed]
    reference: Answers
    whole: NDArray[np.float64]
    """Agreement of the held-out samples where nothing is skipped, (n,)."""
    cost: NDArray[np.float64]
    """Mean squared change of the scores by skipping one chunk, per weight: (chunks,)."""


@dataclass(frozen=True)
class RegionSkips:
    """The chunks that a region skips."""

    chunks: NDArray[np.bool_]
    """Whether each chunk is skipped, (chunks,)."""
    agreement: NDArray[np.float64]
    """Agreement of the region's held-out samples, (n,)."""
    threshold: float = 0.0
    """Cost per weight of the dearest skipped chunk."""


class SkipSearch:
    """Finds the chunks that each region can skip."""

    def __init__(
        self,
        runner: Runner,
        bank: Bank,
        precision: Precision,
        output: str,
        agreement: Agreement,
        tolerance: float,
        layers: Sequence[Layer],
    ) -> None:
        """`layers` are those of which rows may be skipped."""
        self._runner, self._precision, self._agreement = runner, precision, agreement
        self._tolerance = tolerance
        model = onnx.load_from_string(bank.graph_bytes())
        # What goes into a Softmax tells more than the probabilities of a sure answer.
        self._outputs = [output, logits_tensor(model.graph, output)]
        if self._outputs[1] not in {item.name for item in model.graph.output}:
            model.graph.output.append(onnx.ValueInfoProto(name=self._outputs[1]))
        self._graph = model.SerializeToString()
        self._chunks = np.array([chunk for layer in layers for chunk in _chunks(layer)], np.intp)
        self._weights = np.concatenate([chunk_weights(layer) for layer in bank.manifest.layers])
        self._regions: list[_Region] = []

    def add(
        self,
        values: NDArray[np.float32],
        fitted: Sequence[Feed],
        held_out: Sequence[Feed],
        reference: Answers,
    ) -> None:
        """Take up the next region, with the values in place of its rows and its own samples."""
        whole = self._agreement(self._run(held_out, None)[0], reference)
        cost = np.full(len(self._weights), np.inf)
        number = None
        if not fitted or 1 / (len(held_out) + 1) > self._tolerance:
            warnings.warn(
                f"region {len(self._regions)} has {len(fitted)} samples and {len(held_out)} held "
                f"out, {int(np.ceil(1 / self._tolerance)) - 1} are needed for a tolerance of "
                f"{self._tolerance:g}: no row of it is skipped",
                BoundaryWarning,
                stacklevel=3,
            )
        else:
            number = self._runner.add_region(values)
            tried = fitted[:_TRIED_SAMPLES]
            plain = self._run(tried, None)[1]
            for chunk in self._chunks:
                scores = self._run(tried, self._skip([chunk], number))[1]
                change = [_squared_change(a, b) for a, b in zip(scores, plain, strict=True)]
                cost[chunk] = np.mean(change) / self._weights[chunk]
        self._regions.append(_Region(number, held_out, reference, whole, cost))

    def skips(
        self, region: int, layers: Sequence[Layer], advance: Callable[[], None]
    ) -> RegionSkips:
        """Find the cheapest chunks of these layers that the region can skip."""
        here = self._regions[region]
        found = RegionSkips(np.zeros(len(self._weights), np.bool_), here.whole)
        if here.number is not None and layers:
            order = self._cheapest(here.cost, layers)
            count, step = 0, -(-len(order) // _STEPS)
            # From few to many, not by halves: where much is lost, more may look fine again.
            while step:
                more = order[: count + step]
                now = self._tried(here, more) if len(more) > count else None
                if now is None:
                    step //= 2
                    continue
                count = len(more)
                found = RegionSkips(self._skip(more, here.number).chunks, now, here.cost[more[-1]])
        advance()
        return found

    def _tried(self, region: _Region, chunks: NDArray[np.intp]) -> NDArray[np.float64] | None:
        """Agreement where these chunks are skipped, (n,); None where too much is lost."""
        assert region.number is not None
        answers = self._run(region.held_out, self._skip(chunks, region.number))[0]
        now = self._agreement(answers, region.reference)
        lost = float(np.maximum(region.whole - now, 0).sum())
        return now if (lost + 1) / (len(now) + 1) <= self._tolerance else None

    def _cheapest(self, cost: NDArray[np.float64], layers: Sequence[Layer]) -> NDArray[np.intp]:
        """The chunks that may be skipped, the cheapest first; of no layer too many."""
        chosen = []
        for layer in layers:
            chunks = np.array(_chunks(layer))
            most = most_skipped(layer.stored_rows, layer.chunk_rows)
            chosen.append(chunks[np.argsort(cost[chunks], kind="stable")[:most]])
        found = np.concatenate(chosen)
        return found[np.argsort(cost[found], kind="stable")]

    def _skip(self, chunks: Any, number: int) -> Skip:
        mask = np.zeros(len(self._weights), np.bool_)
        mask[chunks] = True
        return Skip(mask, number)

    def _run(self, feeds: Sequence[Feed], skip: Skip | None) -> tuple[Answers, Answers]:
        """The judged output and the scores of each sample."""
        found = self._runner.run(
            self._graph, self._precision, self._outputs, feeds, list, skip=skip
        )
        return [each[0] for each in found], [each[1] for each in found]


def worthwhile_layers(
    layers: Sequence[Layer], skips: Sequence[RegionSkips], shares: NDArray[np.float64]
) -> list[Layer]:
    """The layers of which enough is skipped, on average over the inputs."""
    share = shares @ np.array([each.chunks for each in skips])
    rows = [share[layer.chunk_range] @ chunk_weights(layer) / layer.weights for layer in layers]
    return [layer for layer, found in zip(layers, rows, strict=True) if found >= _PAYING_SHARE]


def _squared_change(now: NDArray[Any], before: NDArray[Any]) -> float:
    return float(np.square(np.subtract(now, before, dtype=np.float64)).mean())


def _chunks(layer: Layer) -> range:
    return range(layer.first_chunk, layer.first_chunk + layer.chunk_count)


def chunk_weights(layer: Layer) -> NDArray[np.int64]:
    """Number of weights of each chunk of the layer, (chunks,)."""
    starts = np.arange(0, layer.stored_rows, layer.chunk_rows)
    return np.diff(np.append(starts, layer.stored_rows)) * layer.columns
