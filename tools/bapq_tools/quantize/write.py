"""Writes a quantized layer into the bank, without the rows that pruning left empty."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from bapq_edge.bank.layer import Layer
from bapq_edge.bank.layout import Level, TileGeometry, planes_for, tiles_of
from bapq_edge.bank.npy import BIAS_DTYPE, ROW_DTYPE
from bapq_edge.bank.writer import BankWriter, chunk_rows_for

from ..onnx_graph.ir import HeavyLayer
from .quantized_layer import QuantizedLayer


def write_layer(
    writer: BankWriter,
    layer: HeavyLayer,
    quantized: QuantizedLayer,
    levels: tuple[Level, ...],
    zero_rows: np.ndarray | None,
) -> None:
    """Write one layer, then let go of its weights.

    `levels` are those of the bank. `zero_rows`, (rows,) bool or None, tells the rows whose weights
    are known to be all zero. They are not stored where that saves bytes.
    """
    rows, columns = layer.weight.shape
    operators = tuple(dict.fromkeys(use.operator for use in layer.uses))
    has_bias = bool(quantized.codes.bias)
    dropped = _dropped_rows(layer, quantized, zero_rows)
    row_order = dropped_bias = None
    if len(dropped):
        # Stored rows stay in order: their outputs are then scattered the least.
        stored = np.setdiff1d(np.arange(rows), dropped)
        quantized = quantized.of_rows(stored)
        row_order = np.concatenate([stored, dropped]).astype(ROW_DTYPE)
        if has_bias:
            bias = np.zeros(rows) if layer.bias is None else layer.bias
            dropped_bias = bias[dropped].astype(BIAS_DTYPE)
    chunk_rows = chunk_rows_for(rows - len(dropped), columns, operators)
    writer.add_layer(
        Layer(
            name=layer.name,
            operators=operators,
            rows=rows,
            stored_rows=rows - len(dropped),
            columns=columns,
            chunk_rows=chunk_rows,
            residual_steps=quantized.residual_steps,
            scale_columns=quantized.scale_columns,
            has_bias=has_bias,
            looped=layer.looped or None,
            method=quantized.method,
            relative_error=quantized.relative_error,
        ),
        quantized.codes,
        sensitivity=_sensitivity(quantized, levels, chunk_rows),
        row_order=row_order,
        dropped_bias=dropped_bias,
    )
    if has_bias and layer.bias is None:
        layer.bias = np.zeros(rows, np.float32)  # tells the graph that the operator adds one
    layer.weight = np.empty((0, columns), np.float32)


def tile_bytes(
    columns: int,
    levels: tuple[Level, ...],
    scale_columns: Mapping[Level, int],
    has_bias: bool,
    depthwise: bool = False,
) -> int:
    """The bytes of 16 rows of a layer, in all planes that the levels read."""
    return sum(
        TileGeometry.of_layer(
            plane, levels, columns, scale_columns, has_bias, depthwise
        ).record_bytes
        for plane in planes_for(levels)
    )


def _dropped_rows(
    layer: HeavyLayer, quantized: QuantizedLayer, zero_rows: np.ndarray | None
) -> np.ndarray:
    """The rows not to store: all that are zero, or none where that saves nothing."""
    if zero_rows is None or layer.gathered:  # a Gather finds rows by their number
        return np.arange(0)
    rows, columns = layer.weight.shape
    dropped = np.flatnonzero(zero_rows)[int(zero_rows.all()) :]  # a layer stores at least one
    tiles = tiles_of(rows) - tiles_of(rows - len(dropped))
    has_bias = bool(quantized.codes.bias)
    saved = tiles * tile_bytes(
        columns, quantized.levels, quantized.scale_columns, has_bias, layer.depthwise
    )
    tables = rows * ROW_DTYPE.itemsize + len(dropped) * BIAS_DTYPE.itemsize
    return dropped if saved > tables else dropped[:0]


def _sensitivity(
    quantized: QuantizedLayer, levels: tuple[Level, ...], chunk_rows: int
) -> np.ndarray:
    """Share out the layer's output error by the errors of the rows, (chunks, levels) float32.

    It is 0 where the layer lacks a level.
    """
    rows = len(next(iter(quantized.row_error.values())))
    starts = np.arange(0, rows, chunk_rows)
    columns = []
    for level in levels:
        chunks = np.add.reduceat(quantized.row_error.get(level, np.zeros(rows)), starts)
        error = quantized.output_error.get(level)
        if error is not None and chunks.sum() > 0:
            chunks = chunks / chunks.sum() * error
        columns.append(chunks)
    # An error that dwarfs the output may leave float32's range; it need only stay the largest.
    result: np.ndarray = np.minimum(np.stack(columns, axis=1), np.finfo(np.float32).max)
    return result.astype(np.float32)
