"""Builds a bank from a model, stage by stage."""

from __future__ import annotations

import contextlib
import hashlib
import numbers
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime

from bapq_edge import __version__
from bapq_edge.bank.coverage import Coverage
from bapq_edge.bank.files import digest_of_file
from bapq_edge.bank.layout import (
    LEVELS,
    Level,
    tiles_of,
)
from bapq_edge.bank.manifest import Calibration, Expected, KeptNode, SourceModel
from bapq_edge.bank.reader import Bank, read_manifest
from bapq_edge.bank.writer import BankWriter, check_bank_target
from bapq_edge.errors import (
    BankError,
    BoundaryDroppedWarning,
    CalibrationWarning,
    CoverageError,
    NoHeavyLayerError,
    RequestError,
    StorageError,
    UncalibratedWarning,
    UnknownLevelError,
    UnsupportedModelError,
)
from bapq_edge.units import counted

from .build_report import BuildReport, report_of
from .build_support.heap import use_one_heap
from .build_support.progress import Progress
from .build_support.spill import Spill
from .build_support.workers import Workers
from .calibration.float_answers import float_answers
from .calibration.samples import (
    CalibrationSource,
    check_calibration_source,
    load_calibration,
)
from .calibration.sufficiency import doubts_of_answers, doubts_of_samples
from .calibration.tflite_check import check_conversion
from .onnx_graph import graphs
from .onnx_graph.assemble import assemble, drop_replaced
from .onnx_graph.fold import fold
from .onnx_graph.importers.onnx_file import check_model_source, load_model
from .onnx_graph.importers.tflite_file import convert_tflite, is_tflite
from .onnx_graph.ir import HeavyLayer, LayerPlan
from .onnx_graph.layers import find_layers, nothing_found
from .quantize.carried import uncarried
from .quantize.checkpoint import Checkpoint
from .quantize.expectation import measure_plans, plan_count
from .quantize.options import LayerOptions, scale_columns_of
from .quantize.prune import prune_layers
from .quantize.sequential import quantize_layers
from .quantize.write import tile_bytes, write_layer
from .recipe import RecipeSource, load_recipe

__all__ = ["BuildReport", "build_bank"]

_JUDGED_SAMPLES = 32
"""Number of held-out samples that plans are run on."""

_TABLES_BYTES = 1 << 20
"""Space for manifest, chunk tables and the graph's nodes, when the free space is checked."""


