"""The manifest as frozen dataclasses: what a value may be stands in the type of its field.

`consistency.parse_manifest` reads one, and checks what spans several fields.
"""

from __future__ import annotations

import functools
import json
import math
import re
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from .boundary import Boundary, StaticPoint
from .fields import BankDigest, Digest, File, Fraction, Measure, Name, Share, Size, Text
from .files import blake2b
from .layer import Layer
from .layout import TILE_ROWS, Level, Plane, tiles_of
from .npy import CHUNK_DTYPE
from .rows import ROW_TABLES
from .strict_json import encode

__all__ = [
    "BODY_FILE",
    "FORMAT_NAME",
    "FORMAT_VERSION",
    "GRAPH_FILE",
    "HEAD_FILE",
    "MANIFEST_FILE",
    "MAX_CHUNK_BYTES",
    "MAX_MANIFEST_BYTES",
    "SENSITIVITY_FILE",
    "SIGNATURE_FILE",
    "UNFINISHED_SIGNATURE",
    "Batched",
    "BoundaryEntry",
    "Calibration",
    "Expected",
    "ExpectedPoint",
    "FileEntry",
    "KeptNode",
    "Manifest",
    "PlaneEntry",
    "SourceModel",
    "SplitGraph",
    "chunks_file",
    "digest_in",
    "digests_file",
    "plane_file",
    "seal",
]

FORMAT_NAME = "bapq-bank"
FORMAT_VERSION = 1
MANIFEST_FILE = "manifest.json"
SIGNATURE_FILE = "manifest.json.minisig"
"""Of a bank that is signed: see signature.py."""
UNFINISHED_SIGNATURE = f"{SIGNATURE_FILE}.new"
"""What signing leaves where it is killed."""
GRAPH_FILE = "graph/main.onnx"
HEAD_FILE = "graph/head.onnx"
BODY_FILE = "graph/body.onnx"
SENSITIVITY_FILE = "tables/sensitivity.npy"

MAX_MANIFEST_BYTES = 4 << 20
"""Most bytes of a manifest, about 8,000 layers: more would cost a small board its memory before
anything is checked."""

_UNSEALED = "0" * 64
_DIGEST = re.compile(rb'"digest"\s*:\s*"([0-9a-f]{64})"')

MAX_CHUNK_BYTES = (1 << 31) - 1
"""Most bytes of a chunk: they fit the table's u4 and any signed 32-bit index."""


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
        """Both tables of the plane."""
        return self.chunks, self.digests


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
    """Name of the model, and of its folder in the exchange form: see `fields.safe_name`."""
    bytes: Size
    blake2b: Digest
    producer: Text
    """Program and version that wrote the bank."""


@dataclass(frozen=True)
class Calibration:
    """What the quantizer saw; absent from the manifest when it saw nothing."""

    samples: Size
    blake2b: Digest


_MOST_LOGARITHM = 700.0  # the exponential of 710 is beyond float64


@dataclass(frozen=True)
class ExpectedPoint:
    """A plan that the build has run on samples that it had not calibrated with."""

    level: Size
    """Level of all chunks; 0: a mixture of levels."""
    bits: Fraction
    """Nominal bits per weight, all weights counted."""
    table: Fraction
    """Sum of the sensitivities of its chunks."""
    error: Fraction
    """Squared relative error of the outputs, mean over outputs and samples."""
    answers: Share
    """Mean over the samples of what `Expected.measure` names."""


