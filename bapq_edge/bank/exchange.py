"""The exchange form: data/bank/<model>/<layer>/chunk_<i>_q<bit>.npy, one file per chunk and plane.

Each file is a structured array (rows,) that `numpy.load` opens: `code` u1 (columns,), of plane f32
`weight` f4 (columns,) instead; `scale` f4 (groups,) where the plane has scales; `bias` f4 where the
layer has one. Manifest, graph and sensitivity table lie beside the layers' folders. `pack` inverts
`unpack` exactly.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import (
    BankFormatError,
    BankIntegrityError,
    BankNotFoundError,
    RequestError,
    SignatureDroppedWarning,
)
from .boundary import BoundaryArrays
from .codes import LayerCodes, check_values, join_rows
from .files import digest_of, file_size, inside, read_at
from .layer import Layer
from .layout import PLANES, Plane, TileGeometry
from .manifest import MANIFEST_FILE, BoundaryEntry, FileEntry, Manifest
from .npy import SENSITIVITY_DTYPE, check_sensitivity, from_npy, to_npy
from .reader import Bank, read_manifest
from .rows import DROPPED_BIAS, ROW_ORDER, ROW_TABLES
from .signature import has_signature
from .staging import TEMPORARY_SUFFIXES, Staging, check_parent, storage_errors
from .writer import BankWriter

__all__ = ["pack", "unpack"]

_AGAIN = "unpack the bank again"
_HEADER_LIMIT = 1 << 16
"""Most bytes of a .npy header of version 1.0."""


def unpack(bank_path: str | os.PathLike[str], directory: str | os.PathLike[str]) -> Path:
    """Write the exchange form of a bank below `directory`; returns data/bank/<model> in it.

    An exchange form of the same model that stands there is replaced; `directory` is created, those
    above it are not. On failure nothing changes.
    """
    check_parent(Path(directory))
    bank = Bank.open(bank_path)
    if Path(os.path.realpath(directory)).is_relative_to(os.path.realpath(bank.path)):
        raise RequestError(f"{directory} is in the bank {bank.path} itself: choose another place")
    for plane, entry in bank.manifest.planes.items():
        if plane not in bank.planes:
            raise BankNotFoundError(
                f"{bank.path / entry.file} is absent: put it back, then unpack the bank"
            )
    folder = Path(directory) / "data" / "bank" / bank.manifest.model.name
    if has_signature(bank.path):
        warnings.warn(
            f"{bank.path}: its signature is not in the tree: sign the bank that you pack",
            SignatureDroppedWarning,
            stacklevel=2,
        )
    with (
        storage_errors(folder),
        _parents_of(folder),
        Staging(folder, _check_is_exchange_form) as staging,
    ):
        for name, data in _files_of(bank):
            target = staging.path / name
            target.parent.mkdir(exist_ok=True)
            target.write_bytes(data)
        staging.commit()
    return folder


def pack(directory: str | os.PathLike[str], bank_path: str | os.PathLike[str]) -> Path:
    """Make a bank of an exchange form; returns its path.

    `directory` is what `unpack` was given, or data/bank/<model> in it. Raises BankNotFoundError,
    BankFormatError or StorageError.
    """
    folder = _find_model(Path(directory))
    manifest = read_manifest(folder)
    _check_files(folder, manifest)
    graph, *halves = (_read_entry(folder, entry) for entry in manifest.graphs)
    sensitivity = _read_sensitivity(folder, manifest)
    rows = _read_rows(folder, manifest)
    with BankWriter(
        bank_path,
        levels=manifest.levels,
        source=manifest.model,
        calibration=manifest.calibration,
    ) as writer:
        for layer in manifest.layers:
            writer.add_layer(
                layer,
                _read_layer(folder, layer),
                sensitivity=sensitivity[layer.chunk_range],
                row_order=rows[ROW_ORDER.key].get(layer.name),
                dropped_bias=rows[DROPPED_BIAS.key].get(layer.name),
            )
        writer.finish(
            graph,
            manifest.kept_in_float,
            [(each.model, _read_boundary(folder, manifest, each)) for each in manifest.boundary],
            (halves[0], halves[1], manifest.split.head_layers) if manifest.split else None,
            manifest.expected,
        )
    return Path(bank_path)


def _chunk_file(layer: Layer, index: int, plane: Plane) -> str:
    """Path below the model's folder; `index` counts the chunks of the layer."""
    return f"{layer.name}/chunk_{index}_q{PLANES[plane]}.npy"


