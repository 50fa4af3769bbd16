"""The host pipeline from a model to a bank, stage by stage."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

from bapq_edge import __version__
from bapq_edge.bank.layout import (
    LAYER_ALIGNMENT,
    LEVELS,
    SCALED_PLANES,
    Level,
    Plane,
    TileGeometry,
    planes_for,
    tiles_of,
)
from bapq_edge.bank.manifest import Calibration, Manifest, SourceModel
from bapq_edge.bank.writer import BankWriter, check_is_bank, chunk_rows_for
from bapq_edge.errors import (
    StorageError,
    UncalibratedWarning,
    UnknownLevelError,
    UnsupportedModelError,
)

from .importers.onnx_file import load_model
from .passes.assemble import assemble, drop_replaced
from .passes.calibration import CalibrationSource, load_calibration
from .passes.fold import fold
from .passes.ir import HeavyLayer, LayerPlan
from .passes.layers import find_layers
from .passes.partial import PartialBank
from .passes.quantize import SCALE_COLUMNS, QuantizedLayer
from .passes.sequential import quantize_layers
from .progress import Progress
from .workers import Workers

__all__ = ["BuildReport", "build", "build_bank"]

_TABLES_BYTES = 1 << 20
"""Reserved for manifest, chunk tables and the graph's nodes when the free space is checked."""


@dataclass(frozen=True)
class BuildReport:
    """What a build did."""

    bank: str
    layers: int
    weights: int
    plane_bytes: dict[Plane, int]
    kept_in_float: int
    """nodes with weights that stay with the graph engine"""
    calibration_samples: int
    relative_error: dict[Level, float]
    """per level, the layers' relative errors averaged by their weights"""
    stage_seconds: dict[str, float]


def build_bank(
    model: str | os.PathLike[str] | onnx.ModelProto,
    out: str | os.PathLike[str],
    calibration: CalibrationSource | None = None,
    levels: Iterable[int] = (8, 4, 2, 1),
    workers: int | None = None,
    progress: bool = True,
    dask: str | None = None,
) -> Path:
    """Compile a model into a bank and return the bank's path.

    `calibration` is an .npz file or a mapping, one array per model input, samples on the first
    axis. `workers` is the number of threads, by default that of the usable cores; the bank does not
    depend on it. A bank that stands at `out` is replaced once the new one is whole.

    Raises:
        ModelError, CalibrationError: the source model or the calibration data.
        UnknownLevelError: a level that is none of 32, 8, 4, 2, 1, or no level at all.
        BankFormatError: something else than a bank stands at `out`.
        StorageError: the disk.
    """
    return Path(build(model, out, calibration, levels, workers, progress, dask).bank)


def build(
    model: str | os.PathLike[str] | onnx.ModelProto,
    out: str | os.PathLike[str],
    calibration: CalibrationSource | None = None,
    levels: Iterable[int] = (8, 4, 2, 1),
    workers: int | None = None,
    progress: bool = True,
    dask: str | None = None,
) -> BuildReport:
    """`build_bank` with a report of what it did."""
    wanted = _checked_levels(levels)
    out = Path(out)
    _check_target(out)
    if workers is None:
        workers = len(os.sched_getaffinity(0))
    if calibration is None and wanted != (32,):
        warnings.warn(
            f"{out.name} is built without calibration data; its low levels will be less accurate: "
            "give samples of real inputs",
            UncalibratedWarning,
            stacklevel=3,
        )
    stages = Progress(progress)

    with stages.stage("import", 1) as advance:
        loaded, source = _load(model)
        advance()
    data = None if calibration is None else load_calibration(calibration, loaded.graph.input)
    with stages.stage("fold", 1) as advance:
        folded = fold(loaded)
        del loaded
        advance()
    with stages.stage("layers", 1) as advance:
        plan = find_layers(folded)
        advance()
    _check_space(out, folded, plan, wanted)
    drop_replaced(folded, plan)
    weights = sum(layer.weight.size for layer in plan.layers)
    seen = None if data is None else Calibration(data.samples, data.blake2b)
    key = {"model": source.blake2b, "levels": wanted, "version": __version__}
    key |= {"calibration": None if data is None else data.blake2b}
    with PartialBank(out, key) as partial, Workers(workers, dask, partial.scratch) as pool:
        with stages.stage("quantize") as advance:
            quantize_layers(folded, plan, data, wanted, pool, partial, advance)
        del data
        with (
            stages.stage("write", len(plan.layers)) as advance,
            BankWriter(out, levels=wanted, source=source, calibration=seen) as writer,
        ):
            for index, layer in enumerate(plan.layers):
                _write_layer(writer, layer, partial.get(index, layer.weight), wanted)
                advance()
            manifest = writer.finish(assemble(folded, plan), plan.kept_in_float)
    return _report(out, manifest, weights, stages)


