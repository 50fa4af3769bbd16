"""The manifest: frozen dataclasses, strict in both directions.

What a value may be stands in its field's type; checks that span several fields follow in
`_check_consistency`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..errors import BankFormatError, BankPathError, BankVersionError
from .boundary import Boundary, array_file
from .layout import (
    BLOCK_COLUMNS,
    LEVELS,
    TILE_ROWS,
    Level,
    Plane,
    TileGeometry,
    planes_for,
    scaled_levels,
    tiles_of,
)
from .npy import (
    CHUNK_DTYPE,
    array_bytes,
    chunk_table_bytes,
    digest_table_bytes,
    sensitivity_table_bytes,
)
from .rows import ROW_TABLES
from .strict_json import Place, Rule, decode, encode, parse_json, shown

__all__ = [
    "BODY_FILE",
    "FORMAT_NAME",
    "FORMAT_VERSION",
    "GRAPH_FILE",
    "HEAD_FILE",
    "MANIFEST_FILE",
    "MAX_MANIFEST_BYTES",
    "SENSITIVITY_FILE",
    "BoundaryEntry",
    "Calibration",
    "FileEntry",
    "KeptNode",
    "Layer",
    "Manifest",
    "Method",
    "Operator",
    "PlaneEntry",
    "SourceModel",
    "SplitGraph",
    "chunks_file",
    "digests_file",
    "plane_file",
    "printable",
    "safe_name",
]

FORMAT_NAME = "bapq-bank"
FORMAT_VERSION = 1
MANIFEST_FILE = "manifest.json"
GRAPH_FILE = "graph/main.onnx"
HEAD_FILE = "graph/head.onnx"
BODY_FILE = "graph/body.onnx"
SENSITIVITY_FILE = "tables/sensitivity.npy"

MAX_MANIFEST_BYTES = 4 << 20
"""About 8,000 layers; more would cost a small board its memory before anything is checked."""

MAX_CHUNKS = 1 << 20
"""Per bank: chunk tables stay under 16 MiB. At 128 KiB a chunk this is 128 GiB per plane."""

MAX_TABLE_ROWS = 1 << 22
"""Per bank, in layers that reorder or drop rows: their tables stay under 17 MB each, and a small
file cannot ask for a huge output."""

MAX_CHUNK_BYTES = (1 << 31) - 1
"""Fits the table's u4 and any signed 32-bit index."""

Operator = Literal["MatMul", "Gemm", "Conv", "Gather"]
Method = Literal["nearest", "compensated"]


def _integer(low: int, high: int, step: int = 1) -> Rule:
    multiple = f", a multiple of {step}" if step > 1 else ""
    return Rule(
        f"an integer from {low} to {high}{multiple}",
        lambda n: low <= n <= high and n % step == 0,
    )


# Control characters and line separators would break one-line messages, surrogates UTF-8.
_UNPRINTABLE = "\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff"
_TEXT = re.compile(f"[^{_UNPRINTABLE}]{{0,1024}}")
# 200 leaves room under the 255 bytes of a file name; "manifest.json" is taken in the exchange form.
_NAME = re.compile(r"(?!(\.|\.\.|manifest\.json)\Z)[A-Za-z0-9._-]{1,200}")
_FILE = re.compile(r"(boundary|graph|planes|tables)/(?!\.{1,2}\Z)[A-Za-z0-9._-]{1,200}")
_HEX = re.compile("[0-9a-f]{32}")

Text = Annotated[str, Rule("at most 1024 characters without control characters", _TEXT.fullmatch)]
Name = Annotated[
    str,
    Rule(
        "1 to 200 letters, digits, '.', '_' and '-', but not '.', '..' or 'manifest.json'",
        _NAME.fullmatch,
    ),
]
File = Annotated[
    str,
    Rule(
        "a file in boundary/, graph/, planes/ or tables/ of the bank",
        _FILE.fullmatch,
        BankPathError,
    ),
]
Digest = Annotated[str, Rule("32 lower-case hexadecimal digits", _HEX.fullmatch)]
# 2^53 - 1: the largest integer that every JSON reader keeps exact.
Size = Annotated[int, _integer(0, (1 << 53) - 1)]
# Rows and columns are bounded so that no 32-bit sum of them and no chunk size can overflow.
Rows = Annotated[int, _integer(1, 1 << 30)]
Columns = Annotated[int, _integer(1, 1 << 24)]
ChunkRows = Annotated[int, _integer(TILE_ROWS, 1 << 30, TILE_ROWS)]
ScaleColumns = Annotated[int, _integer(BLOCK_COLUMNS, 1 << 24, BLOCK_COLUMNS)]
Steps = Annotated[int, _integer(8, 16)]
Fraction = Annotated[float, Rule("a finite number, 0 or more", lambda x: 0 <= x < float("inf"))]


