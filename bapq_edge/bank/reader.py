"""Opens a bank, refusing whatever breaks the specification, and reads its chunks."""

from __future__ import annotations

import bisect
import os
import warnings
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..errors import (
    BankFormatError,
    BankIntegrityError,
    BankNotFoundError,
    BankTruncatedError,
    BudgetTooSmallError,
    InterruptedUpdateWarning,
    MissingPlaneWarning,
    RequestError,
)
from ..input_files import is_path
from .boundary import Boundary, BoundaryArrays
from .codes import LayerCodes, join_rows, unpack_chunk
from .consistency import parse_manifest
from .files import REPAIR, digest_of, exists, file_size, inside, raw_digest_of, read_at
from .graph_file import check_graph
from .layer import Layer
from .layout import PLANES, PLANES_OF_LEVEL, Level, Plane, level_within
from .manifest import MANIFEST_FILE, MAX_MANIFEST_BYTES, FileEntry, Manifest, digest_in
from .npy import (
    CHUNK_DTYPE,
    DIGEST_BYTES,
    SENSITIVITY_DTYPE,
    check_sensitivity,
    from_npy,
)
from .rows import DROPPED_BIAS, ROW_ORDER, ROW_TABLES

__all__ = ["Bank", "read_manifest"]

T = TypeVar("T")


_MANIFEST_MEMORY = 10
"""Bytes that a manifest takes in memory while it is read, over its own: measured, rounded up."""


def read_manifest(directory: Path, memory_bytes: int | None = None) -> Manifest:
    """Read and check the manifest of a bank, or of its exchange form."""
    target = inside(os.path.realpath(directory), MANIFEST_FILE)
    size = file_size(target)
    if memory_bytes is not None and size * _MANIFEST_MEMORY > memory_bytes:
        raise BudgetTooSmallError(
            f"{directory / MANIFEST_FILE} has {size} bytes, which take about "
            f"{size * _MANIFEST_MEMORY} to read, memory_budget is {memory_bytes}: allow more, if "
            "you trust this bank"
        )
    # One byte more than allowed, so that a larger file is seen to be larger.
    data = read_at(target, 0, min(size, MAX_MANIFEST_BYTES + 1))
    return parse_manifest(data, str(directory / MANIFEST_FILE))


