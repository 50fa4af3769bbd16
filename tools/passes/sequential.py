"""Quantizes a model layer by layer, each on what the quantized layers before it leave behind."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx

from bapq_edge.bank.layout import Level, level_within

from ..workers import Workers
from .calibration import CalibrationData
from .chains import FLOAT, Chains
from .ir import HeavyLayer, LayerOptions, LayerPlan, MatrixStats
from .moments import NEIGHBOUR, Moments
from .partial import PartialBank
from .quantize import QuantizedLayer, join_layer, layer_tasks, quantize_family
from .reference import Reference, observed, weight_feeds
from .sensitivity import OutputErrors

Advance = Callable[[float], None]


def quantize_layers(
    model: onnx.ModelProto,
    plan: LayerPlan,
    data: CalibrationData | None,
    levels: tuple[Level, ...],
    options: Mapping[str, LayerOptions],
    workers: Workers,
    partial: PartialBank,
    advance: Advance = lambda work: None,
) -> None:
    """Quantize every layer of the plan into `partial`, under its index.

    `levels` are the bank's, of which a layer may have some, by its options.

    `advance` is told the share of the whole work done since the last call.

    Raises:
        CalibrationError: the model fails on a sample, or a layer's input is not finite there.
    """
    index = {layer.name: number for number, layer in enumerate(plan.layers)}
    total = sum(map(work_of, plan.layers))
    if data is None or levels == (32,):
        for number, layer in enumerate(plan.layers):
            if number not in partial:
                partial.put(number, *_quantize([_Seen(layer)], options, workers))
            advance(work_of(layer) / total)
        return

    def feeds(chain: int, layer: HeavyLayer) -> dict[str, np.ndarray]:
        if chain == FLOAT:
            return weight_feeds(layer, layer.weight, layer.bias)
        level = level_within(options[layer.name].levels, chain)
        found = partial.get(index[layer.name], layer, level)
        return weight_feeds(layer, found.weight(level), found.bias(level))

    reference = Reference(model, plan)
    chain_levels = [level for level in NEIGHBOUR if level in levels] or [min(levels)]
    chains = Chains(reference, data, chain_levels, feeds, workers.count, partial.scratch)
    stages = list(reference.stages())
    for number, stage in enumerate(stages):
        chains.run(stage)
        missing = [layer for layer in stage.layers if index[layer.name] not in partial]
        if missing:
            rest = [node for later in stages[number + 1 :] for node in later.nodes]
            errors = OutputErrors(reference, chains, rest, workers.count)
            seen = _look(missing, Moments(chains))
            for layer, found in zip(missing, _quantize(seen, options, workers), strict=True):
                measured = errors.of(layer, found)
                found = dataclasses.replace(found, output_error=measured)
                partial.put(index[layer.name], found)
        advance(sum(map(work_of, stage.layers)) / total)


def work_of(layer: HeavyLayer) -> float:
    """About how many multiplications it takes to quantize a layer."""
    rows, columns = layer.weight.shape
    if any(use.operator == "Gather" for use in layer.uses):
        return 64.0 * rows * columns
    return float(rows + 8192) * columns * columns + 1e4 * columns


@dataclass(frozen=True)
class _Seen:
    """A layer and what calibration saw of it."""

    layer: HeavyLayer
    stats: list[MatrixStats] | None = None
    row_weight: np.ndarray | None = None


def _look(layers: Sequence[HeavyLayer], moments: Moments) -> list[_Seen]:
    seen = []
    for layer in layers:
        if not observed(layer):
            seen.append(_Seen(layer))
        elif any(use.operator == "Gather" for use in layer.uses):
            often = good_turing(moments.gather_counts(layer))
            seen.append(_Seen(layer, row_weight=often))
        else:
            seen.append(_Seen(layer, moments.of(layer)))
    return seen


def _quantize(
    seen: Sequence[_Seen], options: Mapping[str, LayerOptions], workers: Workers
) -> Iterator[QuantizedLayer]:
    """Quantize layers that are independent of each other, spread over the workers."""
    tasks = [layer_tasks(each.layer, each.stats, options[each.layer.name]) for each in seen]
    work = sum(work_of(each.layer) for each in seen)
    results = workers.map(quantize_family, list(itertools.chain(*tasks)), work)
    for each, own in zip(seen, tasks, strict=True):
        yield join_layer(
            each.layer,
            options[each.layer.name],
            list(itertools.islice(results, len(own))),
            each.stats is not None,
            each.row_weight,
        )


def good_turing(counts: np.ndarray) -> np.ndarray:
    """Probability of each item, those never seen included.

    The unseen ones together get the share of the items seen once (Good, 1953), half a count at
    least.
    """
    total = max(float(counts.sum()), 1.0)
    unseen = counts == 0
    if not unseen.any():
        return counts / total
    share = max(float((counts == 1).sum()), 0.5) / total
    share = min(share, 0.5)
    return np.where(unseen, share / unseen.sum(), counts / total * (1 - share))
