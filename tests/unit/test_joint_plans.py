"""Plans for several precisions at once: each right, within the limit, sharing what it can."""

from __future__ import annotations

import numpy as np
import pytest

from bapq_edge.bank.boundary import Precision
from bapq_edge.bank.layout import LEVELS, PLANES, PLANES_OF_LEVEL
from bapq_edge.errors import BudgetTooSmallError
from bapq_edge.planning.joint import JointCosts, plan_jointly, smallest_joint_limit
from bapq_edge.planning.planner import ChunkCosts, Request, plan

PLANE_BITS = {"f32": 32, "r8": 4, "p4": 4, "m1": 1, "s1": 1}
ALL = Request()


def random_joint(seed, chunks=40, row_read=0.1):
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
    costs = ChunkCosts(
        LEVELS,
        weights,
        sizes,
        error.astype(np.float32),
        rng.random(chunks) < row_read,
        np.tile(np.array(LEVELS, np.uint8), (chunks, 1)),
        np.ones(chunks, int),
    )
    return JointCosts(costs, planes, rng.random((3, chunks)) < 0.3)


def check(joint, precisions, limit, made):
    """Everything that holds for every plan of a set."""
    assert list(made) == list(precisions)
    for precision, found in made.items():
        level = None if precision.bits is not None else precision.level
        skipped = found.levels == 0
        expected = (
            np.zeros_like(skipped) if precision.region is None else joint.skipped[precision.region]
        )
        np.testing.assert_array_equal(skipped, expected)
        assert found.region == precision.region
        if level is not None:
            assert (found.levels[~skipped] == level).all()
        else:
            alone = plan(joint.costs, Request(bits=precision.bits)).levels
            np.testing.assert_array_equal(found.levels[~skipped], alone[~skipped])
        kept = (found.kept[:, None] >> np.arange(len(PLANES)) & 1).astype(bool)
        assert found.resident_bytes == joint.plane_bytes[kept].sum() + found.ring_bytes
        if limit is not None:
            assert found.resident_bytes <= limit
        streamed = 0
        for chunk, held in enumerate(found.levels.tolist()):
            if held == 0 or joint.costs.row_read[chunk]:
                assert not found.pinned[chunk] and (held == 0 or not kept[chunk].any())
                continue
            planes = [list(PLANES).index(plane) for plane in PLANES_OF_LEVEL[held]]
            assert found.pinned[chunk] == kept[chunk, planes].all()
            missing = [plane for plane in planes if not kept[chunk, plane]]
            streamed += int(joint.plane_bytes[chunk, missing].sum())
            if missing:
                assert found.ring_bytes >= 2 * joint.plane_bytes[chunk, missing].sum()
        assert found.streamed_bytes == streamed
        assert (streamed > 0) == (found.ring_bytes > 0)


@pytest.mark.parametrize("seed", range(8))
def test_every_plan_of_a_mix_is_right_and_within_the_limit(seed):
    joint = random_joint(seed)
    rng = np.random.default_rng(seed)
    pool = [
        *(Precision(level=level) for level in LEVELS),
        Precision(bits=3.3),
        Precision(level=8, region=1),
    ]
    precisions = {pool[i]: float(rng.random()) for i in rng.permutation(7)[: rng.integers(1, 6)]}
    whole = int(joint.plane_bytes.sum())
    least = smallest_joint_limit(joint, precisions, ALL)
    for limit in (None, whole, whole // 2, whole // 5, least + 5000, least):
        if limit is not None and limit < least:
            continue
        request = Request(weight_bytes_limit=limit)
        made = plan_jointly(joint, precisions, request)
        check(joint, precisions, limit, made)
        for precision, again in plan_jointly(joint, precisions, request).items():
            np.testing.assert_array_equal(made[precision].kept, again.kept)
    with pytest.raises(BudgetTooSmallError, match="allow more"):
        plan_jointly(joint, precisions, Request(weight_bytes_limit=least - 1))


def test_what_most_runs_read_is_held_whole_and_the_rare_is_streamed():
    joint = random_joint(0, row_read=0)
    often, rare = Precision(level=2), Precision(level=8)
    planes = dict(zip(PLANES, joint.plane_bytes.sum(0).tolist(), strict=True))
    base = planes["s1"] + planes["m1"]
    made = plan_jointly(joint, {often: 1.0, rare: 0.1}, Request(weight_bytes_limit=base + 40_000))
    assert made[often].pinned.all() and made[often].ring_bytes == 0
    assert made[rare].streamed_bytes > 0.5 * (planes["p4"] + planes["r8"])


def test_escalation_from_4_to_8_streams_the_residual_alone():
    joint = random_joint(1, row_read=0)
    planes = dict(zip(PLANES, joint.plane_bytes.sum(0).tolist(), strict=True))
    limit = planes["p4"] + 6 * int(joint.plane_bytes[:, :3].sum(1).max())
    low, high = Precision(level=4), Precision(level=8)
    made = plan_jointly(joint, {low: 1.0, high: 0.2}, Request(weight_bytes_limit=limit))
    assert made[low].streamed_bytes == 0
    assert made[high].streamed_bytes <= planes["r8"]


def test_the_highest_level_allowed_holds_for_every_precision():
    joint = random_joint(2)
    made = plan_jointly(
        joint, {Precision(level=8): 1.0, Precision(bits=6.0): 0.5}, Request(highest_level=4)
    )
    assert max(found.levels.max() for found in made.values()) == 4