def _checked_levels(levels: Iterable[int]) -> tuple[Level, ...]:
    given = list(levels)
    unknown = [level for level in given if level not in LEVELS or isinstance(level, bool)]
    if unknown or not given:
        found = f"level {unknown[0]!r}" if unknown else "no level"
        raise UnknownLevelError(
            f"{found} was asked for; choose one or more of {', '.join(map(str, LEVELS))}"
        )
    return tuple(level for level in LEVELS if level in given)


def _check_target(out: Path) -> None:
    """Find out before any work whether the bank can be put at its name."""
    if os.path.lexists(out):
        check_is_bank(out)
    elif not out.absolute().parent.is_dir():
        raise StorageError(f"{out.absolute().parent} is no directory; create it to build there")


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
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return SourceModel(name, path.stat().st_size, digest.hexdigest(), f"bapq-edge {__version__}")


def _check_space(
    out: Path, model: onnx.ModelProto, plan: LayerPlan, levels: tuple[Level, ...]
) -> None:
    """Refuse early what would fill the disk; the old bank, if any, stays until the end."""
    replaced = {name for layer in plan.layers for name in layer.initializers}
    needed = _TABLES_BYTES
    needed += sum(len(t.raw_data) for t in model.graph.initializer if t.name not in replaced)
    for layer in plan.layers:
        rows, columns = layer.weight.shape
        for plane in planes_for(levels):
            scaled = SCALED_PLANES.get(plane)
            scale_columns = 0 if scaled is None else SCALE_COLUMNS[scaled]
            geometry = TileGeometry(plane, columns, scale_columns, has_bias=True)
            needed += tiles_of(rows) * geometry.record_bytes + LAYER_ALIGNMENT
    free = shutil.disk_usage(Path(os.path.realpath(out)).parent).free
    if free < needed:
        raise StorageError(
            f"{out} needs about {needed} bytes, its disk has {free} free; free some, choose "
            "another place or build fewer levels"
        )


def _write_layer(
    writer: BankWriter,
    layer: HeavyLayer,
    quantized: QuantizedLayer,
    levels: tuple[Level, ...],
) -> None:
    """Write one layer, then let go of its weights."""
    rows, columns = layer.weight.shape
    operators = tuple(dict.fromkeys(use.operator for use in layer.uses))
    chunk_rows = chunk_rows_for(rows, columns, operators)
    writer.add_layer(
        layer.name,
        operators,
        quantized.codes,
        rows=rows,
        columns=columns,
        chunk_rows=chunk_rows,
        residual_steps=quantized.residual_steps,
        scale_columns=quantized.scale_columns,
        has_bias=bool(quantized.codes.bias),
        relative_error=quantized.relative_error,
        sensitivity=_sensitivity(quantized, levels, chunk_rows),
    )
    if quantized.codes.bias and layer.bias is None:
        layer.bias = np.zeros(rows, np.float32)  # tells the graph that the operator adds one
    layer.weight = np.empty((0, columns), np.float32)


def _sensitivity(
    quantized: QuantizedLayer, levels: tuple[Level, ...], chunk_rows: int
) -> np.ndarray:
    """(chunks, levels) float32: the layer's output error, shared out by the errors of the rows."""
    columns = []
    for level in levels:
        rows = quantized.row_error[level]
        chunks = np.add.reduceat(rows, np.arange(0, len(rows), chunk_rows))
        error = quantized.output_error.get(level)
        if error is not None and chunks.sum() > 0:
            chunks = chunks / chunks.sum() * error
        columns.append(chunks)
    # An error that dwarfs the output may leave float32's range; it need only stay the largest.
    return np.minimum(np.stack(columns, axis=1), np.finfo(np.float32).max).astype(np.float32)


def _report(out: Path, manifest: Manifest, weights: int, stages: Progress) -> BuildReport:
    def average(level: Level) -> float:
        errors = (
            layer.relative_error[level] * layer.rows * layer.columns for layer in manifest.layers
        )
        return sum(errors) / weights

    return BuildReport(
        bank=str(out),
        layers=len(manifest.layers),
        weights=weights,
        plane_bytes={plane: entry.bytes for plane, entry in manifest.planes.items()},
        kept_in_float=len(manifest.kept_in_float),
        calibration_samples=manifest.calibration.samples if manifest.calibration else 0,
        relative_error={level: average(level) for level in manifest.levels},
        stage_seconds=stages.seconds,
    )