def _dtype(geometry: TileGeometry) -> np.dtype[Any]:
    codes = ("weight", "<f4") if geometry.plane == "f32" else ("code", "|u1")
    members: list[Any] = [(*codes, (geometry.columns,))]
    if geometry.scale_groups:
        members.append(("scale", "<f4", (geometry.scale_groups,)))
    if geometry.has_bias:
        members.append(("bias", "<f4"))
    return np.dtype(members)


def _files_of(bank: Bank) -> Iterator[tuple[str, bytes]]:
    """Path below the model's folder and bytes of every file."""
    yield MANIFEST_FILE, bank.manifest.to_json()
    for graph in bank.manifest.graphs:
        yield graph.file, bank.file_bytes(graph)
    yield bank.manifest.sensitivity.file, to_npy(bank.sensitivity())
    for entry in (*bank.manifest.row_tables.values(), *bank.manifest.boundary_files):
        yield entry.file, bank.file_bytes(entry)
    for layer in bank.manifest.layers:
        for plane in layer.planes:
            dtype, level = _dtype(layer.geometry(plane)), PLANES[plane]
            for index in range(layer.chunk_count):
                codes = bank.chunk_codes(plane, layer.first_chunk + index)
                values = {
                    "weight": codes.weight,
                    "code": codes.codes.get(plane),
                    "scale": codes.scales.get(level),
                    "bias": codes.bias.get(level),
                }
                rows = layer.chunk_slice(layer.first_chunk + index)
                array = np.empty(rows.stop - rows.start, dtype)
                for name in dtype.names or ():
                    array[name] = values[name]
                yield _chunk_file(layer, index, plane), to_npy(array)


def _read_sensitivity(folder: Path, manifest: Manifest) -> NDArray[np.float32]:
    shape = (manifest.chunk_count, len(manifest.levels))
    file = manifest.sensitivity.file
    values = shape[0] * shape[1] * SENSITIVITY_DTYPE.itemsize
    data = _read(folder, file, _HEADER_LIMIT + values)
    try:
        table = from_npy(data, SENSITIVITY_DTYPE, shape)
        check_sensitivity(table, manifest.levels, manifest.held())
    except ValueError as error:
        raise BankFormatError(f"{folder / file}: {error}: {_AGAIN}") from None
    return table


def _read_rows(folder: Path, manifest: Manifest) -> dict[str, dict[str, NDArray[Any]]]:
    """The values of each table of rows by layer, none where the bank has no such table."""
    values: dict[str, dict[str, NDArray[Any]]] = {table.key: {} for table in ROW_TABLES}
    for table in ROW_TABLES:
        entry = manifest.row_tables.get(table.key)
        if entry is not None:
            data = _read(folder, entry.file, _HEADER_LIMIT + entry.bytes)
            try:
                values[table.key] = table.parse(data, manifest.layers)
            except ValueError as error:
                raise BankFormatError(f"{folder / entry.file}: {error}: {_AGAIN}") from None
    return values


def _read_boundary(folder: Path, manifest: Manifest, entry: BoundaryEntry) -> BoundaryArrays:
    arrays = {}
    for name, (dtype, shape) in entry.model.shapes(manifest.layers).items():
        data = _read_entry(folder, entry.arrays[name])
        try:
            arrays[name] = from_npy(data, dtype, shape)
        except ValueError as error:
            raise BankFormatError(
                f"{folder / entry.arrays[name].file}: {error}: {_AGAIN}"
            ) from None
    return arrays