def build_bank(
    model: str | os.PathLike[str] | onnx.ModelProto,
    out: str | os.PathLike[str],
    *,
    calibration: CalibrationSource | None = None,
    levels: Iterable[int] | None = None,
    recipe: RecipeSource | None = None,
    prune_tau: float | None = None,
    external_data: str | os.PathLike[str] | None = None,
    min_coverage: float = 0.0,
    fast: bool = False,
    workers: int | None = None,
    dask: str | None = None,
    progress: bool = True,
) -> BuildReport:
    """Compile a model into a bank.

    A bank that stands at `out` is replaced once the new one is whole. A build that was stopped goes
    on from the layers it had finished. The bank depends neither on `workers` nor on `dask`.

    Args:
        model: the model, or the path of its .onnx or .tflite file. A .tflite file needs the extra
            [tflite]; its conversion is checked against LiteRT, operator by operator.
        out: path of the bank.
        calibration: an .npz file or a mapping, one array per model input, samples on the first
            axis; a folder of such files, or a list, where samples differ in size.
        levels: levels of the bank; None: those of the recipe, by default 8, 4, 2 and 1.
        recipe: a YAML file or what it would hold: settings for all layers and for some.
        prune_tau: weights become zero that are smaller than this share of the largest of their
            layer; None: what the recipe says.
        external_data: a folder that the model's external data may lie in besides its own folder.
        min_coverage: the share of the weights, 0 to 1, that must go into planes.
        fast: for a first look: calibration only weighs the columns of each layer and corrects
            biases; errors are not compensated, nor measured at the model's outputs.
        workers: number of processes; None: as many as there are usable cores.
        dask: address of a Dask scheduler, whose workers are used instead of processes.
        progress: show it on stderr.

    Raises:
        RequestError: an argument that is of no use, such as no worker.
        RecipeError: the recipe, or `prune_tau`.
        InputFileError: one of the files is missing or cannot be read.
        ModelError, CalibrationError: the source model or the calibration data.
        CoverageError: less than `min_coverage` goes into planes.
        UnknownLevelError: a level that is none of 32, 8, 4, 2, 1, or no level at all.
        BankFormatError: something else than a bank stands at `out`.
        StorageError: the disk.
        ClusterError, WorkerError: a worker is lost, or was never there.
    """
    settings = load_recipe(recipe).with_settings(
        None if levels is None else _checked_levels(levels), prune_tau
    )
    wanted = settings.levels
    if not isinstance(out, str | os.PathLike):
        raise RequestError(f"out is {out!r:.80}: give the path of the bank")
    out = Path(out)
    check_bank_target(out)
    workers = _checked_workers(workers)
    if not 0 <= min_coverage <= 1:
        raise RequestError(f"min_coverage is {min_coverage!r:.80}: give a share from 0 to 1")
    check_model_source(model)
    if calibration is not None:
        check_calibration_source(calibration)
    stages = Progress(progress)
    use_one_heap()

    with stages.stage("import", 1) as advance:
        converted = convert_tflite(model) if is_tflite(model) else None
        loaded, source = _load(model, external_data, None if converted is None else converted.model)
        advance()
    data = None if calibration is None else load_calibration(calibration, loaded.graph.input)
    if converted is not None:
        with stages.stage("check", 1) as advance:
            check_conversion(model, converted, data)
            advance()
    learnt, held_out = (None, None) if data is None else data.split()
    if calibration is None and wanted != (32,):
        warnings.warn(
            f"{out.name} is built without calibration data; its low levels will be less accurate: "
            "give samples of real inputs",
            UncalibratedWarning,
            stacklevel=2,
        )
    _warn_of_discarded(out)
    with stages.stage("fold", 1) as advance:
        folded = fold(loaded)
        del loaded
        advance()
    with stages.stage("layers", 1) as advance:
        plan = find_layers(folded)
        advance()
    options = _take_out_kept(plan, settings.resolve(layer.name for layer in plan.layers))
    weights = sum(layer.weight.size for layer in plan.layers)
    coverage = Coverage.of(weights, plan.kept_in_float)
    if coverage.share < min_coverage:
        raise CoverageError(
            f"only {coverage}; at least {min_coverage:.1%} was asked for: lower min_coverage "
            "(--min-coverage), or change the model where it says why"
        )
    _check_space(out, folded, plan, options)
    if data is not None and wanted != (32,):
        _warn_of_samples(doubts_of_samples(data))
    folded = drop_replaced(folded, plan)
    pruned = prune_layers(plan, options)
    source_data = None if data is None else Calibration(data.samples, data.blake2b)
    key = {
        "model": _digest_of(folded, plan),
        "calibration": None if data is None else data.blake2b,
        "levels": wanted,
        "fast": fast,
        "options": {name: repr(entry) for name, entry in options.items()},
        "versions": [__version__, np.__version__, onnxruntime.__version__],
    }
    with (
        Checkpoint(out, key, stages.say) as checkpoint,
        Workers(workers, dask, checkpoint.scratch) as pool,
    ):
        spill = Spill(checkpoint.scratch)
        for layer in plan.layers:
            layer.weight = spill.put(layer.weight)
        judged = None if held_out is None else held_out.spread(_JUDGED_SAMPLES)
        with stages.stage("quantize") as advance:
            unknown = quantize_layers(
                folded, plan, learnt, wanted, options, pool, checkpoint, spill, fast, advance
            )
            answers = None
            if judged is not None and wanted != (32,):  # before the float weights go
                answers = float_answers(folded, plan, judged, pool.count, checkpoint.scratch)
                _warn_of_samples(doubts_of_answers(answers.tensors))
        _warn_of_uncalibrated(unknown)
        whole = held_out is not learnt
        del data, learnt, held_out

        def measure(bank: Bank) -> Expected | None:
            if judged is None or answers is None:
                return None
            with stages.stage("measure", plan_count(wanted)) as advance:
                return measure_plans(
                    bank, judged, answers, pool.count, held_out=whole, advance=advance
                )

        with BankWriter(out, levels=wanted, source=source, calibration=source_data) as writer:
            with stages.stage("write", len(plan.layers)) as advance:
                for index, layer in enumerate(plan.layers):
                    quantized = checkpoint.get(index, layer)
                    zero_rows = pruned[layer.name].zero_rows if layer.name in pruned else None
                    write_layer(writer, layer, quantized, wanted, zero_rows)
                    advance()
                graph = assemble(folded, plan)
            manifest = writer.finish(graph, plan.kept_in_float, expected=measure)
    return report_of(out, manifest, coverage, stages, pruned)


