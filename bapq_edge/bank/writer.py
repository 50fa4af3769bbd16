"""Writes a bank, layer by layer, so that no more than one layer is ever in memory."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from ..errors import BankFormatError
from .boundary import Boundary, BoundaryArrays, StaticPoint, array_file
from .codes import LayerCodes, pack_chunk
from .fields import printable, safe_name
from .files import digest_of, raw_digest_of
from .layer import Layer
from .layout import TILE_ROWS, Level, Plane, TileGeometry, planes_for, tiles_of
from .manifest import (
    BODY_FILE,
    FORMAT_NAME,
    GRAPH_FILE,
    HEAD_FILE,
    MANIFEST_FILE,
    MAX_MANIFEST_BYTES,
    SENSITIVITY_FILE,
    SIGNATURE_FILE,
    UNFINISHED_SIGNATURE,
    Batched,
    BoundaryEntry,
    Calibration,
    Expected,
    FileEntry,
    KeptNode,
    Manifest,
    PlaneEntry,
    SourceModel,
    SplitGraph,
    chunks_file,
    digests_file,
    plane_file,
)
from .npy import CHUNK_DTYPE, DIGEST_BYTES, SENSITIVITY_DTYPE, check_sensitivity, to_npy
from .reader import Bank
from .rows import DROPPED_BIAS, ROW_ORDER, ROW_TABLES, RowTable
from .staging import Staging, check_parent, storage_errors, sync_directory

__all__ = ["BankWriter", "chunk_rows_for"]

_FOLDERS = ("graph", "planes", "tables")
_BOUNDARY_FOLDER = "boundary"

_CHUNK_BYTES = 128 << 10
"""Bytes of a chunk of plane p4: large enough that an SD card or NVMe reads near its full speed,
small enough that a ring of a few chunks fits any budget."""

_STREAMED_TILES = 4
"""Fewest tiles of a chunk: one for every core of a small board, even if the chunk then has twice
`_CHUNK_BYTES`."""


def chunk_rows_for(rows: int, columns: int, operators: Iterable[str]) -> int:
    """Rows per chunk: about 128 KiB of plane p4, and at least 64 rows up to 256 KiB.

    A layer that a Gather reads gets one tile per chunk: its rows are read one by one, on demand.
    """
    if "Gather" in operators:
        return TILE_ROWS
    depthwise = "DepthwiseConv" in operators
    tile_bytes = TileGeometry("p4", columns, 0, False, depthwise).code_bytes
    target = max(_CHUNK_BYTES // tile_bytes, 1)
    if _STREAMED_TILES * tile_bytes <= 2 * _CHUNK_BYTES:
        target = max(target, _STREAMED_TILES)
    # Chunks of equal size rather than full ones and a small rest.
    tiles = tiles_of(rows)
    chunks = max(1, round(tiles / target))
    chunk_tiles = max(-(-tiles // chunks), min(target, _STREAMED_TILES))
    return min(chunk_tiles, tiles) * TILE_ROWS


class _PlaneFile:
    """A plane file that grows, with its tables."""

    def __init__(self, path: Path) -> None:
        self.file: BinaryIO = path.open("wb")
        self.end = 0
        self.rows: list[tuple[int, int, int]] = []
        self.digests: list[bytes] = []

    def skip_layer(self, chunks: int) -> None:
        for _ in range(chunks):
            self.append(b"")

    def append(self, data: bytes) -> None:
        self.file.write(data)
        self.rows.append((self.end, len(data), zlib.crc32(data)))
        self.digests.append(raw_digest_of(data))
        self.end += len(data)

    def tables(self) -> tuple[bytes, bytes]:
        """File bytes of the chunk table and of the digest table."""
        digests = np.frombuffer(b"".join(self.digests), np.uint8).reshape(-1, DIGEST_BYTES)
        return to_npy(np.array(self.rows, CHUNK_DTYPE)), to_npy(digests)


class BankWriter:
    """Context manager that builds a bank: `add_layer` in execution order, then `finish`.

    Everything happens in a temporary sibling of `path`. Whatever stands at `path` must be a bank;
    it stays whole until `finish` replaces it, and without `finish` nothing changes.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        levels: tuple[Level, ...],
        source: SourceModel,
        calibration: Calibration | None = None,
    ) -> None:
        self.path = Path(path)
        self._levels = levels
        self._source = dataclasses.replace(source, name=safe_name(source.name))
        self._calibration = calibration
        self._staging = Staging(self.path, check_is_bank)
        self._planes: dict[Plane, _PlaneFile] = {}
        self._layers: list[Layer] = []
        self._sensitivity: list[NDArray[np.float32]] = []
        self._rows: dict[str, dict[str, NDArray[Any]]] = {table.key: {} for table in ROW_TABLES}
        self._first_chunk = 0
        self._cleanup = contextlib.ExitStack()

    def __enter__(self) -> BankWriter:
        """Begin the bank.

        Raises BankFormatError when `path` is something else than a bank, StorageError.
        """
        with contextlib.ExitStack() as stack, storage_errors(self.path):
            directory = stack.enter_context(self._staging).path
            for folder in _FOLDERS:
                (directory / folder).mkdir()
            for plane in planes_for(self._levels):
                self._planes[plane] = _PlaneFile(directory / plane_file(plane))
                stack.callback(_close_quietly, self._planes[plane].file)
            self._cleanup = stack.pop_all()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._cleanup.close()

    def add_layer(
        self,
        layer: Layer,
        codes: LayerCodes,
        *,
        sensitivity: NDArray[np.float32],
        row_order: NDArray[np.uint32] | None = None,
        dropped_bias: NDArray[np.float32] | None = None,
    ) -> Layer:
        """Write the chunks of one layer; returns the layer as this bank holds it.

        `first_chunk` and `reordered` of the layer are the writer's to set. A layer may store only
        some of its rows; the weights of the others must all be zero. A row of zeros that must be
        stored, since at least one is, has the scale 0.

        Args:
            layer: what the manifest is to tell; its `relative_error` names its levels, those of
                the bank or some of them.
            codes: the stored rows, in stored order.
            sensitivity: (chunks of the layer, levels of the bank): what each chunk adds to the
                square of `relative_error`, 0 for a level that the layer lacks.
            row_order: (rows,): the output row of every stored row, then of every dropped one in
                ascending order; None is in order.
            dropped_bias: (dropped rows,), where the layer has a bias.

        Raises:
            ValueError: codes, sensitivity or tables do not fit the description.
            StorageError: the disk is full, or the like.
        """
        name, rows = layer.name, layer.rows
        if not 1 <= layer.stored_rows <= rows:
            raise ValueError(
                f"layer {name}: {layer.stored_rows} of {rows} rows are stored, must be 1 to {rows}"
            )
        if row_order is not None and np.array_equal(row_order, np.arange(rows)):
            row_order = None
        layer = dataclasses.replace(
            layer, first_chunk=self._first_chunk, reordered=row_order is not None
        )
        layer.check(f"layer {name}")
        if sensitivity.shape != (layer.chunk_count, len(self._levels)):
            raise ValueError(
                f"layer {name}: sensitivity is {sensitivity.shape}, "
                f"expected {(layer.chunk_count, len(self._levels))}"
            )
        sensitivity = np.ascontiguousarray(sensitivity, SENSITIVITY_DTYPE)
        held = np.array([level in layer.levels for level in self._levels])
        check_sensitivity(sensitivity, self._levels, held)
        for table, values in ((ROW_ORDER, row_order), (DROPPED_BIAS, dropped_bias)):
            _check_rows(layer, table, values)
            if values is not None:
                self._rows[table.key][name] = values
        with storage_errors(self.path):
            for plane, output in self._planes.items():
                if plane not in layer.planes:
                    output.skip_layer(layer.chunk_count)
                    continue
                geometry = layer.geometry(plane)
                source = codes.weight if plane == "f32" else codes.codes.get(plane)
                if source is None or len(source) != layer.stored_rows:
                    found = "absent" if source is None else f"of {len(source)} rows"
                    raise ValueError(
                        f"layer {name}: plane {plane} is {found}, expected {layer.stored_rows}"
                    )
                for chunk in layer.chunks:
                    output.append(pack_chunk(geometry, codes, layer.chunk_slice(chunk)))
        self._layers.append(layer)
        self._sensitivity.append(sensitivity)
        self._first_chunk += layer.chunk_count
        return layer

    def finish(
        self,
        graph: bytes,
        kept_in_float: Iterable[KeptNode] = (),
        boundary: Sequence[tuple[Boundary, BoundaryArrays]] = (),
        split: tuple[bytes, bytes, int] | None = None,
        expected: Expected | Callable[[Bank], Expected | None] | None = None,
        *,
        batched: Batched | None = None,
        static: Sequence[StaticPoint] | None = None,
    ) -> Manifest:
        """Write graph, tables and manifest, then put the bank at its name in one step.

        `boundary` are models with their arrays; `split` the two halves of the graph and how many
        layers are the first half's. `expected` tells what plans lose, or is a function that runs
        them on the finished bank, at its temporary place, and returns it. `batched` and
        `static` are as in `Manifest`.

        Raises BankFormatError when they do not fit together, StorageError.
        """
        directory = self._staging.path
        folders = (*_FOLDERS, _BOUNDARY_FOLDER) if boundary else _FOLDERS
        with storage_errors(self.path):
            planes = {}
            for plane, output in self._planes.items():
                _sync_and_close(output.file)
                chunks, digests = output.tables()
                planes[plane] = PlaneEntry(
                    file=plane_file(plane),
                    bytes=output.end,
                    chunks=self._write(chunks_file(plane), chunks),
                    digests=self._write(digests_file(plane), digests),
                )
            sensitivity = np.concatenate(
                [np.empty((0, len(self._levels)), SENSITIVITY_DTYPE), *self._sensitivity]
            )
            if boundary:
                (directory / _BOUNDARY_FOLDER).mkdir()
            manifest = Manifest(
                model=self._source,
                levels=self._levels,
                graph=self._write(GRAPH_FILE, graph),
                sensitivity=self._write(SENSITIVITY_FILE, to_npy(sensitivity)),
                planes=planes,
                layers=tuple(self._layers),
                row_order=self._write_rows(ROW_ORDER),
                dropped_bias=self._write_rows(DROPPED_BIAS),
                kept_in_float=tuple(
                    dataclasses.replace(
                        node,
                        name=printable(node.name),
                        operator=printable(node.operator),
                        reason=printable(node.reason),
                    )
                    for node in kept_in_float
                ),
                calibration=self._calibration,
                boundary=tuple(
                    BoundaryEntry(
                        model,
                        {
                            name: self._write(array_file(model.name, name), to_npy(array))
                            for name, array in sorted(arrays.items())
                        },
                    )
                    for model, arrays in boundary
                ),
                split=None
                if split is None
                else SplitGraph(
                    self._write(HEAD_FILE, split[0]), self._write(BODY_FILE, split[1]), split[2]
                ),
                batched=batched,
                static=None if static is None else tuple(static),
            )
            if expected is not None and not isinstance(expected, Expected):
                self._write(MANIFEST_FILE, manifest.to_json())
                expected = expected(Bank.open(directory))
            manifest = dataclasses.replace(manifest, expected=expected)
            self._write(MANIFEST_FILE, manifest.to_json())
            # What was written is read back by the rules that every reader applies.
            manifest = Bank.open(directory).manifest
            for folder in folders:
                sync_directory(directory / folder)
            self._staging.commit()
        return manifest

    def _write_rows(self, table: RowTable) -> FileEntry | None:
        if not table.total(self._layers):
            return None
        return self._write(table.file, table.encode(self._rows[table.key], self._layers))

    def _write(self, file: str, data: bytes) -> FileEntry:
        with (self._staging.path / file).open("wb") as output:
            output.write(data)
            _sync_and_close(output)
        return FileEntry(file, len(data), digest_of(data))


