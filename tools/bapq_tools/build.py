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
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime

from bapq_edge import __version__
from bapq_edge.bank.files import digest_of_file
from bapq_edge.bank.layout import (
    LEVELS,
    Level,
    Plane,
    level_within,
    tiles_of,
)
from bapq_edge.bank.manifest import Calibration, KeptNode, Manifest, SourceModel
from bapq_edge.bank.reader import read_manifest
from bapq_edge.bank.writer import BankWriter, check_bank_target
from bapq_edge.errors import (
    BankError,
    BoundaryDroppedWarning,
    RequestError,
    StorageError,
    UncalibratedWarning,
    UnknownLevelError,
    UnsupportedModelError,
)

from .build_support.heap import use_one_heap
from .build_support.progress import Progress
from .build_support.spill import Spill
from .build_support.workers import Workers
from .calibration.samples import (
    CalibrationSource,
    check_calibration_source,
    load_calibration,
)
from .onnx_graph import graphs
from .onnx_graph.assemble import assemble, drop_replaced
from .onnx_graph.fold import fold
from .onnx_graph.importers.onnx_file import check_model_source, load_model
from .onnx_graph.ir import HeavyLayer, LayerPlan
from .onnx_graph.layers import find_layers
from .quantize.checkpoint import Checkpoint
from .quantize.options import CONV_SCALE_COLUMNS, LayerOptions, scale_columns_of
from .quantize.prune import PruneReport, prune_layers
from .quantize.sequential import quantize_layers
from .quantize.write import tile_bytes, write_layer
from .recipe import RecipeSource, load_recipe

__all__ = ["BuildReport", "build_bank"]

_TABLES_BYTES = 1 << 20
"""Space for manifest, chunk tables and the graph's nodes, when the free space is checked."""


@dataclass(frozen=True)
class BuildReport:
    """The outcome of a build. It may be given wherever the path of its bank may."""

    bank: str
    """Path of the bank."""
    layers: int
    weights: int
    plane_bytes: dict[Plane, int]
    kept_in_float: int
    """Number of nodes with weights that stay with the graph engine."""
    calibration_samples: int
    relative_error: dict[Level, float]
    """The layers' relative errors per level, averaged by their weights."""
    stage_seconds: dict[str, float]
    remaining_ratio: dict[str, float] = field(default_factory=dict)
    """Share of the weights that are not zero, for each layer that was pruned."""
    remaining_ratio_in_all: float = 1.0
    """Share of all weights that pruning left."""
    pruned_rows: int = 0
    """Rows of pruned layers that are zero as a whole: their output is their bias."""
    dropped_rows: int = 0
    """Number of these rows that are not stored."""

    def __fspath__(self) -> str:
        """The path of the bank."""
        return self.bank


