"""Bounds that hold as often as they say, and operating points that rest on them."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from bapq_tools.boundary.folds import folds_of, held_out
from bapq_tools.boundary.operating_points import (
    HeldOut,
    climb,
    escalate,
    operating_points,
    region_losses,
)


def held(losses, groups=None, binary=True, confidence=0.9):
    losses = np.asarray(losses, float).reshape(len(losses), -1)
    groups = np.arange(len(losses)) if groups is None else np.asarray(groups)
    return HeldOut(losses, groups, binary, confidence)


def test_the_bound_of_right_and_wrong_answers_is_clopper_pearsons():
    wrong = np.arange(200) < 3
    exact = stats.binomtest(3, 200).proportion_ci(0.8, "exact").high  # one side of 0.9
    assert held(wrong).upper(wrong.astype(float)) == pytest.approx(exact)
    assert held(wrong).upper(np.zeros(200)) == pytest.approx(1 - 0.1 ** (1 / 200))
    assert held(wrong).upper(np.ones(200)) == 1
    assert held(wrong).upper(np.zeros(200), np.zeros(200, bool)) == 1  # no sample says nothing


@pytest.mark.parametrize("alike", [False, True], ids=["apart", "in groups"])
@pytest.mark.parametrize("binary", [True, False], ids=["right or wrong", "cosine"])
def test_a_bound_holds_as_often_as_it_says(alike, binary):
    rng = np.random.default_rng(5)
    groups, rounds, failed = np.repeat(np.arange(100), 5), 400, 0
    for _ in range(rounds):
        risk = rng.beta(0.4, 3.6, 100)[groups] if alike else 0.1
        if binary:
            losses = (rng.random(500) < risk).astype(float)
        else:
            losses = np.clip(risk + rng.normal(0, 0.02, 500), 0, 1) if alike else None
            losses = rng.beta(1, 9, 500) if losses is None else losses
        failed += held(losses, groups if alike else None, binary).upper(losses) < 0.1
    # 0.1 is allowed; the approximations for groups may miss a little more.
    assert failed / rounds <= 0.14


def test_alike_samples_count_as_fewer():
    rng = np.random.default_rng(0)
    once = (rng.random(100) < 0.1).astype(float)
    groups = np.repeat(np.arange(100), 5)
    copies = held(np.repeat(once, 5), groups)
    assert copies.design_effect == pytest.approx(5, rel=0.02)
    assert copies.upper(np.repeat(once, 5)) == pytest.approx(held(once).upper(once), rel=0.02)
    # Also where nothing went wrong, as far as another precision tells.
    assert copies.upper(np.zeros(500)) > 4 * held(np.zeros(500)).upper(np.zeros(500))


def test_samples_of_a_group_stay_on_one_side():
    groups = np.random.default_rng(1).integers(0, 40, 500)
    last = held_out(groups, seed=3)
    assert not set(groups[last]) & set(groups[~last])
    assert 150 < last.sum() < 350
    folds = folds_of(groups, 4, seed=3)
    assert all(len(set(folds[groups == group])) == 1 for group in range(40))
    np.testing.assert_array_equal(np.unique(folds), range(4))


def test_escalation_takes_one_region_more_at_a_time():
    assert escalate(3).tolist() == [[0, 0, 0], [1, 0, 0], [1, 1, 0], [1, 1, 1]]


def test_a_gate_climbs_the_hull_by_the_best_step():
    bits = np.array([4.0, 1.0, 2.0, 8.0])  # in any order
    losses = np.array(
        [
            # 4, 1, 2, 8
            [0.10, 0.50, 0.30, 0.02],  # 0.2 per bit, 0.1, 0.02
            [0.05, 0.10, 0.10, 0.05],  # level 2 is off the hull
        ]
    )
    assert climb(bits, losses).tolist() == [[1, 1], [2, 1], [0, 1], [3, 1], [3, 0], [3, 3]] or (
        climb(bits, losses).tolist() == [[1, 1], [2, 1], [0, 1], [0, 0], [3, 0], [3, 3]]
    )


def test_every_step_of_a_climb_costs_more_and_ends_at_the_dearest():
    rng = np.random.default_rng(2)
    for _ in range(20):
        bits = np.sort(rng.random(5)) * 8
        path = climb(bits, rng.random((6, 5)))
        assert (path[0] == 0).all() and (path[-1] == 4).all()
        assert (np.diff(bits[path].sum(1)) > 0).all()
        assert (np.diff(path.astype(int), axis=0) != 0).sum(1).tolist() == [1] * (len(path) - 1)


def test_a_region_without_samples_loses_what_all_do():
    regions, losses = np.array([0, 0, 2]), np.array([[1.0], [0.0], [1.0]])
    np.testing.assert_allclose(region_losses(regions, losses, 3)[:, 0], [0.5, 2 / 3, 1])
    pulled = region_losses(regions, losses, 3, prior=1.0)[:, 0]
    np.testing.assert_allclose(pulled, [(1 + 2 / 3) / 3, 2 / 3, (1 + 2 / 3) / 2])


def test_points_state_bits_agreement_and_a_bound_that_dearer_ones_keep_too():
    regions = np.repeat([0, 1], [100, 900])
    # The low precision fails in half of region 0; the high one fails once, in region 1.
    low = np.where((regions == 0) & (np.arange(1000) % 2 == 0), 1.0, 0.0)
    high = (np.arange(1000) == 999).astype(float)
    kept = held(np.column_stack([low, high]))
    found = operating_points(escalate(2), np.array([2.0, 10.0]), regions, kept)
    # All at the high precision costs more and agrees less than region 0 alone.
    assert found.assignment.tolist() == [[0, 0], [1, 0]]
    np.testing.assert_allclose(found.outlook[:, 0], [2.0, 2.8])
    np.testing.assert_allclose(found.outlook[:, 1], [0.95, 1.0])
    assert found.outlook[1, 2] == pytest.approx(1 - kept.upper(high))  # not that of no error
    assert (np.diff(found.outlook[:, 2]) >= 0).all()
