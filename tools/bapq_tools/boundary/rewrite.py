"""Writes a bank again, with the rows of its layers in another order or in smaller chunks.

Codes, scales and biases stay what they are, so the answers are the same, bit for bit, at every
level; only what can be skipped, loaded and given a level of its own changes.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import numpy as np

from bapq_edge.bank.boundary import Boundary, BoundaryArrays, StaticPoint
from bapq_edge.bank.layer import Layer
from bapq_edge.bank.layout import TILE_ROWS
from bapq_edge.bank.manifest import Batched, Manifest
from bapq_edge.bank.npy import ROW_DTYPE
from bapq_edge.bank.reader import Bank
from bapq_edge.bank.signature import has_signature
from bapq_edge.bank.writer import BankWriter
from bapq_edge.errors import (
    BankNotFoundError,
    BoundaryDroppedWarning,
    RequestError,
    SignatureDroppedWarning,
)

__all__ = ["Split", "output_rows", "rewrite"]

Split = tuple[bytes, bytes, int]
"""The two halves of the graph, and the number of layers in the first: see `BankWriter.finish`."""

_NOTHING: Mapping[str, np.ndarray] = MappingProxyType({})
_FLOAT_MAX = float(np.finfo(np.float32).max)


def rewrite(
    bank: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    row_order: Mapping[str, np.ndarray] = _NOTHING,
    chunk_rows: Mapping[str, int] = MappingProxyType({}),
    boundary: Sequence[tuple[Boundary, BoundaryArrays]] = (),
    split: Split | None = None,
    batched: Batched | None = None,
    static: Sequence[StaticPoint] | None = None,
) -> Path:
    """Write a bank again and return its path; `out` may be the bank itself.

    `row_order` gives layers by name another order of the rows they store: (stored_rows,) numbers of
    output rows, exactly those that the layer stores now (see `output_rows`). `chunk_rows` gives
    them another chunk size, a multiple of 16. The new bank has the boundary models and the split
    graph that are given: those of the old one depend on its rows and chunks, and are dropped with a
    BoundaryDroppedWarning unless others of the same name take their place; so is a signature, with
    a SignatureDroppedWarning. `batched` and `static` are what is known of batches and of
    plans for all inputs; None: what the bank knows.

    Raises:
        RequestError: a layer, an order or a chunk size that the bank cannot have.
        BankNotFoundError: there is no bank, or a plane file is absent.
        BankError, StorageError: the bank cannot be read, the new one cannot be written.
    """
    source = Bank.open(bank)
    manifest = source.manifest
    for plane, entry in manifest.planes.items():
        if plane not in source.planes:
            raise BankNotFoundError(
                f"{source.path / entry.file} is absent: put it back, then rewrite the bank"
            )
    orders = {layer.name: output_rows(source, layer) for layer in manifest.layers}
    _check_request(source, orders, row_order, chunk_rows)
    _say_dropped(source.path, manifest, {model.name for model, _ in boundary}, split)
    sensitivity = source.sensitivity()
    with BankWriter(
        out, levels=manifest.levels, source=manifest.model, calibration=manifest.calibration
    ) as writer:
        for layer in manifest.layers:
            stored = orders[layer.name]
            wanted = np.asarray(row_order.get(layer.name, stored), ROW_DTYPE)
            place = np.empty(layer.rows, np.int64)  # of an output row among those stored
            place[stored] = np.arange(len(stored))
            picked = place[wanted]
            size = int(chunk_rows.get(layer.name, layer.chunk_rows))
            dropped = _all_rows(source, layer)[layer.stored_rows :]
            codes = source.layer_codes(layer)
            writer.add_layer(
                replace(layer, chunk_rows=size),
                codes if _in_order(picked) else codes.of_rows(picked),
                sensitivity=_shared_out(sensitivity[layer.chunk_range], layer, picked, size),
                row_order=np.concatenate([wanted, dropped]),
                dropped_bias=source.dropped_bias(layer),
            )
        writer.finish(
            source.graph_bytes(),
            manifest.kept_in_float,
            boundary,
            split,
            manifest.expected,
            batched=manifest.batched if batched is None else batched,
            static=manifest.static if static is None else static,
        )
    return Path(out)


def output_rows(bank: Bank, layer: Layer) -> np.ndarray:
    """The output row of every row that the layer stores, in stored order: (stored_rows,) uint32."""
    return _all_rows(bank, layer)[: layer.stored_rows]


def _all_rows(bank: Bank, layer: Layer) -> np.ndarray:
    """The output row of every stored row, then of every dropped one: (rows,) uint32."""
    order = bank.row_order(layer)
    return np.arange(layer.rows, dtype=ROW_DTYPE) if order is None else order


def _check_request(
    bank: Bank,
    orders: Mapping[str, np.ndarray],
    row_order: Mapping[str, np.ndarray],
    chunk_rows: Mapping[str, int],
) -> None:
    for name in (*row_order, *chunk_rows):
        if name not in orders:
            raise RequestError(
                f"{bank.path} has no layer {name!r}; it has {_listed(orders)}: name one of them"
            )
    for name, order in row_order.items():
        own = orders[name]
        if "Gather" in bank.layer(name).operators and not np.array_equal(order, own):
            raise RequestError(
                f"layer {name} is gathered, which finds rows by their number: leave its order"
            )
        if np.shape(order) != own.shape or not np.array_equal(np.sort(order), np.sort(own)):
            raise RequestError(
                f"the row order of layer {name} is {np.shape(order)} and must hold each of its "
                f"{len(own)} stored rows once: give those of output_rows in another order"
            )
    for name, size in chunk_rows.items():
        if size < TILE_ROWS or size % TILE_ROWS:
            raise RequestError(
                f"layer {name} was to have chunks of {size} rows: choose a multiple of {TILE_ROWS}"
            )


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")


def _say_dropped(path: Path, manifest: Manifest, given: set[str], split: Split | None) -> None:
    gone = [e.model.name for e in manifest.boundary if e.model.name not in given]
    what = [f"boundary model {name}" for name in gone]
    what += ["the split graph"] if manifest.split is not None and split is None else []
    if has_signature(path):
        warnings.warn(
            f"{path}: its signature will not be in the rewritten bank: sign it again",
            SignatureDroppedWarning,
            stacklevel=3,
        )
    if what:
        warnings.warn(
            f"{path}: {', '.join(what)} will not be in the rewritten bank: fit it again",
            BoundaryDroppedWarning,
            stacklevel=3,
        )


def _in_order(picked: np.ndarray) -> bool:
    return np.array_equal(picked, np.arange(len(picked)))


def _shared_out(table: np.ndarray, layer: Layer, picked: np.ndarray, size: int) -> np.ndarray:
    """Share out the sensitivity of the old chunks: (new chunks, levels) float32."""
    if size == layer.chunk_rows and _in_order(picked):
        return table
    chunk = np.arange(layer.stored_rows) // layer.chunk_rows
    rows = table.astype(np.float64)[chunk] / np.bincount(chunk)[chunk, None]
    starts = np.arange(0, layer.stored_rows, size)
    return np.minimum(np.add.reduceat(rows[picked], starts), _FLOAT_MAX).astype(np.float32)
