"""Boundary models on the device: the same regions as scikit-learn's, and no array that lies."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from sklearn.cluster import KMeans
from sklearn.tree import DecisionTreeClassifier

from bapq_edge.adaptive.boundary_model import BoundaryModel
from bapq_edge.adaptive.drift import DriftDetector, ExpectedRegions
from bapq_edge.bank.boundary import Boundary, Precision, array_file
from bapq_edge.bank.consistency import check_boundary
from bapq_edge.bank.exchange import pack, unpack
from bapq_edge.bank.files import digest_of
from bapq_edge.bank.manifest import seal
from bapq_edge.bank.npy import to_npy
from bapq_edge.bank.reader import Bank
from bapq_edge.bank.verify import verify
from bapq_edge.errors import BankFormatError, BankIntegrityError, RunInputError
from support.boundaries import HIGH, LOW, model, with_boundary
from support.streaming import chain_bank


def described(**changes):
    fields = {
        "name": "m",
        "stage": "start",
        "tap": "x",
        "base": LOW,
        "pool": (8,),
        "scores": "none",
        "features": 8,
        "kind": "tree",
        "regions": 2,
        "nodes": 3,
        "precisions": (LOW, HIGH),
        "points": 1,
        "samples": 100,
        "confidence": 0.9,
    }
    return Boundary(**{**fields, **changes})


def opened(description, **arrays):
    values, features = description.values, description.features
    made = {
        "center": np.zeros(values, np.float32),
        "projection": np.eye(values, features, dtype=np.float32),
        "offset": np.zeros(features, np.float32),
        "mix": np.full(description.regions, 1 / description.regions, np.float32),
        "node_feature": np.array([-1]),
        "node_threshold": np.zeros(1),
        "node_children": np.zeros((1, 2), int),
        "node_region": np.zeros(1, int),
    }
    return BoundaryModel(description, {**made, **arrays})


@pytest.mark.parametrize("depth", [1, 4, None])
def test_a_tree_finds_the_leaves_that_scikit_learn_finds(depth):
    rng = np.random.default_rng(0)
    # Few distinct values: many features lie exactly on a threshold's side.
    x = rng.integers(-4, 5, (800, 8)).astype(np.float32) / 8
    y = (x[:, 0] * x[:, 1] > x[:, 2]).astype(int) + (x[:, 3] > 0.2)
    tree = DecisionTreeClassifier(max_depth=depth, random_state=0).fit(x, y).tree_
    leaf = np.flatnonzero(tree.children_left < 0)
    region = np.zeros(tree.node_count, int)
    region[leaf] = np.arange(len(leaf))
    ours = opened(
        described(regions=len(leaf), nodes=tree.node_count),
        node_feature=np.where(tree.children_left < 0, -1, tree.feature),
        node_threshold=tree.threshold,
        node_children=np.stack([tree.children_left, tree.children_right], 1),
        node_region=region,
    )
    x = np.concatenate([x, rng.standard_normal((2000, 8)).astype(np.float32)])
    np.testing.assert_array_equal(leaf[ours.regions(ours.features(x))], tree.apply(x))


def test_k_means_finds_the_clusters_that_scikit_learn_finds():
    rng = np.random.default_rng(1)
    x = rng.standard_normal((1500, 8)).astype(np.float32)
    fitted = KMeans(6, n_init=2, random_state=0).fit(x.astype(np.float64))
    ours = opened(
        described(kind="kmeans", nodes=0, regions=6),
        scale=np.ones(8, np.float32),
        centers=fitted.cluster_centers_,
    )
    found = ours.regions(ours.features(x))
    np.testing.assert_array_equal(found, fitted.predict(x.astype(np.float64)))


@pytest.mark.parametrize(
    ("shape", "pool"),
    [((5, 8), (8,)), ((5, 8), (3,)), ((2, 6, 9, 7), (6, 4, 4)), ((3, 11, 16), (1, 16))],
)
def test_pooling_averages_bins(shape, pool):
    x = np.random.default_rng(2).standard_normal(shape).astype(np.float32)
    ours = opened(described(pool=pool, features=4))
    expected = x.astype(np.float64)
    for axis, count in enumerate(pool, 1):
        edges = np.rint(np.linspace(0, x.shape[axis], count + 1)).astype(int)
        bins = [expected.take(range(a, b), axis).mean(axis) for a, b in zip(edges, edges[1:])]  # noqa: B905, RUF007
        expected = np.stack(bins, axis)
    np.testing.assert_allclose(ours.values(x), expected.reshape(len(x), -1), atol=1e-6)


@pytest.mark.parametrize("scores", ["logits", "probabilities"])
def test_margin_and_entropy(scores):
    z = np.random.default_rng(3).standard_normal((50, 8)) * 4
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    fed = p if scores == "probabilities" else z
    found = opened(described(scores=scores)).features(fed.astype(np.float32))
    top = np.sort(z, 1)
    np.testing.assert_allclose(found[:, 8], top[:, -1] - top[:, -2], atol=1e-4)
    np.testing.assert_allclose(found[:, 9], -(p * np.log(p)).sum(1), atol=1e-5)
    assert found.dtype == np.float32


def test_certain_answers_have_finite_features():
    scores = np.zeros((1, 8), np.float32)
    scores[0, 3] = 1
    assert np.isfinite(opened(described(scores="probabilities")).features(scores)).all()


def test_what_is_no_number_is_most_in_doubt():
    ours = opened(described(scores="logits", features=8), node_region=np.ones(1, int))
    assert ours.region_of(np.zeros((1, 8), np.float32)) == 1
    for value in (np.nan, np.inf, -np.inf):
        logits = np.array([[value, -3e38, 0, 0, 0, 0, 0, 0]], np.float32)
        assert ours.region_of(logits) == 0


def test_a_tap_of_another_shape_is_refused():
    ours = opened(described())
    for shape in ((3, 7), (3, 8, 1), (8,)):
        with pytest.raises(RunInputError, match=r"tensor x is .* needs \(n, ...\)"):
            ours.features(np.zeros(shape, np.float32))


def test_drift_is_told_once_and_taken_back():
    shares = np.array([0.1, 0.2, 0.7], np.float32)
    detector = DriftDetector(ExpectedRegions(shares, 1000))
    rng = np.random.default_rng(4)
    assert not any(detector.saw(int(r)) for r in rng.choice(3, 5000, p=[0.1, 0.2, 0.7]))
    told = [reason for _ in range(600) if (reason := detector.saw(0))]
    assert len(told) == 1 and "region 0 has" in told[0] and detector.drifted
    told = [
        reason for r in rng.choice(3, 3000, p=[0.1, 0.2, 0.7]) if (reason := detector.saw(int(r)))
    ]
    assert len(told) == 1 and "again" in told[0] and not detector.drifted


# ---- in the bank ----


@pytest.fixture(scope="module")
def bank(tmp_path_factory):
    return chain_bank(tmp_path_factory.mktemp("chain") / "m.bank")


def test_a_bank_with_boundary_models_verifies_unpacks_and_packs(bank, tmp_path):
    second = model(bank, name="second", kind="kmeans", nodes=0, scale=[1, 1], centers=np.eye(2))
    fitted = with_boundary(bank, tmp_path / "f.bank", model(bank), second)
    assert verify(fitted).ok
    unpack(fitted, tmp_path / "out")
    packed = pack(tmp_path / "out", tmp_path / "again.bank")
    for file in fitted.rglob("*.*"):
        if file.is_file():
            assert (packed / file.relative_to(fitted)).read_bytes() == file.read_bytes()


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"node_children": [[0, 2], [0, 0], [0, 0]]}, "node_children must be after their node"),
        ({"node_children": [[1, 3], [0, 0], [0, 0]]}, "node_children must be after their node"),
        ({"node_feature": [2, -1, -1]}, "node_feature has values from -1 to 2"),
        ({"node_region": [0, 2, 0]}, "node_region has values from 0 to 2"),
        ({"node_threshold": [np.nan, 0, 0]}, "node_threshold holds a value that is no finite"),
        ({"projection": [[np.inf, 0], [0, 1]]}, "projection holds a value that is no finite"),
        ({"mix": [0.5, 0.6]}, "mix adds up to 1.1"),
        ({"assignment": [[0, 2], [0, 0]]}, "assignment has values from 0 to 2"),
    ],
)
def test_arrays_that_make_no_model_are_refused(bank, tmp_path, arrays, message):
    with pytest.raises(BankFormatError, match=message):
        with_boundary(bank, tmp_path / "bad.bank", model(bank, **arrays))
    assert not (tmp_path / "bad.bank").exists()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"base": Precision(level=4)}, "wishes[0]"),
        ({"precisions": (LOW, LOW)}, "with one twice"),
        ({"precisions": (LOW, Precision(level=8, region=2))}, "of 2 regions"),
        ({"precisions": (LOW, Precision())}, "a level or bits"),
        ({"precisions": (LOW, Precision(level=8, bits=3.0))}, "a level or bits"),
        ({"stage": "gate"}, "without a split"),
        ({"nodes": 0}, "above 0 for a tree"),
        ({"pool": (1 << 16, 2)}, "at most 65536 values"),
    ],
)
def test_descriptions_that_contradict_themselves(bank, fields, message):
    manifest = Bank.open(bank).manifest
    found = []
    description = replace(described(stage="answer"), **fields)
    check_boundary(
        description,
        manifest,
        lambda good, key, value, expected: good or found.append(f"{key} {value} {expected}"),
    )
    assert any(message in each for each in found)


def test_damage_and_disagreement_in_the_bank_are_found(bank, tmp_path):
    fitted = with_boundary(bank, tmp_path / "f.bank", model(bank))
    file = fitted / array_file("model", "assignment")
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + b"\x01")
    with pytest.raises(BankIntegrityError, match=r"model.assignment.npy has BLAKE2b"):
        Bank.open(fitted)
    # A file that is whole but does not fit the rest: precisions that there are not.
    wrong = to_npy(np.full((2, 2), 7, np.uint8))
    file.write_bytes(wrong)
    manifest = fitted / "manifest.json"
    changed = manifest.read_text().replace(digest_of(whole), digest_of(wrong))
    manifest.write_bytes(seal(changed.encode()))
    with pytest.raises(BankFormatError, match="assignment has values from 7 to 7, allowed are 0"):
        Bank.open(fitted)