def _read_entry(folder: Path, entry: FileEntry) -> bytes:
    data = _read(folder, entry.file, entry.bytes)
    if digest_of(data) != entry.blake2b:
        raise BankIntegrityError(
            f"{folder / entry.file} has BLAKE2b {digest_of(data)}, "
            f"expected {entry.blake2b}: {_AGAIN}"
        )
    return data


def _read_layer(folder: Path, layer: Layer) -> LayerCodes:
    parts = []
    for plane in layer.planes:
        dtype, level = _dtype(layer.geometry(plane)), PLANES[plane]
        for index in range(layer.chunk_count):
            file = _chunk_file(layer, index, plane)
            rows = layer.chunk_slice(layer.first_chunk + index)
            shape = (rows.stop - rows.start,)
            data = _read(folder, file, _HEADER_LIMIT + shape[0] * dtype.itemsize)
            try:
                array = from_npy(data, dtype, shape)
                fields = {name: np.ascontiguousarray(array[name]) for name in dtype.names or ()}
                codes = fields["weight"] if plane == "f32" else fields["code"]
                check_values(plane, codes, fields.get("scale"))
            except ValueError as error:
                raise BankFormatError(f"{folder / file}: {error}: {_AGAIN}") from None
            parts.append(
                LayerCodes(
                    weight=codes if plane == "f32" else None,
                    codes={} if plane == "f32" else {plane: codes},
                    scales={level: fields["scale"]} if "scale" in fields else {},
                    bias={level: fields["bias"]} if "bias" in fields else {},
                )
            )
    return join_rows(parts)


def _read(folder: Path, file: str, limit: int) -> bytes:
    """Read a whole file of at most `limit` bytes."""
    target = inside(os.path.realpath(folder), file)
    size = file_size(target)
    if size > limit:
        raise BankFormatError(f"{folder / file} has {size} bytes, allowed are {limit}: {_AGAIN}")
    return read_at(target, 0, size)


def _find_model(directory: Path) -> Path:
    if (directory / MANIFEST_FILE).is_file():
        return directory
    found = [
        manifest.parent
        for manifest in sorted(directory.glob(f"data/bank/*/{MANIFEST_FILE}"))
        if not manifest.parent.name.endswith(TEMPORARY_SUFFIXES)
    ]
    if not found:
        raise BankNotFoundError(
            f"{directory} holds no data/bank/<model>/{MANIFEST_FILE}: name a directory that "
            "unpack has written"
        )
    if len(found) > 1:
        raise BankFormatError(
            f"{directory} holds {len(found)} models: name one of them, such as {found[0]}"
        )
    return found[0]


def _check_files(folder: Path, manifest: Manifest) -> None:
    """Raise BankFormatError unless exactly the files that the manifest implies are there."""
    tables = (manifest.sensitivity, *manifest.row_tables.values(), *manifest.boundary_files)
    expected = {MANIFEST_FILE, *(entry.file for entry in (*manifest.graphs, *tables))} | {
        _chunk_file(layer, index, plane)
        for layer in manifest.layers
        for plane in layer.planes
        for index in range(layer.chunk_count)
    }
    found = {
        os.path.relpath(os.path.join(parent, name), folder)
        for parent, _, names in os.walk(folder)
        for name in names
    }
    for what, files in (("lacks", expected - found), ("has an unknown file", found - expected)):
        if files:
            raise BankFormatError(f"{folder} {what} {min(files)!a}: {_AGAIN}")


def _check_is_exchange_form(folder: Path) -> None:
    """Raise BankFormatError unless the folder is an exchange form: it is about to be replaced."""
    try:
        _check_files(folder, read_manifest(folder))
    except ValueError as error:
        raise BankFormatError(
            f"{folder} is there and is not an unpacked bank: move it away ({error})"
        ) from None


@contextlib.contextmanager
def _parents_of(folder: Path) -> Iterator[None]:
    """Make the parent directories; when the block fails, remove those that were made."""
    made: list[Path] = []
    try:
        for parent in reversed(folder.parents):
            if not parent.exists():
                parent.mkdir()
                made.append(parent)
        yield
    except BaseException:
        for parent in reversed(made):
            with contextlib.suppress(OSError):
                parent.rmdir()
        raise
