"""Plans for a mix of wishes: each right on its own, within the limit, and sharing what they can."""

from __future__ import annotations

import numpy as np
import pytest

from bapq_edge.bank.boundary import Wish
from bapq_edge.bank.layout import LEVELS, PLANES, PLANES_OF_LEVEL
from bapq_edge.errors import BudgetTooSmallError
from bapq_edge.mix import MixProblem, plan_mix, smallest_mix_limit
from bapq_edge.planner import Problem, Request, plan

PLANE_BITS = {"f32": 32, "r8": 4, "p4": 4, "m1": 1, "s1": 1}
ALL = Request()


def random_mix(seed, chunks=40, row_read=0.1):
    rng = np.random.default_rng(seed)
    weights = rng.integers(1, 12, chunks) * 1024
    planes = np.stack([weights * PLANE_BITS[plane] // 8 for plane in PLANES], 1)
    sizes = np.stack(
        [
            planes[:, [list(PLANES).index(p) for p in PLANES_OF_LEVEL[level]]].sum(1)
            for level in LEVELS
        ],
        1,
    )
    error = rng.random((chunks, 1)) * 4.0 ** -np.array(LEVELS)
    problem = Problem(
        LEVELS,
        weights,
        sizes,
        error.astype(np.float32),
        rng.random(chunks) < row_read,
        np.tile(np.array(LEVELS, np.uint8), (chunks, 1)),
    )
    return MixProblem(problem, planes, rng.random((3, chunks)) < 0.3)


def check(mix, wishes, limit, made):
    """Everything that holds for every plan of a mix."""
    assert list(made) == list(wishes)
    for wish, found in made.items():
        level = None if wish.bits is not None else wish.level
        skipped = found.levels == 0
        expected = np.zeros_like(skipped) if wish.region is None else mix.skipped[wish.region]
        np.testing.assert_array_equal(skipped, expected)
        assert found.region == wish.region
        if level is not None:
            assert (found.levels[~skipped] == level).all()
        else:
            alone = plan(mix.problem, Request(bits=wish.bits)).levels
            np.testing.assert_array_equal(found.levels[~skipped], alone[~skipped])
        kept = (found.kept[:, None] >> np.arange(len(PLANES)) & 1).astype(bool)
        assert found.resident_bytes == mix.plane_bytes[kept].sum() + found.ring_bytes
        if limit is not None:
            assert found.resident_bytes <= limit
        streamed = 0
        for chunk, held in enumerate(found.levels.tolist()):
            if held == 0 or mix.problem.row_read[chunk]:
                assert not found.pinned[chunk] and (held == 0 or not kept[chunk].any())
                continue
            planes = [list(PLANES).index(plane) for plane in PLANES_OF_LEVEL[held]]
            assert found.pinned[chunk] == kept[chunk, planes].all()
            missing = [plane for plane in planes if not kept[chunk, plane]]
            streamed += int(mix.plane_bytes[chunk, missing].sum())
            if missing:
                assert found.ring_bytes >= 2 * mix.plane_bytes[chunk, missing].sum()
        assert found.streamed_bytes == streamed
        assert (streamed > 0) == (found.ring_bytes > 0)


@pytest.mark.parametrize("seed", range(8))
def test_every_plan_of_a_mix_is_right_and_within_the_limit(seed):
    mix = random_mix(seed)
    rng = np.random.default_rng(seed)
    pool = [*(Wish(level=level) for level in LEVELS), Wish(bits=3.3), Wish(level=8, region=1)]
    wishes = {pool[i]: float(rng.random()) for i in rng.permutation(7)[: rng.integers(1, 6)]}
    whole = int(mix.plane_bytes.sum())
    least = smallest_mix_limit(mix, wishes, ALL)
    for limit in (None, whole, whole // 2, whole // 5, least + 5000, least):
        if limit is not None and limit < least:
            continue
        request = Request(weight_bytes_limit=limit)
        made = plan_mix(mix, wishes, request)
        check(mix, wishes, limit, made)
        for wish, again in plan_mix(mix, wishes, request).items():
            np.testing.assert_array_equal(made[wish].kept, again.kept)
    with pytest.raises(BudgetTooSmallError, match="allow more"):
        plan_mix(mix, wishes, Request(weight_bytes_limit=least - 1))


def test_what_most_runs_read_is_held_whole_and_the_rare_is_streamed():
    mix = random_mix(0, row_read=0)
    often, rare = Wish(level=2), Wish(level=8)
    planes = dict(zip(PLANES, mix.plane_bytes.sum(0).tolist(), strict=True))
    base = planes["s1"] + planes["m1"]
    made = plan_mix(mix, {often: 1.0, rare: 0.1}, Request(weight_bytes_limit=base + 40_000))
    assert made[often].pinned.all() and made[often].ring_bytes == 0
    assert made[rare].streamed_bytes > 0.5 * (planes["p4"] + planes["r8"])


def test_escalation_from_4_to_8_streams_the_residual_alone():
    mix = random_mix(1, row_read=0)
    planes = dict(zip(PLANES, mix.plane_bytes.sum(0).tolist(), strict=True))
    limit = planes["p4"] + 6 * int(mix.plane_bytes[:, :3].sum(1).max())
    low, high = Wish(level=4), Wish(level=8)
    made = plan_mix(mix, {low: 1.0, high: 0.2}, Request(weight_bytes_limit=limit))
    assert made[low].streamed_bytes == 0
    assert made[high].streamed_bytes <= planes["r8"]


def test_the_highest_level_allowed_holds_for_every_wish():
    mix = random_mix(2)
    made = plan_mix(mix, {Wish(level=8): 1.0, Wish(bits=6.0): 0.5}, Request(highest_level=4))
    assert max(found.levels.max() for found in made.values()) == 4