def build_bank(
    model: str | os.PathLike[str] | onnx.ModelProto,
    out: str | os.PathLike[str],
    *,
    calibration: CalibrationSource | None = None,
    levels: Iterable[int] | None = None,
    recipe: RecipeSource | None = None,
    prune_tau: float | None = None,
    workers: int | None = None,
    dask: str | None = None,
    progress: bool = True,
) -> BuildReport:
    """Compile a model into a bank.

    A bank that stands at `out` is replaced once the new one is whole. A build that was stopped goes
    on from the layers it had finished. The bank depends neither on `workers` nor on `dask`.

    Args:
        model: the model, or the path of its .onnx file.
        out: path of the bank.
        calibration: an .npz file or a mapping, one array per model input, samples on the first
            axis.
        levels: levels of the bank; None: those of the recipe, by default 8, 4, 2 and 1.
        recipe: a YAML file or what it would hold: settings for all layers and for some.
        prune_tau: weights become zero that are smaller than this share of the largest of their
            layer; None: what the recipe says.
        workers: number of processes; None: as many as there are usable cores.
        dask: address of a Dask scheduler, whose workers are used instead of processes.
        progress: show it on stderr.

    Raises:
        RequestError: an argument that is of no use, such as no worker.
        RecipeError: the recipe, or `prune_tau`.
        InputFileError: one of the files is missing or cannot be read.
        ModelError, CalibrationError: the source model or the calibration data.
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
    check_model_source(model)
    if calibration is not None:
        check_calibration_source(calibration)
    stages = Progress(progress)
    use_one_heap()

    with stages.stage("import", 1) as advance:
        loaded, source = _load(model)
        advance()
    data = None if calibration is None else load_calibration(calibration, loaded.graph.input)
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
    options = {layer.name: _for_operators(layer, options[layer.name]) for layer in plan.layers}
    _check_space(out, folded, plan, options)
    folded = drop_replaced(folded, plan)
    pruned = prune_layers(plan, options)
    weights = sum(layer.weight.size for layer in plan.layers)
    source_data = None if data is None else Calibration(data.samples, data.blake2b)
    key = {
        "model": _digest_of(folded, plan),
        "calibration": None if data is None else data.blake2b,
        "levels": wanted,
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
        with stages.stage("quantize") as advance:
            quantize_layers(folded, plan, data, wanted, options, pool, checkpoint, spill, advance)
        del data
        with (
            stages.stage("write", len(plan.layers)) as advance,
            BankWriter(out, levels=wanted, source=source, calibration=source_data) as writer,
        ):
            for index, layer in enumerate(plan.layers):
                quantized = checkpoint.get(index, layer)
                zero_rows = pruned[layer.name].zero_rows if layer.name in pruned else None
                write_layer(writer, layer, quantized, wanted, zero_rows)
                advance()
            manifest = writer.finish(assemble(folded, plan), plan.kept_in_float)
    return _report(out, manifest, weights, stages, pruned)


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
    """Leave layers to the graph that the recipe keeps in float; returns options of the others."""
    options = {name: entry for name, entry in resolved.items() if entry is not None}
    kept = [layer for layer in plan.layers if layer.name not in options]
    plan.layers[:] = [layer for layer in plan.layers if layer.name in options]
    for layer in kept:
        for use in layer.uses:
            name = use.node.name or use.node.output[0]
            reason = "the recipe keeps it in float"
            plan.kept_in_float.append(KeptNode(name, use.operator, layer.weight.size, reason))
    return options


def _for_operators(layer: HeavyLayer, options: LayerOptions) -> LayerOptions:
    """The options with what convolutions have instead of the defaults; not depthwise ones."""
    if layer.depthwise or any(use.operator != "Conv" for use in layer.uses):
        return options
    return replace(options, scale_columns={**CONV_SCALE_COLUMNS, **options.scale_columns})


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


def _load(
    model: str | os.PathLike[str] | onnx.ModelProto,
) -> tuple[onnx.ModelProto, SourceModel]:
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
    return load_model(model), _source(Path(model), Path(model).name)


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


def _report(
    out: Path,
    manifest: Manifest,
    weights: int,
    stages: Progress,
    pruned: dict[str, PruneReport],
) -> BuildReport:
    def average(level: Level) -> float:
        errors = (
            layer.relative_error[level_within(layer.levels, level)] * layer.rows * layer.columns
            for layer in manifest.layers
        )
        return sum(errors) / weights

    zeroed = sum(report.weights - report.remaining for report in pruned.values())
    return BuildReport(
        bank=str(out),
        layers=len(manifest.layers),
        weights=weights,
        plane_bytes={plane: entry.bytes for plane, entry in manifest.planes.items()},
        kept_in_float=len(manifest.kept_in_float),
        calibration_samples=manifest.calibration.samples if manifest.calibration else 0,
        relative_error={level: average(level) for level in manifest.levels},
        stage_seconds=stages.seconds,
        remaining_ratio={name: report.remaining_ratio for name, report in pruned.items()},
        remaining_ratio_in_all=1 - zeroed / weights,
        pruned_rows=sum(int(report.zero_rows.sum()) for report in pruned.values()),
        dropped_rows=sum(layer.rows - layer.stored_rows for layer in manifest.layers),
    )