def _digest_of(folded: onnx.ModelProto, plan: LayerPlan) -> str:
    """Compute BLAKE2b-128 over graph and weights; the weights are the plan's, `folded` has none."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(graphs.without_weights(folded).SerializeToString(deterministic=True))
    for tensor in graphs.tensors(folded.graph):
        digest.update(tensor.raw_data)
    for layer in plan.layers:
        digest.update(layer.weight.data)
        if layer.bias is not None:
            digest.update(layer.bias.data)
    return digest.hexdigest()


def _checked_workers(workers: int | None) -> int:
    if workers is None:
        return len(os.sched_getaffinity(0))
    if not _is_integer(workers) or workers < 1:
        raise RequestError(f"workers is {workers!r:.80}: give a whole number from 1 on")
    return int(workers)


def _is_integer(value: object) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _checked_levels(levels: Iterable[int]) -> tuple[Level, ...]:
    given = list(levels) if isinstance(levels, Iterable) else [levels]
    unknown = [level for level in given if not _is_integer(level) or level not in LEVELS]
    if unknown or not given:
        found = f"level {unknown[0]!r}" if unknown else "no level"
        raise UnknownLevelError(
            f"{found} was asked for; choose one or more of {', '.join(map(str, LEVELS))}"
        )
    return tuple(level for level in LEVELS if level in given)


def _take_out_kept(
    plan: LayerPlan, resolved: dict[str, LayerOptions | None]
) -> dict[str, LayerOptions]:
    """Leave layers to the graph that stay in float; returns options of the others.

    Raises NoHeavyLayerError where none is left.
    """
    reasons = {layer.name: _reason_for_float(layer, resolved[layer.name]) for layer in plan.layers}
    for layer in plan.layers:
        for use in layer.uses if reasons[layer.name] else ():
            name = use.node.name or use.node.output[0]
            kept = KeptNode(name, use.operator, layer.weight.size, reasons[layer.name])
            plan.kept_in_float.append(kept)
    plan.layers[:] = [layer for layer in plan.layers if not reasons[layer.name]]
    if not plan.layers:
        raise NoHeavyLayerError(nothing_found(plan.kept_in_float))
    return {name: own for name, own in resolved.items() if own is not None and not reasons[name]}


def _reason_for_float(layer: HeavyLayer, options: LayerOptions | None) -> str:
    """Why a layer stays in float; empty where it does not."""
    if options is None:
        return "the recipe keeps it in float"
    return "" if options.levels == (32,) else uncarried(layer) or ""


def _warn_of_discarded(out: Path) -> None:
    """Say what was fitted to the bank that is about to be replaced."""
    with contextlib.suppress(BankError, StorageError):  # nothing there, or damaged
        fitted = [entry.model.name for entry in read_manifest(out).boundary]
        if fitted:
            warnings.warn(
                f"{out}: the boundary models {', '.join(fitted)} were fitted to the old bank and "
                "are discarded: fit the new one",
                BoundaryDroppedWarning,
                stacklevel=3,
            )


def _warn_of_uncalibrated(unknown: dict[str, list[str]]) -> None:
    """Name the layers that were quantized without knowing their inputs."""
    for reason, names in unknown.items():
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        warnings.warn(
            f"{counted(len(names), 'layer')}, {reason}, built without calibration: {shown}; low "
            "levels are less accurate there: add samples that take this way, or keep it in float",
            UncalibratedWarning,
            stacklevel=3,
        )


def _warn_of_samples(doubts: list[str]) -> None:
    for doubt in doubts:
        warnings.warn(doubt, CalibrationWarning, stacklevel=3)


def _load(
    model: str | os.PathLike[str] | onnx.ModelProto,
    external_data: str | os.PathLike[str] | None,
    converted: onnx.ModelProto | None,
) -> tuple[onnx.ModelProto, SourceModel]:
    """The model in plain form, and what the bank says of its source; `converted`: of a .tflite."""
    if converted is not None:
        assert not isinstance(model, onnx.ModelProto)
        return _load(converted, None, None)[0], _source(Path(model), Path(model).name)
    if isinstance(model, onnx.ModelProto):
        with tempfile.TemporaryDirectory(prefix="bapq-import-") as folder:
            path = Path(folder) / "model.onnx"
            try:
                path.write_bytes(model.SerializeToString())
            except ValueError as error:
                raise UnsupportedModelError(
                    f"the model has {model.ByteSize()} bytes, one protobuf holds 2147483647; save "
                    "it with external data and give the path"
                ) from error
            return load_model(path), _source(path, model.graph.name or "model")
    return load_model(model, external_data), _source(Path(model), Path(model).name)


def _source(path: Path, name: str) -> SourceModel:
    digest = digest_of_file(path)
    return SourceModel(name, path.stat().st_size, digest, f"bapq-edge {__version__}")


def _check_space(
    out: Path, model: onnx.ModelProto, plan: LayerPlan, options: dict[str, LayerOptions]
) -> None:
    """Refuse early what would fill the disk; the old bank, if any, stays until the end."""
    replaced = {name for layer in plan.layers for name in layer.initializers}
    needed = _TABLES_BYTES
    needed += sum(len(t.raw_data) for t in model.graph.initializer if t.name not in replaced)
    for layer in plan.layers:
        rows, columns = layer.weight.shape
        own = options[layer.name]
        needed += tiles_of(rows) * tile_bytes(
            columns, own.levels, scale_columns_of(own), True, layer.depthwise
        )
    free = shutil.disk_usage(Path(os.path.realpath(out)).parent).free
    if free < needed:
        raise StorageError(
            f"{out} needs about {needed} bytes, its disk has {free} free; free some, choose "
            "another place or build fewer levels"
        )
