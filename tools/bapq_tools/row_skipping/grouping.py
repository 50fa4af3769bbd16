"""Orders the rows of a layer so that those that are skipped in the same regions share chunks."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from bapq_edge.bank.layout import TILE_ROWS, tiles_of

__all__ = ["chunk_rows_of", "group_rows", "most_skipped"]

_CHUNKS = 8
"""Least number of chunks of a layer that has the tiles: every further chunk costs some time."""

_SHARE = 0.5
"""Largest share of the chunks of a layer that a region skips. With more of them gone the answer is
no longer the network's but that of whoever found the region."""

_ROUNDS = 20


def chunk_rows_of(stored_rows: int, chunk_rows: int) -> int:
    """The rows per chunk of a layer that is to be pruned; never more than it has now."""
    tiles = max(1, tiles_of(stored_rows) // _CHUNKS)
    return min(chunk_rows, tiles * TILE_ROWS)


def most_skipped(stored_rows: int, chunk_rows: int) -> int:
    """The number of chunks of a layer that a region may skip."""
    return int(_SHARE * -(-stored_rows // chunk_rows))


def group_rows(
    cost: NDArray[np.float64], shares: NDArray[np.float64], chunk_rows: int
) -> NDArray[np.intp]:
    """Find an order of the rows, (rows,), whose chunks can be skipped at the least cost.

    `cost` is (regions, rows), `shares` is (regions,), of the samples; every region skips
    the cheapest `most_skipped` chunks. Chunks are chosen for the rows and rows for the chunks in
    turn, as in k-means with clusters of a given size (Bennett, Bradley and Demiriz, "Constrained
    k-means clustering", 2000): neither step raises the cost, so it ends.
    """
    rows = cost.shape[1]
    chunk_of_slot = np.arange(rows) // chunk_rows
    chunks = int(chunk_of_slot[-1]) + 1
    skipped = most_skipped(rows, chunk_rows)
    if not skipped:
        return np.arange(rows)
    # Regions count by how often they come, not by how large their outputs are.
    scaled = cost / np.maximum(cost.sum(1, keepdims=True), np.finfo(float).tiny) * shares[:, None]
    chunk = np.empty(rows, np.intp)
    chunk[np.argsort(scaled.sum(0), kind="stable")] = chunk_of_slot
    for _ in range(_ROUNDS):
        member = np.eye(chunks)[chunk]  # (rows, chunks)
        cheapest = np.argsort(scaled @ member, axis=1, kind="stable")[:, :skipped]
        picked = np.zeros((len(cost), chunks))
        np.put_along_axis(picked, cheapest, 1, axis=1)
        of_row = scaled.T @ picked  # (rows, chunks): what a row costs in a chunk
        moved = chunk_of_slot[linear_sum_assignment(of_row[:, chunk_of_slot])[1]]
        if of_row[np.arange(rows), moved].sum() >= of_row[np.arange(rows), chunk].sum() * (
            1 - 1e-9
        ):
            break
        chunk = moved
    # Rows of a chunk stay in order: their outputs are then scattered the least.
    return np.lexsort((np.arange(rows), chunk))
