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

from ..build_support.spill import Spill
from ..build_support.workers import Workers
from ..calibration.forward_passes import FLOAT, ForwardPasses
from ..calibration.gram import PANEL_COLUMNS
from ..calibration.input_statistics import NEIGHBOUR, InputStatistics
from ..calibration.matrix_stats import MatrixStats
from ..calibration.reference_model import Reference, weight_feeds
from ..calibration.samples import CalibrationData
from ..onnx_graph.ir import HeavyLayer, LayerPlan
from .checkpoint import Checkpoint
from .eta import Eta, codes_s, forward_s, statistics_s
from .family import quantize_family
from .layer_tasks import join_layer, layer_tasks, with_scales
from .options import COMPENSATED_CONV_COLUMNS, LayerOptions, scale_columns_of
from .quantized_layer import QuantizedLayer
from .sensitivity import (
    OutputErrors,
    error_like,
    measured_before,
    measured_runs,
    samples_compared,
)

Options = Mapping[str, LayerOptions]
"""The options of the layers, by name."""

_UNSEEN = "inside bodies that calibration cannot look into"
_NEVER_RUN = "which no calibration sample reaches"


def quantize_layers(
    model: onnx.ModelProto,
    plan: LayerPlan,
    data: CalibrationData | None,
    levels: tuple[Level, ...],
    options: Options,
    workers: Workers,
    checkpoint: Checkpoint,
    spill: Spill,
    fast: bool = False,
    advance: Callable[[float], None] = lambda share: None,
) -> dict[str, list[str]]:
    """Quantize every layer of the plan into `checkpoint`, under its index.

    `levels` are the bank's. A layer has all or some of them, by its options. With `fast`, codes are
    the nearest, there is no pass but that in float, and what the outputs suffer is not measured.
    `advance` is told the share of the whole work that was done since its last call.

    Returns the names of the layers that calibration tells nothing about, by reason.

    Raises:
        CalibrationError: the model fails on a sample, or a layer's input is not finite there.
    """
    index = {layer.name: number for number, layer in enumerate(plan.layers)}
    eta = Eta(advance)
    if data is None or levels == (32,):
        missing = [layer for layer in plan.layers if index[layer.name] not in checkpoint]
        eta.plan("codes", sum(codes_s(layer, False) for layer in missing))
        for layer in missing:
            with eta.doing("codes", codes_s(layer, False)):
                (found,) = _quantize([_CalibratedLayer(layer)], options, workers)
                checkpoint.put(index[layer.name], found)
        return {}

    def feeds(level: Level, layer: HeavyLayer) -> dict[str, np.ndarray]:
        if level == FLOAT:
            return weight_feeds(layer, layer.weight, layer.bias)
        own = level_within(options[layer.name].levels, level)
        found = checkpoint.get(index[layer.name], layer, own)
        return weight_feeds(layer, found.weight(own), found.bias(own))

    reference = Reference(model, plan)
    pass_levels = [level for level in NEIGHBOUR if level in levels] or [min(levels)]
    if fast:
        pass_levels = []
    passes = ForwardPasses(reference, data, pass_levels, feeds, workers.count, checkpoint.scratch)
    stages = list(reference.stages())
    to_do = [
        [layer for layer in stage.layers if index[layer.name] not in checkpoint] for stage in stages
    ]
    run_layers = [len(reference.layers_of(stage.nodes)) for stage in stages]
    pass_runs = len(passes.levels) * data.samples
    pass_s = [forward_s(count, pass_runs) for count in run_layers]
    order = [layer for stage in stages for layer in stage.layers]
    work = 0 if fast else passes.multiplications(order)
    compared = samples_compared(data.samples, len(order), work)
    measured_by = {
        layer.name: order[measured_before(number, len(order))] for number, layer in enumerate(order)
    }
    measure_s: dict[str, float] = {}
    for number, layers in enumerate(to_do):
        eta.plan("forward", pass_s[number])
        for layer in layers:
            runs = measured_runs(options[layer.name].levels, compared)
            runs = runs if measured_by[layer.name] is layer and not fast else 0
            measure_s[layer.name] = forward_s(sum(run_layers[number + 1 :]), runs)
            eta.plan("forward", measure_s[layer.name])
            eta.plan("statistics", statistics_s(layer, pass_runs))
            eta.plan("codes", codes_s(layer, layer.name in stages[number].observations))

    def later_nodes(number: int) -> list[onnx.NodeProto]:
        later = (each for each in stages[number + 1 :] if each.in_float is None)
        return [node for each in later for node in each.nodes]

    unknown: dict[str, list[str]] = {}
    for number, (stage, layers) in enumerate(zip(stages, to_do, strict=True)):
        with eta.doing("forward", pass_s[number]):
            passes.run(stage)
        if not layers:
            continue
        errors: OutputErrors | None = None
        with spill.temporary():
            with eta.doing("statistics", sum(statistics_s(layer, pass_runs) for layer in layers)):
                calibrated = _calibrated(layers, passes, spill, options, fast)
            for each in calibrated:
                if each.unknown:
                    unknown.setdefault(each.unknown, []).append(each.layer.name)
            results = _quantize(calibrated, options, workers)
            for layer in layers:
                with eta.doing("codes", codes_s(layer, layer.name in stage.observations)):
                    found = next(results)
                with eta.doing("forward", measure_s[layer.name]):
                    other = measured_by[layer.name]
                    if fast:
                        measured = {}
                    elif other is layer:
                        errors = errors or OutputErrors(
                            reference,
                            passes,
                            later_nodes(number),
                            stage.layers,
                            workers.count,
                            compared,
                        )
                        measured = errors.of(layer, found)
                    else:
                        measured = error_like(found, checkpoint.get(index[other.name], other, 1))
                    found = dataclasses.replace(found, output_error=measured)
                    checkpoint.put(index[layer.name], found)
        spill.release()
    return unknown


