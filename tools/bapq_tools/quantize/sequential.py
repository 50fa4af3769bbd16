"""Quantizes a model layer by layer, each on what the quantized layers before it leave behind."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx

from bapq_edge.bank.layout import Level, level_within

from ..build_support.spill import OnDisk
from ..build_support.workers import Workers
from ..calibration.forward_passes import FLOAT, Chains
from ..calibration.gram import PANEL
from ..calibration.input_statistics import NEIGHBOUR, Moments, input_key
from ..calibration.reference_model import Reference, observed, weight_feeds
from ..calibration.samples import CalibrationData
from ..onnx_graph.ir import HeavyLayer, LayerOptions, LayerPlan, MatrixStats
from .checkpoint import PartialBank
from .eta import Effort, costs_of, output_errors_s, round_s
from .quantize import (
    QuantizedLayer,
    join_layer,
    layer_tasks,
    quantize_family,
    scale_columns_of,
)
from .sensitivity import OutputErrors


def quantize_layers(
    model: onnx.ModelProto,
    plan: LayerPlan,
    data: CalibrationData | None,
    levels: tuple[Level, ...],
    options: Mapping[str, LayerOptions],
    workers: Workers,
    partial: PartialBank,
    disk: OnDisk,
    advance: Callable[[float], None] = lambda share: None,
) -> None:
    """Quantize every layer of the plan into `partial`, under its index.

    `levels` are the bank's, of which a layer may have some, by its options.

    `advance` is told the share of the whole work done since the last call.

    Raises:
        CalibrationError: the model fails on a sample, or a layer's input is not finite there.
    """
    index = {layer.name: number for number, layer in enumerate(plan.layers)}
    effort = Effort(advance)
    if data is None or levels == (32,):
        missing = [layer for layer in plan.layers if index[layer.name] not in partial]
        effort.plan("round", sum(round_s(layer, False) for layer in missing))
        for layer in missing:
            with effort.doing("round", round_s(layer, False)):
                partial.put(index[layer.name], *_quantize([_Seen(layer)], options, workers))
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
    missing = [
        [layer for layer in stage.layers if index[layer.name] not in partial] for stage in stages
    ]
    costs = costs_of(chains, stages)
    forward_s = [cost.forward_s * len(chains.chains) * data.samples for cost in costs]
    measure_s = [
        {
            layer.name: output_errors_s(options[layer.name].levels, costs[number + 1 :], data)
            for layer in layers
        }
        for number, layers in enumerate(missing)
    ]
    for number, layers in enumerate(missing):
        effort.plan("forward", forward_s[number])
        effort.plan("look", costs[number].look_s if layers else 0.0)
        effort.plan("round", sum(costs[number].round_s[layer.name] for layer in layers))
        effort.plan("measure", sum(measure_s[number].values()))
    for number, (stage, layers) in enumerate(zip(stages, missing, strict=True)):
        with effort.doing("forward", forward_s[number]):
            chains.run(stage)
        if not layers:
            continue
        rest = [node for later in stages[number + 1 :] for node in later.nodes]
        errors: OutputErrors | None = None
        with disk.temporary():
            with effort.doing("look", costs[number].look_s):
                seen = _look(layers, Moments(chains, disk), options)
            results = _quantize(seen, options, workers)
            for layer in layers:
                with effort.doing("round", costs[number].round_s[layer.name]):
                    found = next(results)
                with effort.doing("measure", measure_s[number][layer.name]):
                    errors = errors or OutputErrors(reference, chains, rest, workers.count)
                    measured = errors.of(layer, found)
                    found = dataclasses.replace(found, output_error=measured)
                    partial.put(index[layer.name], found)
        disk.release()


@dataclass(frozen=True)
class _Seen:
    """A layer and what calibration saw of it."""

    layer: HeavyLayer
    stats: list[MatrixStats] | None = None
    row_weight: np.ndarray | None = None


def _look(
    layers: Sequence[HeavyLayer], moments: Moments, options: Mapping[str, LayerOptions]
) -> list[_Seen]:
    seen = {layer.name: _Seen(layer) for layer in layers}
    alike: dict[object, list[HeavyLayer]] = {}
    for layer in filter(observed, layers):
        if any(use.operator == "Gather" for use in layer.uses):
            often = good_turing(moments.gather_counts(layer))
            seen[layer.name] = _Seen(layer, row_weight=often)
        else:
            alike.setdefault(input_key(layer), []).append(layer)
    for group in alike.values():
        sizes = {n for layer in group for n in scale_columns_of(options[layer.name]).values()}
        stats = moments.of(group, math.lcm(PANEL, *sizes))  # no scale group is cut in two
        seen.update({layer.name: _Seen(layer, stats[layer.name]) for layer in group})
    return list(seen.values())


def _quantize(
    seen: Sequence[_Seen], options: Mapping[str, LayerOptions], workers: Workers
) -> Iterator[QuantizedLayer]:
    """Quantize layers that are independent of each other, spread over the workers."""
    tasks = [layer_tasks(each.layer, each.stats, options[each.layer.name]) for each in seen]
    guess_s = sum(round_s(each.layer, each.stats is not None) for each in seen)
    results = workers.map(quantize_family, list(itertools.chain(*tasks)), guess_s)
    for each, own in zip(seen, tasks, strict=True):
        found = itertools.islice(results, len(own))
        own_options = options[each.layer.name]
        yield join_layer(each.layer, own_options, each.stats, found, each.row_weight)


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
