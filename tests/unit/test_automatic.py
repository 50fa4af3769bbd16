"""Level "auto": the best answers whose reading hides behind computing, never worse than a level."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest

from bapq_edge.planning.planner import ChunkCosts, Request, plan, smallest_limit
from bapq_edge.planning.timing import Speeds

LEVELS = (8, 4, 2, 1)
CARD_BYTES_S = 40_000_000


def a_model(seed, layers=12, guessed=False, levels=LEVELS):
    """Layers of several chunks; what they weigh has little to do with what they compute."""
    rng = np.random.default_rng(seed)
    chunks_of_layer = rng.integers(2, 20, layers)
    chunks = int(chunks_of_layer.sum())
    weights = np.repeat(rng.integers(8, 20, layers) * 16_384, chunks_of_layer)
    sizes = np.stack([weights * level // 8 + weights // 32 // 64 * 64 for level in levels], axis=1)
    scale = np.repeat(10 ** rng.uniform(-5, -2, layers), chunks_of_layer)[:, None]
    error = scale * 3.0 ** -np.array(levels) * rng.uniform(0.5, 2, (chunks, len(levels)))
    return ChunkCosts(
        levels,
        weights,
        sizes,
        error.astype(np.float32),
        np.zeros(chunks, np.bool_),
        np.tile(np.array(levels, np.uint8), (chunks, 1)),
        chunks_of_layer,
        guessed,
    )


def speeds_for(costs, seed, computing_over_reading):
    """Computing takes so many times what reading all of level 8 from a card would."""
    layer_s = np.random.default_rng(seed).exponential(1, len(costs.chunks_of_layer))
    whole_s = costs.level_bytes[:, 0].sum() / CARD_BYTES_S
    return Speeds(CARD_BYTES_S, layer_s / layer_s.sum() * whole_s * computing_over_reading)


def total_bytes(costs, level):
    return int(costs.level_bytes[:, costs.levels.index(level)].sum())


def simulated_s(costs, found, speeds):
    """Time of a run in a row of runs, chunk by chunk: one reader, one ring, one computer."""
    columns = np.array([costs.levels.index(level) for level in found.levels])
    sizes = costs.level_bytes[np.arange(len(columns)), columns]
    compute_s = np.repeat(speeds.layer_s / costs.chunks_of_layer, costs.chunks_of_layer)
    read_end_s = compute_end_s = 0.0
    taken: list[tuple[float, int]] = []  # when each chunk left the ring, and its size
    ends = []
    for _ in range(4):
        for chunk, size in enumerate(sizes.tolist()):
            if not found.pinned[chunk]:
                held, free_s = size, 0.0
                for left_s, other in reversed(taken):
                    held += other
                    if held > found.ring_bytes:
                        free_s = left_s
                        break
                read_end_s = max(read_end_s, free_s) + size / speeds.storage_bytes_s
                compute_end_s = max(compute_end_s, read_end_s)
            compute_end_s += float(compute_s[chunk])
            if not found.pinned[chunk]:
                taken.append((compute_end_s, size))
        ends.append(compute_end_s)
    return ends[-1] - ends[-2]


def requests(costs, seed, **options):
    for share, computing in itertools.product((0.15, 0.3, 0.6), (0.2, 0.7, 3.0)):
        yield Request(
            weight_bytes_limit=int(share * total_bytes(costs, 8)),
            speeds=speeds_for(costs, seed, computing),
            max_slowdown=1.1,
            **options,
        )


def test_bits_that_stream_for_free_are_taken():
    costs = a_model(1)
    request = Request(
        weight_bytes_limit=total_bytes(costs, 8) // 2,
        max_slowdown=1.1,
        speeds=speeds_for(costs, 1, computing_over_reading=4),
    )
    found = plan(costs, request)
    assert (found.levels == 8).all() and found.held_back is None
    assert found.predicted_s <= 1.1 * request.speeds.compute_s
    # What is not known to hide is not streamed.
    unknown = plan(costs, dataclasses.replace(request, speeds=None))
    assert unknown.streamed_bytes == 0 and "not known" in unknown.held_back


@pytest.mark.parametrize("guessed", [False, True])
def test_the_slowdown_that_is_allowed_is_kept(guessed):
    for seed in range(12):
        costs = a_model(seed, guessed=guessed)
        for request in requests(costs, seed):
            found = plan(costs, request)
            assert found.resident_bytes <= request.weight_bytes_limit
            assert found.predicted_s <= 1.1 * request.speeds.compute_s * (1 + 1e-6)


def test_the_time_predicted_is_that_of_a_run():
    """Within a fifth of a simulation of every chunk, and in the middle within 3 %."""
    ratios = []
    for seed in range(6):
        costs = a_model(seed)
        for request in requests(costs, seed):
            for wanted in (request, dataclasses.replace(request, level=8)):
                found = plan(costs, wanted)
                ratios.append(simulated_s(costs, found, request.speeds) / found.predicted_s)
    assert np.median(ratios) == pytest.approx(1, abs=0.03)
    assert min(ratios) > 0.8 and max(ratios) < 1.25


def test_no_plan_is_worse_than_a_level_of_no_more_bytes_and_time():
    for seed, guessed in itertools.product(range(12), (False, True)):
        costs = a_model(seed, guessed=guessed)
        for request in requests(costs, seed):
            found = plan(costs, request)
            used = found.streamed_bytes + found.resident_bytes - found.ring_bytes
            for level in LEVELS:
                uniform = plan(costs, dataclasses.replace(request, level=level))
                if total_bytes(costs, level) <= used and uniform.predicted_s <= found.predicted_s:
                    assert found.predicted_error <= uniform.predicted_error


def test_where_the_table_is_a_guess_the_highest_level_in_time_is_chosen():
    chosen = set()
    for seed in range(12):
        costs = a_model(seed, guessed=True)
        for request in requests(costs, seed):
            found = plan(costs, request)
            in_time = [
                level
                for level in LEVELS
                if plan(costs, dataclasses.replace(request, level=level)).predicted_s
                <= 1.1 * request.speeds.compute_s
            ]
            assert found.uniform_level == in_time[0]
            chosen.add(found.uniform_level)
        # Bits that are asked for are used, but no chunk runs below the level that all can have.
        assert plan(costs, Request(bits=3)).levels.min() == 2
        assert plan(costs, Request(bits=5)).levels.min() == 4
    assert len(chosen) >= 3


def test_more_time_gives_better_answers_and_a_reason_why_not():
    costs = a_model(2)
    request = Request(
        weight_bytes_limit=total_bytes(costs, 2),
        max_slowdown=None,
        latency_s=0,
        speeds=speeds_for(costs, 2, computing_over_reading=0.2),
    )
    errors = []
    compute_s = request.speeds.compute_s
    for latency_s in (0, compute_s, 2 * compute_s, 4 * compute_s, 10 * compute_s):
        found = plan(costs, dataclasses.replace(request, latency_s=latency_s))
        assert found.predicted_s <= max(latency_s, compute_s) * (1 + 1e-6)
        errors.append(found.predicted_error)
        assert (found.held_back is None) == (found.uniform_level == 8)
        if found.held_back is not None:
            assert "storage of 40 MB/s" in found.held_back and found.held_back in found.reason
    assert errors == sorted(errors, reverse=True) and found.uniform_level == 8


def test_what_computes_long_is_streamed_and_what_does_not_is_pinned():
    """As in VGG: convolutions compute, the last layers weigh."""
    costs = a_model(3, layers=4)
    layer_s = np.array([0.6, 0.38, 0.01, 0.01]) * total_bytes(costs, 8) / CARD_BYTES_S
    request = Request(
        level=8,
        weight_bytes_limit=int(0.7 * total_bytes(costs, 8)),
        speeds=Speeds(CARD_BYTES_S, layer_s),
    )
    found = plan(costs, request)
    evenly = plan(costs, dataclasses.replace(request, speeds=None))
    before, after = (simulated_s(costs, each, request.speeds) for each in (evenly, found))
    assert after < 0.95 * before


def test_a_limit_that_even_the_lowest_level_must_stream_in():
    costs = a_model(4)
    request = Request(
        weight_bytes_limit=smallest_limit(costs, Request()),
        max_slowdown=1.1,
        speeds=speeds_for(costs, 4, computing_over_reading=0.001),
    )
    found = plan(costs, request)
    assert found.uniform_level == 1 and found.streamed_bytes > 0
    assert "level 1 takes longer" in found.held_back