@dataclass(frozen=True)
class FileEntry:
    """A file of the bank: its path relative to the bank, its size, its BLAKE2b-128 digest."""

    file: File
    bytes: Size
    blake2b: Digest


@dataclass(frozen=True)
class PlaneEntry:
    """One plane file and its chunk table.

    The digests of the chunks stand in the table; the plane file as a whole has none.
    """

    file: File
    bytes: Size
    chunks: FileEntry
    """tables/<plane>_chunks.npy, (chunk_count,): offset u8, bytes u4, crc32 u4."""
    digests: FileEntry
    """tables/<plane>_digests.npy, (chunk_count, 16) uint8: BLAKE2b-128 of each chunk."""

    @property
    def tables(self) -> tuple[FileEntry, FileEntry]:
        """Both tables."""
        return self.chunks, self.digests


@dataclass(frozen=True)
class Layer:
    """One weight-heavy operator, or several that share their weights."""

    name: Name
    """Unique; letters, digits, '.', '_' and '-' only; also its folder in the exchange form."""
    operators: tuple[Operator, ...]
    """What reads it: MatMul, Gemm, Conv, Gather, in execution order, each once."""
    rows: Rows
    stored_rows: Rows
    """The other rows are dropped: their weights are all zero. Chunks hold stored rows only."""
    reordered: bool
    """Whether tables/row_order.npy says where each row stands in the output."""
    columns: Columns
    chunk_rows: ChunkRows
    """Stored rows per chunk, a multiple of 16; the last chunk may have fewer."""
    first_chunk: Size
    has_bias: bool
    residual_steps: Steps
    """Level-8 steps in one level-4 step, 8 to 16."""
    scale_columns: dict[Level, ScaleColumns]
    """Columns per scale of the levels 4 (and 8), 2 and 1 that the layer has."""
    method: dict[Level, Method]
    """How the codes of most rows were chosen, for the levels below 32: as the nearest to each
    weight, or such that they make up for each other's errors."""
    relative_error: dict[Level, Fraction]
    """||(w - w_level) x|| / ||w x|| on the calibration data (uncalibrated: x = 1s), for the levels
    that the layer has: those of the bank, or some of them."""

    @property
    def levels(self) -> tuple[Level, ...]:
        """Levels that the layer has, highest first."""
        return tuple(level for level in LEVELS if level in self.relative_error)

    @property
    def planes(self) -> tuple[Plane, ...]:
        """Planes that hold the layer, in the order of `PLANES`."""
        return planes_for(self.levels)

    @property
    def chunk_count(self) -> int:
        """Number of chunks, numbered from `first_chunk` through the whole bank."""
        return -(-self.stored_rows // self.chunk_rows)

    @property
    def weights(self) -> int:
        """Number of weights that are stored."""
        return self.stored_rows * self.columns

    @property
    def chunk_range(self) -> slice:
        """Its chunks, in a table of all chunks of the bank."""
        return slice(self.first_chunk, self.first_chunk + self.chunk_count)

    def check(self, where: str) -> None:
        """Raise BankFormatError when a field breaks its rule."""
        decode(Layer, encode(self), Place(where, ""))

    def chunk_slice(self, chunk: int) -> slice:
        """Stored rows of a chunk, which is numbered through the whole bank."""
        start = (chunk - self.first_chunk) * self.chunk_rows
        return slice(start, min(start + self.chunk_rows, self.stored_rows))

    def geometry(self, plane: Plane) -> TileGeometry:
        """Tile records of this layer in a plane that holds it."""
        return TileGeometry.of_layer(
            plane, self.levels, self.columns, self.scale_columns, self.has_bias
        )


@dataclass(frozen=True)
class KeptNode:
    """A node with weights that stays with the graph engine in float, and why."""

    name: Text
    operator: Text
    weights: Size
    reason: Text


@dataclass(frozen=True)
class SourceModel:
    """Where the bank came from."""

    name: Name
    """Its folder in the exchange form too: see `safe_name`."""
    bytes: Size
    blake2b: Digest
    producer: Text
    """Program and version that wrote the bank."""


@dataclass(frozen=True)
class Calibration:
    """What the quantizer saw; absent from the manifest when it saw nothing."""

    samples: Size
    blake2b: Digest


@dataclass(frozen=True)
class SplitGraph:
    """The graph cut in two at the tap of a gate; both halves together do what `graph` does."""

    head: FileEntry
    """From the model's inputs to the tap."""
    body: FileEntry
    """From the tap, and inputs that are read beyond it, to the outputs."""
    head_layers: Size
    """The first so many layers are the head's, the others the body's."""


@dataclass(frozen=True)
class BoundaryEntry:
    """A boundary model and the files of its arrays."""

    model: Boundary
    arrays: dict[Name, FileEntry]


@dataclass(frozen=True)
class Manifest:
    """The whole manifest.json."""

    model: SourceModel
    levels: tuple[Level, ...]
    """Levels the bank was built for, highest first."""
    graph: FileEntry
    sensitivity: FileEntry
    """tables/sensitivity.npy, (chunk_count, levels) float32: what every chunk at every level adds
    to the squared relative error of its layer."""
    planes: dict[Plane, PlaneEntry]
    layers: tuple[Layer, ...]
    row_order: FileEntry | None = None
    """tables/row_order.npy, (rows of all reordered layers,) uint32: output row of every stored row,
    then of every dropped one."""
    dropped_bias: FileEntry | None = None
    """tables/dropped_bias.npy, (dropped rows of all layers with a bias,) float32."""
    boundary: tuple[BoundaryEntry, ...] = ()
    split: SplitGraph | None = None
    kept_in_float: tuple[KeptNode, ...] = ()
    calibration: Calibration | None = None
    format: str = field(default=FORMAT_NAME)
    format_version: int = field(default=FORMAT_VERSION)

    @classmethod
    def from_json(cls, data: bytes, where: str = MANIFEST_FILE) -> Manifest:
        """Parse and check; `where` begins every message.

        Raises BankFormatError, BankVersionError or BankPathError.
        """
        document = parse_json(data, where, MAX_MANIFEST_BYTES)
        _check_version(document, where)
        manifest: Manifest = decode(cls, document, Place(where, ""))
        _check_consistency(manifest, where)
        return manifest

    def to_json(self) -> bytes:
        """Canonical bytes: keys sorted, two spaces of indent, ASCII, a newline at the end."""
        text = json.dumps(encode(self), sort_keys=True, indent=2, allow_nan=False)
        return text.encode("ascii") + b"\n"

    @property
    def chunk_count(self) -> int:
        """Chunks of every plane."""
        return sum(layer.chunk_count for layer in self.layers)

    def held(self) -> NDArray[np.bool_]:
        """(chunk_count, levels): whether the chunk's layer has the level."""
        rows = [[level in layer.levels for level in self.levels] for layer in self.layers]
        return np.repeat(np.array(rows), [layer.chunk_count for layer in self.layers], axis=0)

    @property
    def graphs(self) -> tuple[FileEntry, ...]:
        """The graph and, if it is split, its halves."""
        return (self.graph, *((self.split.head, self.split.body) if self.split else ()))

    @property
    def boundary_files(self) -> list[FileEntry]:
        """Arrays of all boundary models."""
        return [entry for each in self.boundary for entry in each.arrays.values()]

    @property
    def row_tables(self) -> dict[str, FileEntry]:
        """`row_order` and `dropped_bias`, as far as they are there."""
        entries = {table.key: getattr(self, table.key) for table in ROW_TABLES}
        return {key: entry for key, entry in entries.items() if entry is not None}

    @property
    def small_files(self) -> list[FileEntry]:
        """Every file but the planes and the manifest itself."""
        tables = [table for plane in self.planes.values() for table in plane.tables]
        rest = (self.sensitivity, *self.row_tables.values(), *self.boundary_files)
        return [*self.graphs, *rest, *tables]

    def chunk_layout(self, plane: Plane) -> NDArray[np.void]:
        """Where every chunk must stand: (chunk_count,) of `CHUNK_DTYPE`, with crc32 left 0.

        Chunks of a layer that the plane does not hold have 0 bytes.
        """
        layout = np.zeros(self.chunk_count, CHUNK_DTYPE)
        end = 0
        for layer in self.layers:
            start = end
            record_bytes = layer.geometry(plane).record_bytes if plane in layer.planes else 0
            part = layout[layer.first_chunk : layer.first_chunk + layer.chunk_count]
            chunk_bytes = layer.chunk_rows // TILE_ROWS * record_bytes
            part["offset"] = start + chunk_bytes * np.arange(len(part), dtype=np.uint64)
            part["bytes"] = min(chunk_bytes, MAX_CHUNK_BYTES)
            end = start + tiles_of(layer.stored_rows) * record_bytes
            part["bytes"][-1] = end - int(part["offset"][-1])
        return layout


def plane_file(plane: Plane) -> str:
    """Path of a plane's file in the bank."""
    return f"planes/{plane}.bin"


def chunks_file(plane: Plane) -> str:
    """Path of a plane's chunk table in the bank."""
    return f"tables/{plane}_chunks.npy"


def digests_file(plane: Plane) -> str:
    """Path of a plane's digest table in the bank."""
    return f"tables/{plane}_digests.npy"


def printable(text: str) -> str:
    """Turn any text into one that the manifest allows."""
    return re.sub(f"[{_UNPRINTABLE}]", "?", text)[:1024]


def safe_name(text: str) -> str:
    """Turn any text into a name that the manifest allows."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "_", text)[:200]
    return name if _NAME.fullmatch(name) else f"_{name}"[:200]


def _check_version(document: Any, where: str) -> None:
    # Before everything else, since another version may have other keys.
    if not isinstance(document, dict) or document.get("format") != FORMAT_NAME:
        found = shown(document.get("format") if isinstance(document, dict) else document)
        raise BankFormatError(f'{where}: format is {found}, must be "{FORMAT_NAME}"')
    version = document.get("format_version")
    if type(version) is not int or version != FORMAT_VERSION:
        raise BankVersionError(
            f"{where}: format_version is {shown(version)}, this program reads {FORMAT_VERSION}: "
            "rebuild the bank, or use the program version that wrote it"
        )


def _check_consistency(manifest: Manifest, where: str) -> None:
    """Checks that span several fields."""
    check = partial(_require, where)
    levels = manifest.levels
    ordered = tuple(level for level in LEVELS if level in levels)
    check(levels == ordered and bool(levels), "levels", list(levels), "one or more, highest first")
    planes = planes_for(levels)
    check(
        set(manifest.planes) == set(planes),
        "planes",
        sorted(manifest.planes),
        f"{sorted(planes)} for levels {list(levels)}",
    )
    check(bool(manifest.layers), "layers", "empty", "at least one layer")
    _check_layers(manifest, check)
    _check_files(manifest, check)
    _check_boundary(manifest, check)


def _require(where: str, good: bool, key: str, found: Any, expected: Any) -> None:
    if not good:
        # Cut: a hostile list may be long.
        raise BankFormatError(f"{where}: {key} is {str(found)[:80]}, must be {expected}")


def _check_layers(manifest: Manifest, check: Callable[..., None]) -> None:
    levels = manifest.levels
    names: dict[str, int] = {}
    next_chunk = table_rows = 0
    for i, layer in enumerate(manifest.layers):
        at = f"layers[{i}]"
        first = names.setdefault(layer.name, i)
        check(first == i, f"{at}.name", f'"{layer.name}"', f"unlike layers[{first}].name")
        check(
            len(set(layer.operators)) == len(layer.operators) > 0,
            f"{at}.operators",
            list(layer.operators),
            "one or more, each once",
        )
        gathered = "Gather" in layer.operators  # it finds rows by their number
        fewest = layer.rows if gathered else 1
        check(
            fewest <= layer.stored_rows <= layer.rows,
            f"{at}.stored_rows",
            layer.stored_rows,
            f"from {fewest} to {layer.rows}",
        )
        check(not (gathered and layer.reordered), f"{at}.reordered", "true", "false with a Gather")
        if layer.reordered or layer.stored_rows < layer.rows:
            table_rows += layer.rows
        limit = f"within {MAX_TABLE_ROWS} rows of layers that reorder or drop some"
        check(table_rows <= MAX_TABLE_ROWS, f"{at}.rows", layer.rows, limit)
        check(layer.first_chunk == next_chunk, f"{at}.first_chunk", layer.first_chunk, next_chunk)
        next_chunk += layer.chunk_count
        stored = layer.stored_rows
        check(next_chunk <= MAX_CHUNKS, f"{at}.stored_rows", stored, f"within {MAX_CHUNKS} chunks")
        check(
            bool(layer.levels) and set(layer.levels) <= set(levels),
            f"{at}.relative_error",
            f"for levels {sorted(layer.levels)}",
            f"for one or more of {sorted(levels)}",
        )
        scaled = scaled_levels(layer.levels)
        check(
            set(layer.scale_columns) == scaled,
            f"{at}.scale_columns",
            f"for levels {sorted(layer.scale_columns)}",
            sorted(scaled),
        )
        chosen = set(layer.levels) - {32}
        check(
            set(layer.method) == chosen,
            f"{at}.method",
            f"for levels {sorted(layer.method)}",
            sorted(chosen),
        )
        tiles = tiles_of(min(stored, layer.chunk_rows))
        chunk_bytes = tiles * max(layer.geometry(plane).record_bytes for plane in layer.planes)
        check(
            chunk_bytes <= MAX_CHUNK_BYTES,
            f"{at}.chunk_rows",
            layer.chunk_rows,
            f"fewer: a chunk would have {chunk_bytes} bytes, allowed are {MAX_CHUNK_BYTES}",
        )

    held = {level for layer in manifest.layers for level in layer.levels}
    check(held == set(levels), "levels", list(levels), f"{sorted(held)}, those of the layers")


def _check_files(manifest: Manifest, check: Callable[..., None]) -> None:
    chunk_count = manifest.chunk_count
    sensitivity = manifest.sensitivity
    sensitivity_bytes = sensitivity_table_bytes(chunk_count, len(manifest.levels))
    for key, found, expected in (
        ("graph.file", manifest.graph.file, GRAPH_FILE),
        ("sensitivity.file", sensitivity.file, SENSITIVITY_FILE),
        ("sensitivity.bytes", sensitivity.bytes, sensitivity_bytes),
    ):
        check(found == expected, key, found, expected)
    for table in ROW_TABLES:
        entry = manifest.row_tables.get(table.key)
        found, expected = (
            "there" if there else "absent"
            for there in (entry is not None, table.total(manifest.layers) > 0)
        )
        check(found == expected, table.key, found, expected)
        if entry is not None:
            size = table.file_bytes(manifest.layers)
            check(entry.file == table.file, f"{table.key}.file", entry.file, table.file)
            check(entry.bytes == size, f"{table.key}.bytes", entry.bytes, size)
    for plane, plane_entry in manifest.planes.items():
        last = manifest.chunk_layout(plane)[-1]
        chunks, digests = plane_entry.tables
        for key, found, expected in (
            ("file", plane_entry.file, plane_file(plane)),
            ("bytes", plane_entry.bytes, int(last["offset"]) + int(last["bytes"])),
            ("chunks.file", chunks.file, chunks_file(plane)),
            ("chunks.bytes", chunks.bytes, chunk_table_bytes(chunk_count)),
            ("digests.file", digests.file, digests_file(plane)),
            ("digests.bytes", digests.bytes, digest_table_bytes(chunk_count)),
        ):
            check(found == expected, f"planes.{plane}.{key}", found, expected)


def _check_boundary(manifest: Manifest, check: Callable[..., None]) -> None:
    names: dict[str, int] = {}
    for i, entry in enumerate(manifest.boundary):
        at, model = f"boundary[{i}]", entry.model
        first = names.setdefault(model.name, i)
        check(first == i, f"{at}.model.name", model.name, f"unlike boundary[{first}]'s")

        def check_model(good: bool, key: str, found: Any, expected: Any, at: str = at) -> None:
            check(good, f"{at}.model.{key}", found, expected)

        model.check(manifest, check_model)
        shapes = model.shapes(manifest)
        check(
            set(entry.arrays) == set(shapes), f"{at}.arrays", sorted(entry.arrays), sorted(shapes)
        )
        for name, file in entry.arrays.items():
            expected = array_file(model.name, name)
            check(file.file == expected, f"{at}.arrays.{name}.file", file.file, expected)
            dtype, shape = shapes[name]
            size = array_bytes(dtype, shape)
            check(file.bytes == size, f"{at}.arrays.{name}.bytes", file.bytes, size)
    split = manifest.split
    if split is not None:
        for key, found, expected in (
            ("head.file", split.head.file, HEAD_FILE),
            ("body.file", split.body.file, BODY_FILE),
        ):
            check(found == expected, f"split.{key}", found, expected)
        most = len(manifest.layers)
        check(split.head_layers <= most, "split.head_layers", split.head_layers, f"0 to {most}")
