"""The planner: near the best plan there is, within what it is allowed, the same every time."""

from __future__ import annotations

import dataclasses
import itertools
import re

import numpy as np
import pytest

from bapq_edge.bank.layout import LEVELS
from bapq_edge.bank.reader import Bank
from bapq_edge.errors import (
    BudgetTooSmallError,
    MissingPlaneWarning,
    RequestError,
    UnknownLevelError,
)
from bapq_edge.planning.planner import ChunkCosts, Request, chunk_costs, plan, smallest_limit
from bapq_edge.planning.timing import Speeds
from support.bank_samples import Shape, write_bank
from support.banks import graph_bytes, node, random_codes
from support.banks import write_bank as write_operator_bank


def random_problem(seed, chunks=60, levels=LEVELS, row_read=0.2, unusual=False):
    """Chunks of different size; unusual ones have errors that follow no rule."""
    rng = np.random.default_rng(seed)
    weights = rng.integers(1, 20, chunks) * 1024
    sizes = np.stack([-(-weights * (8 * level + 1) // 64 // 64) * 64 for level in levels], axis=1)
    if unusual:
        error = rng.random((chunks, len(levels))) * rng.integers(0, 2, (chunks, len(levels)))
    else:
        scale = 10 ** rng.uniform(-4, 0, (chunks, 1))
        error = scale * 3.0 ** -np.array(levels) * rng.uniform(0.5, 2, (chunks, len(levels)))
    error[:, np.array(levels) == 32] = 0
    return ChunkCosts(
        levels,
        weights,
        sizes,
        error.astype(np.float32),
        rng.random(chunks) < row_read,
        np.tile(np.array(levels, np.uint8), (chunks, 1)),
        np.ones(chunks, int),
    )


def card(costs, compute_s=0.0, bytes_s=40_000_000):
    """Speeds of an SD card and of a model whose layers take equally long."""
    layers = len(costs.chunks_of_layer)
    return Speeds(bytes_s, np.full(layers, compute_s / layers))


def columns_of(costs, found):
    return np.array([costs.levels.index(level) for level in found.levels])


def of_chunks(table, columns):
    return table[np.arange(len(columns)), columns]


def total_bytes(costs, column):
    return int(costs.level_bytes[~costs.row_read, column].sum())


def check(costs, request, found):
    """Everything that holds for every plan."""
    columns = columns_of(costs, found)
    sizes = of_chunks(costs.level_bytes, columns)
    streamed = ~found.pinned & ~costs.row_read
    pinned_bytes = int(sizes[found.pinned].sum())
    assert found.levels.dtype == np.uint8
    assert not (found.pinned & costs.row_read).any()
    assert found.resident_bytes == pinned_bytes + found.ring_bytes
    assert found.streamed_bytes == int(sizes[streamed].sum())
    error = of_chunks(costs.sensitivity, columns).sum(dtype=np.float64)
    assert found.predicted_error == pytest.approx(error)
    bits = (found.levels * costs.weights).sum() / costs.weights.sum()
    assert found.bits_per_weight == pytest.approx(bits)
    assert max(found.levels) <= max(request.highest_level, costs.levels[-1])
    assert "\n" not in found.reason
    if request.weight_bytes_limit is not None:
        assert found.resident_bytes <= request.weight_bytes_limit
    if streamed.any():
        assert found.ring_bytes % 64 == 0
        assert found.ring_bytes >= 2 * sizes[streamed].max()
        # Nothing is left over that a chunk could fill.
        assert found.resident_bytes > request.weight_bytes_limit - sizes.max() - 64
    else:
        assert found.ring_bytes == 0
    return found


def made(costs, request, resident=None):
    return check(costs, request, plan(costs, request, resident))


def least_error(cost, error, most):
    """Exact multiple-choice knapsack by dynamic programming over the costs."""
    best = np.full(most + 1, np.inf)
    best[0] = 0
    for costs, errors in zip(cost, error, strict=True):
        after = np.full(most + 1, np.inf)
        for c, e in zip(costs, errors, strict=True):
            if c <= most:
                after[c:] = np.minimum(after[c:], best[: most + 1 - c] + e)
        best = after
    return float(best.min())


@pytest.mark.parametrize("levels", [LEVELS, (8, 4, 2, 1), (8, 2), (4,)], ids=str)
def test_one_level_for_all(levels):
    costs = random_problem(1, levels=levels)
    for column, level in enumerate(levels):
        found = made(costs, Request(level=level))
        assert (found.levels == level).all()
        assert found.bits_per_weight == level
        np.testing.assert_array_equal(found.pinned, ~costs.row_read)
        assert found.resident_bytes == total_bytes(costs, column)
        assert found.streamed_bytes == 0


def test_the_envelope_caps_every_kind_of_request():
    costs = random_problem(2)
    for request in (Request(level=8), Request(bits=6), Request()):
        for highest in LEVELS:
            found = made(costs, dataclasses.replace(request, highest_level=highest))
            assert found.levels.max() <= highest
    assert plan(costs, Request(level=8, highest_level=4)).levels.max() == 4
    assert "capped at 4" in plan(costs, Request(level=8, highest_level=4)).reason
    assert "capped" not in plan(costs, Request(level=4, highest_level=8)).reason
    # Something must run, even if the envelope allows less than the bank has.
    high_only = random_problem(2, levels=(8, 4))
    assert (plan(high_only, Request(highest_level=2)).levels == 4).all()


def test_automatic_without_a_limit_takes_the_least_error():
    costs = random_problem(3, unusual=True)
    found = made(costs, Request())
    assert found.predicted_error == pytest.approx(costs.sensitivity.min(1).sum())


@pytest.mark.parametrize("bits", [1, 1.7, 2, 3.5, 4, 7.9, 8, 20, 32, 100])
def test_bits_are_an_upper_bound_and_are_used(bits):
    for seed in range(10):
        costs = random_problem(seed)
        found = made(costs, Request(bits=bits))
        assert found.bits_per_weight <= bits
        largest_step = 24 * costs.weights.max() / costs.weights.sum()
        assert found.bits_per_weight > min(bits, 32) - largest_step


def test_bits_near_the_optimum():
    """Within 1 % of the best plan's error, on average over the instances."""
    excess = []
    for seed, bits in itertools.product(range(20), (1.5, 2.5, 3.5, 5)):
        costs = random_problem(seed, levels=(8, 4, 2, 1))
        cost = costs.weights[:, None] // 1024 * np.array(costs.levels)
        most = int(bits * cost[:, -1].sum())
        best = least_error(cost, costs.sensitivity.astype(np.float64), most)
        excess.append(made(costs, Request(bits=bits)).predicted_error / best - 1)
    assert min(excess) > -1e-9
    assert np.mean(excess) < 0.01


def test_bytes_near_the_optimum():
    excess = []
    for seed, share in itertools.product(range(20), (0.2, 0.4, 0.7)):
        costs = random_problem(seed, levels=(8, 4, 2, 1), row_read=0)
        low, high = total_bytes(costs, 3), total_bytes(costs, 0)
        limit = int(low + share * (high - low))
        error = costs.sensitivity.astype(np.float64)
        best = least_error(costs.level_bytes // 64, error, limit // 64)
        found = made(costs, Request(weight_bytes_limit=limit))
        assert found.streamed_bytes == 0
        excess.append(found.predicted_error / best - 1)
    assert min(excess) > -1e-9
    assert np.mean(excess) < 0.01


@pytest.mark.parametrize(
    ("limit_kib", "levels", "error"),
    [
        (16, (2, 2, 2), 0.390),
        (20, (4, 2, 2), 0.150),
        (24, (4, 2, 4), 0.122),
        (28, (4, 4, 2), 0.052),
        (32, (4, 4, 4), 0.024),
        (40, (8, 4, 4), 0.014),
    ],
)
def test_the_example_of_the_documentation(limit_kib, levels, error):
    costs = ChunkCosts(
        levels=(8, 4, 2),
        weights=np.array([16, 32, 16]) << 10,
        level_bytes=np.array([[16, 8, 4], [32, 16, 8], [16, 8, 4]]) << 10,
        sensitivity=np.array(
            [[0, 0.010, 0.250], [0.001, 0.012, 0.110], [0, 0.002, 0.030]], np.float32
        ),
        row_read=np.zeros(3, bool),
        runs_at=np.tile(np.array([8, 4, 2], np.uint8), (3, 1)),
        chunks_of_layer=np.ones(3, int),
    )
    found = made(costs, Request(weight_bytes_limit=limit_kib << 10))
    assert tuple(found.levels) == levels
    assert found.predicted_error == pytest.approx(error)


@pytest.mark.parametrize("unusual", [False, True])
@pytest.mark.parametrize("latency_s", [0, 0.001, 0.05])
def test_more_memory_never_means_more_error(unusual, latency_s):
    for seed in range(8):
        costs = random_problem(seed, chunks=30, unusual=unusual)
        least, most = smallest_limit(costs, Request()), total_bytes(costs, 0)
        rng = np.random.default_rng(seed)
        limits = least + np.sort((most * rng.random(60) ** 3).astype(int))
        last = np.inf
        for limit in [least, *limits.tolist(), least + most]:
            request = Request(
                weight_bytes_limit=limit, latency_s=latency_s, max_slowdown=None, speeds=card(costs)
            )
            found = made(costs, request)
            assert found.predicted_error <= last * (1 + 1e-12)
            last = found.predicted_error


def test_automatic_streams_only_what_it_must_or_may():
    costs = random_problem(4, row_read=0)
    low, high = total_bytes(costs, 4), total_bytes(costs, 0)
    fits = made(costs, Request(weight_bytes_limit=low))
    assert (fits.levels == 1).all() and fits.streamed_bytes == 0
    tight = made(costs, Request(weight_bytes_limit=low - 1))
    assert (tight.levels == 1).all() and tight.streamed_bytes > 0

    limit = (low + high) // 3
    kept = made(costs, Request(weight_bytes_limit=limit))
    errors = [kept.predicted_error]
    for latency_s in (0.001, 0.01, 0.02, 10):
        request = Request(
            weight_bytes_limit=limit, latency_s=latency_s, max_slowdown=None, speeds=card(costs)
        )
        found = made(costs, request)
        assert found.streamed_bytes <= latency_s * 40_000_000
        errors.append(found.predicted_error)
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] <= plan(costs, Request(level=8)).predicted_error
    # How fast the storage is must be known before anything is expected of it.
    unknown = made(costs, Request(weight_bytes_limit=limit, latency_s=10))
    np.testing.assert_array_equal(unknown.levels, kept.levels)


def test_chunks_read_by_row_cost_no_memory():
    costs = random_problem(5, row_read=0.5)
    found = made(costs, Request(weight_bytes_limit=smallest_limit(costs, Request())))
    assert (found.levels[costs.row_read] == 32).all()
    only = dataclasses.replace(costs, row_read=np.ones(60, bool))
    assert smallest_limit(only, Request()) == 0
    for request in (Request(weight_bytes_limit=0), Request(level=8, weight_bytes_limit=0)):
        found = made(only, request)
        assert found.resident_bytes == found.streamed_bytes == 0


def test_pinned_chunks_are_spread_evenly():
    costs = random_problem(6, chunks=400, row_read=0.1)
    total = total_bytes(costs, 2)
    largest = costs.level_bytes[:, 2].max()
    for share in (0.2, 0.5, 0.9):
        found = made(costs, Request(level=4, weight_bytes_limit=int(share * total)))
        sizes = np.where(costs.row_read, 0, costs.level_bytes[:, 2])
        pinned = np.cumsum(sizes * found.pinned)
        even = np.cumsum(sizes) * (pinned[-1] / total)
        assert np.abs(pinned - even).max() <= 2 * largest


def test_chunks_in_loops_are_pinned_first():
    costs = random_problem(5)
    looped = np.zeros(60, bool)
    looped[20:30] = True
    streamable = looped & ~costs.row_read
    costs = dataclasses.replace(costs, looped=looped)
    column = costs.levels.index(8)
    need, total = int(costs.level_bytes[streamable, column].sum()), total_bytes(costs, column)
    for limit in (total // 4, total // 2, total * 3 // 4):
        found = plan(costs, request := Request(level=8, weight_bytes_limit=limit))
        check(costs, request, found)
        if need <= limit - found.ring_bytes:
            assert found.pinned[streamable].all()
        else:
            sizes = costs.level_bytes[:, column]
            left = limit - found.ring_bytes - sizes[found.pinned & streamable].sum()
            assert left < sizes[streamable].max()
        again = plan(costs, request, found.pinned)
        assert (again.pinned == found.pinned).all()


def test_a_plan_made_again_is_the_same_and_a_near_one_reads_little():
    """Little: what the limit grew by, or a chunk or two."""
    costs = random_problem(7, chunks=400)
    total = total_bytes(costs, 2)
    request = Request(level=4, weight_bytes_limit=total // 2)
    first = made(costs, request)
    np.testing.assert_array_equal(plan(costs, request).pinned, first.pinned)
    again = made(costs, request, first.pinned)
    np.testing.assert_array_equal(again.pinned, first.pinned)
    for part, most_new in ((0.49, 0), (0.51, 0.011), (0.4, 0.01), (0.6, 0.11)):
        near = dataclasses.replace(request, weight_bytes_limit=int(part * total))
        found = made(costs, near, first.pinned)
        new = costs.level_bytes[found.pinned & ~first.pinned, 2].sum()
        assert new <= most_new * total
        np.testing.assert_array_equal(plan(costs, near, found.pinned).pinned, found.pinned)


@pytest.mark.parametrize(
    "request_", [Request(level=8), Request(level=1), Request(), Request(bits=3)]
)
def test_the_smallest_limit_is_named_and_works(request_):
    costs = random_problem(8)
    with pytest.raises(BudgetTooSmallError) as caught:
        plan(costs, dataclasses.replace(request_, weight_bytes_limit=1))
    smallest = int(re.search(r"needs (\d+)", str(caught.value))[1])
    assert smallest_limit(costs, request_) == smallest
    made(costs, dataclasses.replace(request_, weight_bytes_limit=smallest))
    with pytest.raises(BudgetTooSmallError):
        plan(costs, dataclasses.replace(request_, weight_bytes_limit=smallest - 1))


def test_a_model_of_one_chunk_needs_no_ring():
    costs = random_problem(9, chunks=1, row_read=0)
    assert smallest_limit(costs, Request(level=8)) == costs.level_bytes[0, 1]
    assert made(
        costs, Request(level=8, weight_bytes_limit=smallest_limit(costs, Request(level=8)))
    ).pinned


def test_requests_that_cannot_be_met():
    costs = random_problem(10, levels=(8, 4))
    with pytest.raises(UnknownLevelError, match="level 2 is not in the bank, which holds 8, 4"):
        plan(costs, Request(level=2))
    with pytest.raises(UnknownLevelError):
        smallest_limit(costs, Request(level=32))
    for bits in (3.9, 0, -1, float("nan")):
        with pytest.raises(RequestError, match="lowest level takes 4: ask for 4 or more"):
            plan(costs, Request(bits=bits))
    with pytest.raises(RequestError, match=r"level 8 and 3\.5 bits are both asked for"):
        Request(level=8, bits=3.5)


def test_the_problem_of_a_bank(tmp_path):
    shapes = (Shape(100, 96, chunk_rows=48, residual_steps=13), Shape(33, 321, chunk_rows=32))
    write_bank(tmp_path / "m.bank", shapes)
    bank = Bank.open(tmp_path / "m.bank")
    costs = chunk_costs(bank)
    assert costs.levels == LEVELS
    assert costs.weights.tolist() == [48 * 96, 48 * 96, 4 * 96, 32 * 321, 321]
    for column, level in enumerate(LEVELS):
        assert costs.level_bytes[:, column].sum() == bank.weight_bytes(level)
    np.testing.assert_array_equal(costs.sensitivity, bank.sensitivity())
    assert not costs.row_read.any()
    (tmp_path / "m.bank/planes/r8.bin").unlink()
    with pytest.warns(MissingPlaneWarning):
        fewer = chunk_costs(Bank.open(tmp_path / "m.bank"))
    assert fewer.levels == (32, 4, 2, 1)
    np.testing.assert_array_equal(fewer.sensitivity, bank.sensitivity()[:, [0, 2, 3, 4]])
    np.testing.assert_array_equal(fewer.level_bytes, costs.level_bytes[:, [0, 2, 3, 4]])


def test_only_what_a_gather_alone_reads_is_read_by_row(tmp_path):
    description = {
        "rows": 40,
        "columns": 32,
        "chunk_rows": 16,
        "residual_steps": 8,
        "scale_columns": {4: 32, 2: 32, 1: 32},
        "has_bias": False,
    }
    codes = random_codes(np.random.default_rng(0), 40, 32, description["scale_columns"], False)
    layers = [(f"l{i}", kind, codes, description) for i, kind in enumerate(("Gather", "MatMul"))]
    graph = graph_bytes([node("Gather", "x", "y")], ["n"], ["n", 32])
    costs = chunk_costs(Bank.open(write_operator_bank(tmp_path / "m.bank", graph, layers)))
    assert costs.row_read.tolist() == 3 * [True] + 3 * [False]
