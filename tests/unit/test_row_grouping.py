"""Rows that are skipped in the same regions share chunks."""

from __future__ import annotations

import numpy as np
import pytest

from bapq_tools.row_skipping.grouping import chunk_rows_of, group_rows, most_skipped


def cost_of_skipping(cost, order, chunk_rows):
    """Of the cheapest chunks of every region, all regions together."""
    starts = np.arange(0, len(order), chunk_rows)
    chunks = np.add.reduceat(cost[:, order], starts, axis=1)
    return np.sort(chunks, axis=1)[:, : most_skipped(len(order), chunk_rows)].sum()


@pytest.mark.parametrize("rows", [64, 60])
def test_rows_that_two_kinds_of_regions_spare_are_parted(rows):
    """Every second row matters in one half of the regions, the others in the other half."""
    rng = np.random.default_rng(0)
    matters = np.arange(rows)[None] % 2 == np.arange(4)[:, None] % 2
    cost = np.where(matters, rng.uniform(1, 2, (4, rows)), 0.0)
    order = group_rows(cost, np.full(4, 0.25), 16)
    assert sorted(order) == list(range(rows))
    in_order, found = (cost_of_skipping(cost, o, 16) for o in (np.arange(rows), order))
    assert found == 0 if rows == 64 else 0 < found < 0.1 * in_order  # 30 do not fill two chunks
    for start in range(0, rows, 16):
        assert (np.diff(order[start : start + 16]) > 0).all()  # in order inside a chunk


def test_no_worse_than_rows_by_their_mean_cost():
    rng = np.random.default_rng(1)
    cost = rng.lognormal(0, 2, (5, 112))
    cost /= cost.sum(1, keepdims=True)
    by_mean = np.argsort(cost.sum(0))
    found = group_rows(cost, np.full(5, 0.2), 16)
    assert cost_of_skipping(cost, found, 16) < 0.9 * cost_of_skipping(cost, by_mean, 16)


def test_a_region_without_samples_has_no_say():
    matters = np.arange(64)[None] % 2 == np.arange(2)[:, None]
    cost = np.where(matters, 1.0, 0.0)
    order = group_rows(cost, np.array([1.0, 0.0]), 16)
    assert cost_of_skipping(cost[:1], order, 16) == 0


@pytest.mark.parametrize(
    ("stored", "chunk_rows", "expected", "most"),
    [
        (640, 640, 80, 4),  # eight chunks
        (64, 64, 16, 2),  # a chunk is one tile at least
        (1000, 64, 64, 8),  # never larger than they are
        (16, 16, 16, 0),  # one chunk: nothing would be left of the layer
        (40, 64, 16, 1),
    ],
)
def test_chunks_of_a_layer_that_is_pruned(stored, chunk_rows, expected, most):
    assert chunk_rows_of(stored, chunk_rows) == expected
    assert most_skipped(stored, expected) == most


def test_a_layer_of_one_chunk_stays_in_order():
    cost = np.random.default_rng(0).random((3, 10))
    np.testing.assert_array_equal(group_rows(cost, np.full(3, 1 / 3), 16), np.arange(10))