@dataclass(frozen=True)
class _CalibratedLayer:
    """A layer and what calibration tells of its input."""

    layer: HeavyLayer
    stats: list[MatrixStats] | None = None
    row_weight: np.ndarray | None = None
    unknown: str = ""
    """Why calibration tells nothing, if so."""


def _calibrated(
    layers: Sequence[HeavyLayer],
    passes: ForwardPasses,
    spill: Spill,
    options: Options,
    fast: bool,
) -> list[_CalibratedLayer]:
    """Layers of a stage with the statistics of their inputs, in the same order."""
    statistics = InputStatistics(passes, spill)
    found = {layer.name: _CalibratedLayer(layer, unknown=_UNSEEN) for layer in layers}
    same_input: dict[object, list[HeavyLayer]] = {}
    for layer in layers:
        observation = passes.observation(layer)
        if observation is None:
            continue
        if layer.gathered:
            counts = statistics.gather_counts(layer)
            reason = "" if counts.any() else _NEVER_RUN
            found[layer.name] = _CalibratedLayer(layer, None, good_turing(counts), reason)
        else:
            same_input.setdefault(observation.key, []).append(layer)
    for group in same_input.values():
        sizes = {n for layer in group for n in scale_columns_of(options[layer.name]).values()}
        # No scale group is cut in two.
        unit = math.lcm(PANEL_COLUMNS, COMPENSATED_CONV_COLUMNS, *sizes)
        stats = statistics.diagonals(group) if fast else statistics.of(group, unit)
        for layer in group:
            own = stats[layer.name]
            found[layer.name] = _CalibratedLayer(layer, own, None, "" if own else _NEVER_RUN)
    return list(found.values())


def _quantize(
    layers: Sequence[_CalibratedLayer], options: Options, workers: Workers
) -> Iterator[QuantizedLayer]:
    """Quantize layers that are independent of each other, spread over the workers."""
    own_options = [with_scales(each.layer, each.stats, options[each.layer.name]) for each in layers]
    tasks = [
        layer_tasks(each.layer, each.stats, own)
        for each, own in zip(layers, own_options, strict=True)
    ]
    guess_s = sum(codes_s(each.layer, each.stats is not None) for each in layers)
    results = workers.map(quantize_family, list(itertools.chain(*tasks)), guess_s)
    for each, own, own_tasks in zip(layers, own_options, tasks, strict=True):
        own_results = itertools.islice(results, len(own_tasks))
        yield join_layer(each.layer, own, each.stats, own_results, each.row_weight)


def good_turing(counts: np.ndarray) -> np.ndarray:
    """Probability of each item, also of those that were never seen.

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