def _check_rows(layer: Layer, table: RowTable, values: NDArray[Any] | None) -> None:
    """Raise ValueError unless a layer has these values in a table, or none where none belong."""
    count = table.length(layer)
    if (values is None) != (count == 0):
        found = "absent" if values is None else f"{len(values)} values"
        raise ValueError(f"layer {layer.name}: {table.key} is {found}, expected {count} values")
    if values is not None:
        try:
            table.check(layer, values)
        except ValueError as error:
            raise ValueError(f"layer {layer.name}: {error}") from None


def check_bank_target(out: Path) -> None:
    """Find out, before any work, whether a bank can be put there.

    Raises BankFormatError where something else stands, StorageError where there is no directory.
    """
    with storage_errors(out):
        if os.path.lexists(out):
            check_is_bank(out)
        else:
            check_parent(out)


def check_is_bank(path: Path) -> None:
    """Raise BankFormatError unless the directory is a bank and holds nothing else.

    It is about to be replaced, so nothing that a bank does not consist of may be in it.
    """
    step = "choose another name, or move it away"
    manifest = path / MANIFEST_FILE
    if not manifest.is_file():
        raise BankFormatError(f"{path} is there and is not a bank: {step}")
    known = (*_FOLDERS, _BOUNDARY_FOLDER, MANIFEST_FILE, SIGNATURE_FILE, UNFINISHED_SIGNATURE)
    for entry in sorted(os.listdir(path)):
        if entry not in known:
            raise BankFormatError(f"{path} holds {entry!a}, which is no part of a bank: {step}")
    with manifest.open("rb") as file:
        # Not parsed: a damaged bank, or one of another version, may be built anew.
        if f'"{FORMAT_NAME}"'.encode() not in file.read(MAX_MANIFEST_BYTES):
            raise BankFormatError(f"{path} is there and is not a bank: {step}")


def _sync_and_close(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
    file.close()


def _close_quietly(file: BinaryIO) -> None:
    # Closing flushes, which fails again when the disk is full; the file is about to be removed.
    with contextlib.suppress(OSError):
        file.close()