@dataclass(frozen=True)
class Expected:
    """What plans lose, as measured, and how the sensitivity table is to be read by it."""

    samples: Size
    """Number of samples that it was measured on."""
    held_out: bool
    """Whether codes were chosen without these samples."""
    measure: Measure
    """"agreement": share of samples whose class is that of the float model; "cosine": between the
    outputs and the float model's."""
    factor: Fraction
    exponent: Fraction
    """The error of mixtures is about `factor` * (sum of their sensitivities) ** `exponent`."""
    points: tuple[ExpectedPoint, ...]
    """By bits, the fewest first."""

    def level(self, level: Level) -> ExpectedPoint | None:
        """The point of a uniform level, if it was measured."""
        return next((point for point in self.points if point.level == level), None)

    def of_mixture(self, table: float) -> float:
        """Error of a mixture whose sensitivities add up to `table`, above 0.

        Between measured mixtures it is read off their curve, a line through the logarithms that
        never falls; beyond them, and without them, it follows the power law.
        """
        tables, errors = self._mixtures
        x = math.log(table)
        if len(tables):
            nearest = min(max(x, float(tables[0])), float(tables[-1]))
            found = float(np.interp(nearest, tables, errors)) + self.exponent * (x - nearest)
        elif self.factor:
            found = math.log(self.factor) + self.exponent * x
        else:
            return 0.0
        return math.exp(min(found, _MOST_LOGARITHM))  # a forged exponent must not overflow

    @functools.cached_property
    def _mixtures(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Logarithms of the tables of measured mixtures, rising, and of their errors.

        Errors never fall: each is the mean of the largest so far and of the smallest from there on.
        """
        known = sorted(
            (point.table, point.error)
            for point in self.points
            if point.level == 0 and point.table > 0 and point.error > 0
        )
        tables, errors = np.log(np.array(known, np.float64).reshape(-1, 2)).T
        rising = np.maximum.accumulate(errors), np.minimum.accumulate(errors[::-1])[::-1]
        return tables, (rising[0] + rising[1]) / 2


@dataclass(frozen=True)
class SplitGraph:
    """The graph cut in two at the tap of a gate; both halves together do what `graph` does."""

    head: FileEntry
    """The graph from the model's inputs to the tap."""
    body: FileEntry
    """The graph from the tap, and inputs that are read beyond it, to the outputs."""
    head_layers: Size
    """Number of the head's layers, which come first; the others are the body's."""


@dataclass(frozen=True)
class Batched:
    """What a fit has seen of batches: their samples do not touch each other."""

    inputs: tuple[Text, ...]
    """Inputs whose first axis counts samples; the others are the same for all of them."""
    outputs: tuple[Text, ...]
    """Outputs whose first axis does."""


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
    static: tuple[StaticPoint, ...] | None = None
    """Precisions for all inputs, by falling bits, each tried because the one before was enough;
    None: no fit was asked for a target."""
    split: SplitGraph | None = None
    batched: Batched | None = None
    """None: nobody knows whether the samples of a batch touch each other."""
    kept_in_float: tuple[KeptNode, ...] = ()
    calibration: Calibration | None = None
    expected: Expected | None = None
    digest: BankDigest = field(default=_UNSEALED, compare=False)
    """BLAKE2b-256 of manifest.json with zeros in place of these digits; see `digest_in`. It names
    the bank: the manifest vouches for every other byte."""
    format: str = field(default=FORMAT_NAME)
    format_version: int = field(default=FORMAT_VERSION)

    def to_json(self) -> bytes:
        """Canonical bytes: keys sorted, two spaces of indent, ASCII, a newline at the end."""
        unsealed = replace(self, digest=_UNSEALED)
        text = json.dumps(encode(unsealed), sort_keys=True, indent=2, allow_nan=False)
        return seal(text.encode("ascii") + b"\n")

    @property
    def chunk_count(self) -> int:
        """Number of chunks in every plane."""
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
        """(chunk_count,) of `CHUNK_DTYPE`: where every chunk must stand, with crc32 left 0.

        Chunks of a layer that the plane does not hold have 0 bytes.
        """
        layout = np.zeros(self.chunk_count, CHUNK_DTYPE)
        end = 0
        for layer in self.layers:
            start = end
            record_bytes = layer.geometry(plane).record_bytes if plane in layer.planes else 0
            part = layout[layer.chunk_range]
            chunk_bytes = layer.chunk_rows // TILE_ROWS * record_bytes
            part["offset"] = start + chunk_bytes * np.arange(len(part), dtype=np.uint64)
            part["bytes"] = min(chunk_bytes, MAX_CHUNK_BYTES)
            end = start + tiles_of(layer.stored_rows) * record_bytes
            part["bytes"][-1] = end - int(part["offset"][-1])
        return layout


def digest_in(data: bytes) -> tuple[str, str] | None:
    """The digest that a manifest's bytes state, and the one that they have.

    None unless they state one, and once. No text in them can look like it: there its quotes would
    have backslashes.
    """
    places = list(_DIGEST.finditer(data))
    if len(places) != 1:
        return None
    start, end = places[0].span(1)
    found = blake2b(digest_size=32)
    for part in (data[:start], _UNSEALED.encode(), data[end:]):
        found.update(part)
    return data[start:end].decode(), found.hexdigest()


def seal(data: bytes) -> bytes:
    """The bytes of a manifest with the digest that they have in place of the one that they state.

    Raises ValueError where they state none.
    """
    digests = digest_in(data)
    if digests is None:
        raise ValueError("the manifest states no digest, or more than one")
    return _DIGEST.sub(lambda place: place[0][:-65] + digests[1].encode() + b'"', data)


def plane_file(plane: Plane) -> str:
    """Path of a plane's file in the bank."""
    return f"planes/{plane}.bin"


def chunks_file(plane: Plane) -> str:
    """Path of a plane's chunk table in the bank."""
    return f"tables/{plane}_chunks.npy"


def digests_file(plane: Plane) -> str:
    """Path of a plane's digest table in the bank."""
    return f"tables/{plane}_digests.npy"
