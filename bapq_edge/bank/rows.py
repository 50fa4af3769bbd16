"""Rows that are reordered or dropped: the two tables that say so, and what they must satisfy.

A layer stores `stored_rows` of its `rows`; the weights of the others are all zero. Its row order
gives the output row of every stored row, then of every dropped one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .layer import Layer
from .npy import BIAS_DTYPE, ROW_DTYPE, from_npy, row_table_bytes, to_npy

__all__ = ["DROPPED_BIAS", "ROW_ORDER", "ROW_TABLES", "RowTable"]


@dataclass(frozen=True)
class RowTable:
    """A table with a run of values for every layer that needs them, in the order of the bank.

    Without such a layer there is no table.
    """

    key: str
    """Key of the table in the manifest, and the stem of its file."""
    dtype: np.dtype[Any]
    length: Callable[[Layer], int]
    """Gives the number of values that a layer has in the table."""
    check: Callable[[Layer, NDArray[Any]], None]
    """Raises ValueError when these cannot be the values of the layer."""

    @property
    def file(self) -> str:
        """Path in the bank."""
        return f"tables/{self.key}.npy"

    def total(self, layers: Iterable[Layer]) -> int:
        """Number of values for these layers."""
        return sum(self.length(layer) for layer in layers)

    def file_bytes(self, layers: Iterable[Layer]) -> int:
        """Size of the file for these layers."""
        return row_table_bytes(self.total(layers))

    def parse(self, data: bytes, layers: Iterable[Layer]) -> dict[str, NDArray[Any]]:
        """Values by name of the layer; ValueError where the file or the values are not right."""
        layers = tuple(layers)
        table = from_npy(data, self.dtype, (self.total(layers),))
        values = {}
        start = 0
        for layer in layers:
            stop = start + self.length(layer)
            if stop > start:
                values[layer.name] = table[start:stop]
                try:
                    self.check(layer, values[layer.name])
                except ValueError as error:
                    raise ValueError(f"layer {layer.name}: {error}") from None
            start = stop
        return values

    def encode(self, values: Mapping[str, NDArray[Any]], layers: Iterable[Layer]) -> bytes:
        """Bytes of the file with these values: the inverse of `parse`."""
        return to_npy(
            np.concatenate([values[layer.name] for layer in layers if self.length(layer)])
        )


def _check_row_order(layer: Layer, order: NDArray[np.uint32]) -> None:
    if order.shape != (layer.rows,) or order.dtype != ROW_DTYPE:
        raise ValueError(
            f"the row order is {order.dtype} {order.shape}, expected uint32 ({layer.rows},)"
        )
    if int(order.max()) >= layer.rows:
        raise ValueError(
            f"the row order holds row {int(order.max())}, the last is {layer.rows - 1}"
        )
    there = np.zeros(layer.rows, np.bool_)
    there[order] = True
    if not there.all():
        raise ValueError(f"the row order lacks row {int(there.argmin())}, another stands twice")
    # A bank has one encoding only: an order that means nothing, or changes nothing, is none.
    dropped = order[layer.stored_rows :]
    if (dropped[1:] < dropped[:-1]).any():
        raise ValueError("the dropped rows are not in ascending order")
    if (order[1:] > order[:-1]).all():
        raise ValueError("the rows are in order, though the layer is marked as reordered")


def _check_dropped_bias(layer: Layer, bias: NDArray[np.float32]) -> None:
    expected = layer.rows - layer.stored_rows
    if bias.shape != (expected,) or bias.dtype != BIAS_DTYPE:
        raise ValueError(
            f"the bias of dropped rows is {bias.dtype} {bias.shape}, expected float32 ({expected},)"
        )
    if not np.isfinite(bias).all():
        raise ValueError(
            f"dropped row {int(np.isfinite(bias).argmin())} has a bias that is no number"
        )


ROW_ORDER = RowTable(
    "row_order", ROW_DTYPE, lambda layer: layer.rows if layer.reordered else 0, _check_row_order
)
"""Output rows, (rows,) uint32, of every layer that is marked as reordered."""

DROPPED_BIAS = RowTable(
    "dropped_bias",
    BIAS_DTYPE,
    lambda layer: layer.rows - layer.stored_rows if layer.has_bias else 0,
    _check_dropped_bias,
)
"""Bias of the dropped rows, (dropped rows,) float32, of every layer with a bias."""

ROW_TABLES = (ROW_ORDER, DROPPED_BIAS)
