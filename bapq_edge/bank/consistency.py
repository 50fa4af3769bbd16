"""Reads a manifest: each value by the rule of its type, then what spans several values."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from ..errors import BankFormatError, BankIntegrityError, BankVersionError
from .boundary import MAX_PRECISIONS, MAX_VALUES, Boundary, array_file
from .files import REPAIR
from .layout import LEVELS, planes_for, scaled_levels, tiles_of
from .manifest import (
    BODY_FILE,
    FORMAT_NAME,
    FORMAT_VERSION,
    GRAPH_FILE,
    HEAD_FILE,
    MANIFEST_FILE,
    MAX_CHUNK_BYTES,
    MAX_MANIFEST_BYTES,
    SENSITIVITY_FILE,
    Manifest,
    chunks_file,
    digest_in,
    digests_file,
    plane_file,
)
from .npy import array_bytes, chunk_table_bytes, digest_table_bytes, sensitivity_table_bytes
from .rows import ROW_TABLES
from .strict_json import Place, decode, parse_json, shown

__all__ = ["check_boundary", "parse_manifest"]

MAX_CHUNKS = 1 << 20
"""Most chunks of a bank: chunk tables stay under 16 MiB. At 128 KiB a chunk this is 128 GiB per
plane."""

MAX_POINTS = 256
"""Most plans whose errors are stated."""

MAX_BATCHED = 1024
"""Most inputs, and outputs, that are told to hold samples."""

_BATCHED = f"1 to {MAX_BATCHED} names, each once"

MAX_TABLE_ROWS = 1 << 22
"""Most rows of a bank in layers that reorder or drop some: their tables stay under 17 MB each, and
a small file cannot ask for a huge output."""

MAX_GRAPH_BYTES = (1 << 31) - 1
"""Most bytes of a graph: what protobuf can hold."""

Check = Callable[[bool, str, Any, Any], None]
"""`check(good, key, found, expected)` raises unless `good`."""


def parse_manifest(data: bytes, where: str = MANIFEST_FILE) -> Manifest:
    """Parse and check the bytes of a manifest; `where` begins every message.

    Raises BankFormatError, BankVersionError, BankPathError, or BankIntegrityError where the bytes
    have not the digest that they state.
    """
    document = parse_json(data, where, MAX_MANIFEST_BYTES)
    _check_version(document, where)
    _check_digest(data, document, where)
    manifest: Manifest = decode(Manifest, document, Place(where, ""))
    _check_consistency(manifest, where)
    return manifest


def check_boundary(model: Boundary, manifest: Manifest, check: Check) -> None:
    """Check what spans several fields of a boundary model."""
    precisions = [(f"wishes[{i}]", precision) for i, precision in enumerate(model.precisions)]
    for key, precision in [("base", model.base), *precisions]:
        check(
            (precision.level is None) != (precision.bits is None),
            key,
            precision,
            "a level or bits",
        )
        levels = manifest.levels
        check(precision.level in (None, *levels), key, precision, f"of the levels {list(levels)}")
        check(
            (precision.region or 0) < model.regions, key, precision, f"of {model.regions} regions"
        )
    count = len(model.precisions)
    check(1 <= count <= MAX_PRECISIONS, "wishes", f"{count} precisions", f"1 to {MAX_PRECISIONS}")
    check(len(set(model.precisions)) == count, "wishes", "with one twice", "each once")
    check(model.base.region is None, "base", model.base, "without skipped rows")
    split = manifest.split is not None
    check(split or model.stage != "gate", "stage", "gate", "start or answer without a split")
    answers = model.stage == "answer"
    check(
        not answers or model.precisions[0] == model.base,
        "wishes[0]",
        model.precisions[0],
        model.base,
    )
    fewest = 1 if model.scores == "none" else 2
    check(model.features >= fewest, "features", model.features, f"at least {fewest}")
    check(model.values <= MAX_VALUES, "pool", model.pool, f"at most {MAX_VALUES} values")
    tree = model.kind == "tree"
    check((model.nodes > 0) == tree, "nodes", model.nodes, "above 0 for a tree, else 0")


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


def _check_digest(data: bytes, document: dict[str, Any], where: str) -> None:
    if "digest" not in document:
        return  # which is refused with the other keys
    digests = digest_in(data)
    if digests is None:
        raise BankFormatError(
            f"{where}: digest is {shown(document['digest'])}, must be 64 lower-case hexadecimal "
            "digits, and plainly written"
        )
    stated, found = digests
    if stated != found:
        raise BankIntegrityError(f"{where} has BLAKE2b {found}, expected {stated}: {REPAIR}")


def _check_consistency(manifest: Manifest, where: str) -> None:
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
    _check_boundaries(manifest, check)
    _check_split(manifest, check)
    _check_batched(manifest, check)
    _check_static(manifest, check)
    _check_expected(manifest, check)


def _require(where: str, good: bool, key: str, found: Any, expected: Any) -> None:
    if not good:
        # Cut: a hostile list may be long.
        raise BankFormatError(f"{where}: {key} is {str(found)[:80]}, must be {expected}")


def _check_expected(manifest: Manifest, check: Check) -> None:
    expected = manifest.expected
    if expected is None:
        return
    check(manifest.calibration is not None, "expected", "there", "absent without calibration")
    points = expected.points
    check(0 < len(points) <= MAX_POINTS, "expected.points", len(points), f"1 to {MAX_POINTS}")
    bits = [point.bits for point in points]
    check(bits == sorted(bits), "expected.points", "in another order", "by bits")
    for i, point in enumerate(points):
        at = f"expected.points[{i}].level"
        check(point.level in (0, *manifest.levels), at, point.level, f"0 or of {manifest.levels}")
        first = next(n for n, other in enumerate(points) if other.level == point.level)
        check(point.level == 0 or first == i, at, point.level, "a level once")


def _check_layers(manifest: Manifest, check: Check) -> None:
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
        alone = "DepthwiseConv" not in layer.operators or layer.depthwise
        check(alone, f"{at}.operators", list(layer.operators), "DepthwiseConv alone")
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


def _check_files(manifest: Manifest, check: Check) -> None:
    for graph in manifest.graphs:
        check(graph.bytes <= MAX_GRAPH_BYTES, graph.file, graph.bytes, f"{MAX_GRAPH_BYTES} or less")
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


def _check_boundaries(manifest: Manifest, check: Check) -> None:
    names: dict[str, int] = {}
    for i, entry in enumerate(manifest.boundary):
        at, model = f"boundary[{i}]", entry.model
        first = names.setdefault(model.name, i)
        check(first == i, f"{at}.model.name", model.name, f"unlike boundary[{first}]'s")

        def check_model(good: bool, key: str, found: Any, expected: Any, at: str = at) -> None:
            check(good, f"{at}.model.{key}", found, expected)

        check_boundary(model, manifest, check_model)
        shapes = model.shapes(manifest.layers)
        check(
            set(entry.arrays) == set(shapes), f"{at}.arrays", sorted(entry.arrays), sorted(shapes)
        )
        for name, file in entry.arrays.items():
            expected = array_file(model.name, name)
            check(file.file == expected, f"{at}.arrays.{name}.file", file.file, expected)
            dtype, shape = shapes[name]
            size = array_bytes(dtype, shape)
            check(file.bytes == size, f"{at}.arrays.{name}.bytes", file.bytes, size)


def _check_static(manifest: Manifest, check: Check) -> None:
    static, levels = manifest.static or (), manifest.levels
    check(len(static) <= MAX_POINTS, "static", f"{len(static)} points", f"at most {MAX_POINTS}")
    for i, point in enumerate(static):
        at, precision = f"static[{i}].precision", point.precision
        one = (precision.level is None) != (precision.bits is None)
        check(one and precision.region is None, at, precision, "a level or bits, and no region")
        check(precision.level in (None, *levels), at, precision, f"of the levels {list(levels)}")


def _check_batched(manifest: Manifest, check: Check) -> None:
    if manifest.batched is None:
        return
    for key, names in (
        ("inputs", manifest.batched.inputs),
        ("outputs", manifest.batched.outputs),
    ):
        once = len(set(names)) == len(names)
        check(once and 0 < len(names) <= MAX_BATCHED, f"batched.{key}", names, _BATCHED)


def _check_split(manifest: Manifest, check: Check) -> None:
    split = manifest.split
    if split is None:
        return
    for key, found, expected in (
        ("head.file", split.head.file, HEAD_FILE),
        ("body.file", split.body.file, BODY_FILE),
    ):
        check(found == expected, f"split.{key}", found, expected)
    most = len(manifest.layers)
    check(split.head_layers <= most, "split.head_layers", split.head_layers, f"0 to {most}")