class Bank:
    """A bank that was opened: everything but the bytes of graph and planes has been checked.

    Those are checked whenever they are read. A bank holds no open files.
    """

    path: Path
    manifest: Manifest
    planes: tuple[Plane, ...]
    """Planes whose files are there, in the order of `PLANES`."""
    levels: tuple[Level, ...]
    """Levels that can run, highest first: those built, less those that need an absent plane."""

    def __init__(self, path: Path, manifest: Manifest, memory_bytes: int | None = None) -> None:
        self.path = path
        self.manifest = manifest
        self._check_memory(memory_bytes)
        self._root = os.path.realpath(path)
        self._first_chunks = [layer.first_chunk for layer in manifest.layers]
        self._layers = {layer.name: layer for layer in manifest.layers}
        for graph in manifest.graphs:
            self._sized(graph.file, graph.bytes)
        self.sensitivity()
        self._rows = {
            table.key: self._parsed(entry, partial(table.parse, layers=manifest.layers))
            if (entry := manifest.row_tables.get(table.key))
            else {}
            for table in ROW_TABLES
        }
        for each in manifest.boundary:
            self.boundary_arrays(each.model)
        tables = {plane: self._read_table(plane) for plane in PLANES if plane in manifest.planes}
        self._plane_files = {
            plane: self._sized(entry.file, entry.bytes)
            for plane, entry in manifest.planes.items()
            if exists(path / entry.file, follow_symlinks=False)
        }
        self._chunks = {p: table for p, table in tables.items() if p in self._plane_files}
        self.planes = tuple(self._chunks)
        self.levels = self._runnable(manifest.levels)

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, memory_bytes: int | None = None) -> Bank:
        """Open and check a bank; a file that is read whole must fit into `memory_bytes`.

        Raises BankNotFoundError, BankFormatError, BankVersionError, BankPathError,
        BankTruncatedError, BankIntegrityError (of manifest or table), BudgetTooSmallError,
        ResourceError, StorageError, or RequestError for what is no path. Warns with
        MissingPlaneWarning when plane files are absent, with InterruptedUpdateWarning when the old
        bank is opened where a cut-off update has left it.
        """
        if not is_path(path):
            raise RequestError(f"the bank is {path!r:.80}: give its path")
        path = Path(path)
        if not exists(path):
            path = _set_aside(path)
        if not path.is_dir():
            raise BankFormatError(f"{path} is a file, a bank is a directory: build one")
        if not exists(path / MANIFEST_FILE, follow_symlinks=False):
            raise BankNotFoundError(
                f"{path} is not a bank, it holds no {MANIFEST_FILE}: check the name, or build it"
            )
        bank = cls(path, read_manifest(path, memory_bytes), memory_bytes)
        if bank.absent_files:
            files = ", ".join(bank.absent_files)
            for layer in bank.manifest.layers:
                if not bank._runnable(layer.levels):
                    raise BankFormatError(
                        f"{path}: without {files} layer {layer.name} cannot run: {REPAIR}"
                    )
            left = ", ".join(map(str, bank.levels))
            warnings.warn(
                f"{path}: without {files} only these levels can run: {left}",
                MissingPlaneWarning,
                stacklevel=2,
            )
        return bank

    @property
    def absent_files(self) -> tuple[str, ...]:
        """Files of the planes that are not there."""
        planes = self.manifest.planes
        return tuple(sorted(planes[plane].file for plane in set(planes) - set(self.planes)))

    def level_of(self, layer: Layer, level: Level) -> Level:
        """Level that the layer runs at where `level` is asked for and some planes may be absent.

        See `level_within`.
        """
        return level_within(self._runnable(layer.levels), level)

    @property
    def weights(self) -> int:
        """Number of weights in all layers, those of dropped rows left out."""
        return sum(layer.weights for layer in self.manifest.layers)

    def layer(self, name: str) -> Layer:
        """The layer of that name; KeyError when there is none."""
        return self._layers[name]

    def layer_of(self, chunk: int) -> Layer:
        """The layer that a chunk, numbered through the whole bank, belongs to."""
        return self.manifest.layers[bisect.bisect_right(self._first_chunks, chunk) - 1]

    def plane_path(self, plane: Plane) -> Path:
        """The plane's file."""
        return self.path / self.manifest.planes[plane].file

    def chunks(self, plane: Plane) -> NDArray[np.void]:
        """(chunk_count,) of offset u8, bytes u4, crc32 u4; KeyError when the plane is absent."""
        return self._chunks[plane]

    def chunk_digests(self, plane: Plane) -> NDArray[np.uint8]:
        """(chunk_count, 16): BLAKE2b-128 of every chunk."""
        entry = self.manifest.planes[plane].digests
        return self._array(entry, np.dtype("u1"), (self.manifest.chunk_count, DIGEST_BYTES))

    def sensitivity(self) -> NDArray[np.float32]:
        """(chunk_count, levels of the manifest), read and checked at every call.

        A chunk's share of the squared relative error of its layer's output, at each level.
        """
        entry, levels = self.manifest.sensitivity, self.manifest.levels
        return self._array(
            entry,
            SENSITIVITY_DTYPE,
            (self.manifest.chunk_count, len(levels)),
            lambda table: check_sensitivity(table, levels, self.manifest.held()),
        )

    def row_order(self, layer: Layer) -> NDArray[np.uint32] | None:
        """(rows,): output row of every stored row, then of every dropped one; None: in order."""
        return self._rows[ROW_ORDER.key].get(layer.name)

    def dropped_bias(self, layer: Layer) -> NDArray[np.float32] | None:
        """(dropped rows,): what they give before the clip; None where that is 0."""
        return self._rows[DROPPED_BIAS.key].get(layer.name)

    def boundary_arrays(self, model: Boundary) -> BoundaryArrays:
        """Arrays of a boundary model of the manifest, by name; read and checked at every call."""
        files = next(each.arrays for each in self.manifest.boundary if each.model is model)
        shapes = model.shapes(self.manifest.layers)
        arrays = {name: self._array(files[name], *shapes[name]) for name in shapes}
        try:
            model.check_arrays(arrays, self.manifest.layers)
        except ValueError as error:
            where = self.path / "boundary" / model.name
            raise BankFormatError(f"{where}: {error}: {REPAIR}") from None
        return arrays

    def manifest_bytes(self) -> bytes:
        """The manifest's file, byte for byte. Raises BankIntegrityError where it has changed."""
        target = inside(self._root, MANIFEST_FILE)
        data = read_at(target, 0, file_size(target))
        if digest_in(data) != (self.manifest.digest, self.manifest.digest):
            raise BankIntegrityError(
                f"{self.path / MANIFEST_FILE} was changed since the bank was opened: open it again"
            )
        return data

    def graph_bytes(self, entry: FileEntry | None = None) -> bytes:
        """The ONNX graph without the heavy weights, or another of `manifest.graphs`.

        Checked against its digest, and that it asks for nothing outside of itself.
        """
        entry = self.manifest.graph if entry is None else entry
        data = self.file_bytes(entry)
        check_graph(data, str(self.path / entry.file))
        return data

    def file_bytes(self, entry: FileEntry) -> bytes:
        """A whole file, checked against size and digest."""
        data = read_at(self._sized(entry.file, entry.bytes), 0, entry.bytes)
        found = digest_of(data)
        if found != entry.blake2b:
            raise BankIntegrityError(
                f"{self.path / entry.file} has BLAKE2b {found}, expected {entry.blake2b}: {REPAIR}"
            )
        return data

    def read_chunk(self, plane: Plane, chunk: int) -> bytes:
        """The bytes of a chunk, checked against its CRC-32."""
        row = self._chunks[plane][chunk]
        data = read_at(self._plane_files[plane], int(row["offset"]), int(row["bytes"]))
        self._check_crc(plane, chunk, data)
        return data

    def check_chunk(self, plane: Plane, chunk: int, digest: bytes, data: bytes) -> None:
        """Check bytes in every way that a chunk can be: checksum, digest, padding, scales.

        `digest` is its row of `chunk_digests`. Raises BankIntegrityError or BankFormatError.
        """
        self._check_crc(plane, chunk, data)
        self._check_digest(plane, chunk, digest, data)
        self._codes(plane, chunk, data)

    def _check_digest(self, plane: Plane, chunk: int, digest: bytes, data: bytes) -> None:
        found = raw_digest_of(data)
        if found != digest:
            raise BankIntegrityError(
                f"{self._name(plane, chunk)} has BLAKE2b {found.hex()}, expected {digest.hex()}: "
                f"{REPAIR}"
            )

    def check_digests(self) -> None:
        """Check every byte that the manifest vouches for, once and now, against its digests.

        A run checks what it reads by CRC-32, which finds damage; digests find what somebody
        changed on purpose. Raises what reading raises, BankIntegrityError for other bytes.
        """
        for graph in self.manifest.graphs:
            self.graph_bytes(graph)
        for plane in self.planes:
            digests = self.chunk_digests(plane)
            for chunk in range(self.manifest.chunk_count):
                data = self.read_chunk(plane, chunk)
                self._check_digest(plane, chunk, digests[chunk].tobytes(), data)

    def chunk_codes(self, plane: Plane, chunk: int) -> LayerCodes:
        """Codes, scales and bias of a chunk of one plane, checked down to the padding.

        None of them if the plane does not hold the layer.
        """
        return self._codes(plane, chunk, self.read_chunk(plane, chunk))

    def _check_crc(self, plane: Plane, chunk: int, data: bytes) -> None:
        found, expected = zlib.crc32(data), int(self._chunks[plane][chunk]["crc32"])
        if found != expected:
            raise BankIntegrityError(
                f"{self._name(plane, chunk)} has CRC-32 {found:08x}, expected {expected:08x}: "
                f"{REPAIR}"
            )

    def _codes(self, plane: Plane, chunk: int, data: bytes) -> LayerCodes:
        layer = self.layer_of(chunk)
        if plane not in layer.planes:
            return LayerCodes()
        rows = layer.chunk_slice(chunk)
        try:
            return unpack_chunk(layer.geometry(plane), rows.stop - rows.start, data)
        except ValueError as error:
            raise BankFormatError(f"{self._name(plane, chunk)}: {error}: {REPAIR}") from None

    def layer_codes(self, layer: Layer) -> LayerCodes:
        """All planes of a layer that are present, unpacked."""
        return join_rows(
            [self.chunk_codes(plane, chunk) for plane in self.planes for chunk in layer.chunks]
        )

    def weight_bytes(self, level: Level) -> int:
        """Bytes of all chunks that a run at this level reads."""
        return sum(
            int(self._chunks[plane]["bytes"][layer.chunk_range].sum())
            for layer in self.manifest.layers
            for plane in PLANES_OF_LEVEL[self.level_of(layer, level)]
        )

    def bits_per_weight(self, level: Level) -> float:
        """Bits that a run at this level reads per weight: codes, scales, bias and padding."""
        return 8 * self.weight_bytes(level) / self.weights

    def _check_memory(self, memory_bytes: int | None) -> None:
        """Refuse files too large for memory before a byte of them is read."""
        for entry in self.manifest.small_files:
            if memory_bytes is not None and entry.bytes > memory_bytes:
                raise BudgetTooSmallError(
                    f"{self.path / entry.file} is read whole and has {entry.bytes} bytes, "
                    f"memory_budget is {memory_bytes}: allow more, if you trust this bank"
                )

    def _runnable(self, levels: tuple[Level, ...]) -> tuple[Level, ...]:
        """Those of the levels whose planes are there."""
        return tuple(level for level in levels if set(PLANES_OF_LEVEL[level]) <= set(self.planes))

    def _read_table(self, plane: Plane) -> NDArray[np.void]:
        """Chunk table of a plane, checked; its digest table is checked along with it.

        The geometry leaves one place for every chunk, so none can overlap or lie outside.
        """
        entry = self.manifest.planes[plane].chunks
        layout = self.manifest.chunk_layout(plane)
        table = self._array(entry, CHUNK_DTYPE, layout.shape)
        wrong = (table["offset"] != layout["offset"]) | (table["bytes"] != layout["bytes"])
        if wrong.any():
            chunk = int(np.argmax(wrong))
            found, expected = table[chunk], layout[chunk]
            raise BankFormatError(
                f"{self.path / entry.file}: chunk {chunk} (layer {self.layer_of(chunk).name}) has "
                f"{found['bytes']} bytes at offset {found['offset']}, must have "
                f"{expected['bytes']} at {expected['offset']}: {REPAIR}"
            )
        self.chunk_digests(plane)
        return table

    def _sized(self, file: str, expected: int) -> str:
        """Real path of a file of the bank, once its size is right."""
        target = inside(self._root, file)
        found = file_size(target)
        message = f"{self.path / file} has {found} bytes, expected {expected}: {REPAIR}"
        if found < expected:
            raise BankTruncatedError(message)
        if found > expected:
            raise BankFormatError(message)
        return target

    def _array(
        self,
        entry: FileEntry,
        dtype: np.dtype[Any],
        shape: tuple[int, ...],
        check: Callable[[NDArray[Any]], None] = lambda array: None,
    ) -> NDArray[Any]:
        def parse(data: bytes) -> NDArray[Any]:
            array = from_npy(data, dtype, shape)
            check(array)
            return array

        return self._parsed(entry, parse)

    def _parsed(self, entry: FileEntry, parse: Callable[[bytes], T]) -> T:
        """What `parse` makes of the file; its ValueErrors become BankFormatErrors."""
        data = self.file_bytes(entry)
        try:
            return parse(data)
        except ValueError as error:
            raise BankFormatError(f"{self.path / entry.file}: {error}: {REPAIR}") from None

    def _name(self, plane: Plane, chunk: int) -> str:
        return f"{self.plane_path(plane)}: chunk {chunk} (layer {self.layer_of(chunk).name})"


def _set_aside(path: Path) -> Path:
    """Where the old bank stands if an update was cut off between its two renames.

    It is whole: it is removed only once another one stands at `path`.
    """
    from .staging import aside_of  # hardly any session needs it

    aside = aside_of(path)
    if not aside.is_dir():
        raise BankNotFoundError(f"{path}: there is no bank: check the name, or build it")
    warnings.warn(
        f"{path}: an update was cut off, {aside} is used, the bank from before: install the new "
        "one again",
        InterruptedUpdateWarning,
        stacklevel=3,
    )
    return aside
