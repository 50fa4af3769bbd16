"""Regions: the arrays of a bank find what scikit-learn finds, and the riskiest comes first."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from sklearn.tree import DecisionTreeRegressor

from bapq_edge.adaptive.boundary_model import score_features
from bapq_edge.errors import NoTapError
from bapq_tools.boundary.features import class_probe, loss_probe, own_scores, pool_of
from bapq_tools.boundary.regions import (
    LEAST_SAMPLES,
    Task,
    _bands,
    _clusters,
    _tree,
    choose_regions,
    loss_left,
    nothing_found,
    precisions_of,
)


@pytest.fixture
def doubtful():
    """1000 inputs whose cheap answer is wrong the more often the smaller feature 0 is."""
    rng = np.random.default_rng(0)
    features = rng.standard_normal((1000, 3)).astype(np.float32)
    wrong = (rng.random(1000) < 1 / (1 + np.exp(4 * features[:, 0] + 4))).astype(float)
    losses = np.column_stack([wrong, wrong * (rng.random(1000) < 0.1)])
    return features, Task(losses, np.array([2.0, 10.0]), np.arange(1000), (2.0, 10.0), 0)


def test_a_tree_finds_the_leaves_of_scikit_learn(doubtful):
    features, task = doubtful
    found = _tree(features, task, 8, 20)
    own = DecisionTreeRegressor(max_leaf_nodes=8, min_samples_leaf=20, random_state=0)
    leaves = own.fit(features, task.losses).apply(features)
    pairs = set(zip(leaves.tolist(), found.of(features).tolist(), strict=True))
    assert len(pairs) == found.count == 8
    losses = [task.losses[found.of(features) == region, 0].mean() for region in range(8)]
    assert losses[0] > 0.5 and losses[0] == max(losses)


@pytest.mark.parametrize("sign", [1, -1])
def test_bands_begin_at_the_doubtful_end_and_are_narrow_there(doubtful, sign):
    features, _ = doubtful
    found = _bands(sign * features[:, 0], 0, sign, 6)
    regions = found.of(sign * features)
    sizes = np.bincount(regions)
    assert (np.diff(sizes) > 0).all() and sizes[0] >= LEAST_SAMPLES
    for region in range(found.count - 1):
        assert features[regions == region, 0].max() < features[regions == region + 1, 0].min()


def test_bands_never_part_equal_values():
    values = np.repeat(np.float32([0, 1, 2]), 40)
    found = _bands(values, 0, 1, 16)
    assert found.count <= 3
    assert all(len(set(found.of(values[values == v][:, None]))) == 1 for v in (0, 1, 2))
    assert _bands(np.zeros(100, np.float32), 0, 1, 8).count == 1


def test_clusters_are_nearest_centres_in_order_of_risk(doubtful):
    features, task = doubtful
    found = _clusters(features, task, 4)
    scaled = features * found.arrays["scale"].astype(np.float64)
    away = np.linalg.norm(scaled[:, None] - found.arrays["centers"], axis=2)
    np.testing.assert_array_equal(found.of(features), away.argmin(1))
    losses = [task.losses[found.of(features) == region, 0].mean() for region in range(4)]
    assert losses == sorted(losses, reverse=True)


def test_regions_that_tell_doubt_apart_are_chosen_over_none(doubtful):
    features, task = doubtful
    found, left = choose_regions(features, ((0, 1),), task)
    assert left < loss_left(nothing_found, features, task) - 0.3
    assert found.count >= 4
    noise = np.random.default_rng(1).standard_normal((1000, 3)).astype(np.float32)
    _, left = choose_regions(noise, ((0, 1),), task)
    assert left > loss_left(nothing_found, noise, task) - 0.1


def test_a_gate_gives_riskier_regions_no_less(doubtful):
    features, task = doubtful
    task = replace(task, losses=task.losses * [1, 0])
    found = _bands(features[:, 0], 0, 1, 12)
    for path in precisions_of(found.of(features), found.count, task):
        assert (np.diff(path.astype(int)) <= 0).all()
    escalated = precisions_of(found.of(features), found.count, replace(task, escalates=True))
    assert escalated.sum(1).tolist() == list(range(found.count + 1))


def test_pools_keep_channels_and_average_positions():
    assert pool_of([(1, 64)]) == (64,)
    assert pool_of([(1, 64, 28, 28)]) == (64, 7, 7)
    assert pool_of([(1, 9, 384), (1, 12, 384)]) == (1, 384)  # of changing length
    assert pool_of([(1, 196, 768)]) == (4, 768)
    assert pool_of([(1, 10000)]) == (2500,)


def classes(count=3, samples=240):
    """Three clusters in 20 values, and the class of each."""
    rng = np.random.default_rng(4)
    wanted = rng.integers(0, count, samples)
    values = rng.standard_normal((samples, 20)) + 2 * np.eye(20)[wanted] * (wanted[:, None] + 1)
    return values.astype(np.float32), wanted


@pytest.mark.parametrize("count", [2, 3])
def test_a_probe_scores_the_classes_of_the_reference(count):
    values, wanted = classes(count)
    seen = class_probe(values, wanted, np.arange(len(values)), 0)
    features = seen.projection.features(values)
    assert features.shape == (240, count + 2)
    assert (features[:, :count].argmax(1) == wanted).mean() > 0.8
    # Out of fold it is less sure of itself than of what it was fitted to.
    margin = seen.projection.doubt[0][0]
    assert seen.features.shape == features.shape
    assert seen.features[:, margin].mean() < features[:, margin].mean()


def test_the_loss_of_an_embedding_is_estimated_from_its_values():
    rng = np.random.default_rng(5)
    values = rng.standard_normal((300, 12)).astype(np.float32)
    losses = np.clip(0.1 + 0.05 * values[:, 3] + 0.01 * rng.standard_normal(300), 0, 1)
    seen = loss_probe(values, losses[:, None], np.arange(300), 0)
    estimate = seen.features[:, 0]
    assert np.corrcoef(estimate, losses)[0, 1] > 0.9
    assert seen.projection.doubt == ((0, -1),)
    np.testing.assert_allclose(
        seen.projection.features(values)[:, 1:], seen.features[:, 1:], atol=1e-5
    )


def test_of_very_many_classes_those_that_answers_are_near_to_are_kept():
    rng = np.random.default_rng(6)
    scores = rng.standard_normal((50, 1000)).astype(np.float32)
    scores[:, [7, 600]] += 10
    seen = own_scores(scores, "logits", np.full(50, 7))
    assert seen.features.shape == (50, 258)
    np.testing.assert_allclose(
        seen.features[:, 256],  # the margin
        score_features(scores, "logits")[:, 1000],
        rtol=1e-6,
    )


def test_constant_features_are_refused():
    same = np.ones((50, 6), np.float32)
    with pytest.raises(NoTapError, match="all 50 samples have the same features"):
        loss_probe(same, np.zeros((50, 1)), np.arange(50), 0)
    with pytest.raises(NoTapError, match="the same features"):
        class_probe(same, np.arange(50) % 3, np.arange(50), 0)
    with pytest.raises(NoTapError, match="the same features"):
        own_scores(same, "logits", np.zeros(50, int))
