"""Scores of answers, and the intervals of their means."""

from __future__ import annotations

import numpy as np
import pytest

from bapq_edge.answers import AnswerJudge, cosine, holds_scores, same_class
from bapq_edge.array_files import map_arrays
from bapq_edge.errors import EvaluationError, InputFileError, LabelError, MetricError
from bapq_tools.evaluation.intervals import score_of
from bapq_tools.evaluation.metrics import FLOAT, LABELS, find_metric, read_metric


def scores_of_classes(*classes, count=4):
    return np.eye(count, dtype=np.float32)[list(classes)] * 3


def score_map(classes):
    """(1, 3, height, width) scores of a map of classes."""
    return np.moveaxis(np.eye(3, dtype=np.float32)[np.asarray(classes)], -1, 0)[None]


# ---- arrays that stay in their file ----


def test_mapped_arrays_are_those_that_are_read(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {
        "a": rng.standard_normal((3, 5, 2)).astype(np.float32),
        "by column": np.asfortranarray(rng.integers(0, 9, (4, 6))),
        "empty": np.zeros((0, 3), np.float32),
        "one": np.float64(7),
        "words": np.array(["x", "yz"]),
    }
    np.savez(tmp_path / "plain.npz", **arrays)
    np.savez_compressed(tmp_path / "packed.npz", **arrays)
    for name in ("plain", "packed"):
        found = map_arrays(tmp_path / f"{name}.npz")
        assert list(found) == list(arrays)
        for key, array in arrays.items():
            np.testing.assert_array_equal(found[key], array)
            assert found[key].dtype == np.asarray(array).dtype
        assert isinstance(found["a"], np.memmap) == (name == "plain")
    np.save(tmp_path / "a.npy", arrays["a"])
    np.testing.assert_array_equal(map_arrays(tmp_path / "a.npy"), arrays["a"])


def test_damage_of_a_mapped_array_is_found(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, a=np.full(1000, 3.0))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"a\.npz is not an \.npz file of plain arrays"):
        map_arrays(path)
    path.write_bytes(data[:50])
    with pytest.raises(ValueError, match="write it with numpy"):
        map_arrays(path)
    np.savez(path, a=np.array([{}], object))
    with pytest.raises(ValueError, match="plain arrays"):
        map_arrays(path)


# ---- how near answers are ----


def test_probabilities_are_scores_and_embeddings_are_not():
    sure = np.eye(3, dtype=np.float32)
    assert holds_scores(sure) and holds_scores(sure * 5) and holds_scores(-sure * 2)
    assert not holds_scores(-sure) and not holds_scores(sure[0]) and not holds_scores(sure[:, :1])
    assert not holds_scores(np.arange(6).reshape(2, 3))


def test_answers_with_nan_agree_in_nothing():
    good, bad = scores_of_classes(0, 1), scores_of_classes(0, 1)
    bad[0, 0] = np.nan
    assert same_class(good, good) == 1 and same_class(bad, good) == 0.5
    assert cosine(bad, good) == 0 and cosine(good, good * 2) == 1 and cosine(good, -good) == -1
    assert cosine(good * 0, good * 0) == 1 and cosine(good * 0, good) == 0


def test_a_judge_goes_by_classes_where_there_are_scores():
    vector = np.array([[0.6, 0.8]], np.float32)
    judge = AnswerJudge.of({"v": vector, "s": scores_of_classes(2)})
    assert (judge.scores, judge.measure) == ("s", "agreement")
    assert judge.answer({"v": -vector, "s": scores_of_classes(2)}, {"s": scores_of_classes(2)}) == 1
    by_direction = AnswerJudge.of({"v": vector})
    assert by_direction.measure == "cosine"
    assert by_direction.answer({"v": -vector}, {"v": vector}) == pytest.approx(-1)


# ---- intervals ----


def test_shares_have_wilson_s_interval():
    """Values from the closed form in Wilson (1927), z = 1.959964."""
    found = score_of([1.0] * 9 + [0.0], share=True)
    assert (found.mean, found.interval) == (0.9, "wilson")
    assert (found.low, found.high) == pytest.approx((0.59585, 0.98212), abs=1e-5)
    perfect = score_of([1.0] * 100, share=True)
    assert perfect.high == 1 and perfect.low == pytest.approx(0.96300, abs=1e-5)


def test_means_have_a_bootstrap_that_is_the_same_every_time():
    values = np.random.default_rng(1).normal(0.9, 0.05, 400)
    found = score_of(list(values), share=False)
    assert found == score_of(list(values), share=False) and found.interval == "bootstrap"
    half = 1.96 * values.std() / np.sqrt(400)
    assert (found.low, found.high) == pytest.approx(
        (found.mean - half, found.mean + half), abs=half / 5
    )
    assert score_of([0.5, 1.0, 1.0], share=True).interval == "bootstrap"
    assert score_of([0.5], share=False).low is None


# ---- metrics ----


def test_top1_against_model_and_label():
    outputs = {"hidden": np.ones((1, 2, 3), np.float32), "y": scores_of_classes(2)}
    metric = find_metric(None, None, outputs)
    assert metric.name == "top1" and metric.share
    assert metric.scores(outputs, {"y": scores_of_classes(1)}, 2) == {FLOAT: 0, LABELS: 1}
    rows = {"y": scores_of_classes(2, 1)}
    assert metric.scores(rows, rows, np.array([2, 3])) == {FLOAT: 1, LABELS: 0.5}


def test_outputs_must_be_of_one_shape():
    outputs, other = {"y": scores_of_classes(2)}, {"y": scores_of_classes(2, count=5)}
    for name in ("top1", "cosine"):
        with pytest.raises(EvaluationError, match=r"\(1, 4\) in the bank and \(1, 5\)"):
            find_metric(name, None, outputs).scores(outputs, other, None)


@pytest.mark.parametrize(
    ("label", "words"), [(4, "classes 0 to 3"), (-1, "-1"), ([1, 2], "needs 1"), (1.0, "float64")]
)
def test_a_label_must_be_a_class(label, words):
    outputs = {"y": scores_of_classes(2)}
    with pytest.raises(LabelError, match=words):
        find_metric("top1", None, outputs).scores(outputs, None, np.array(label))


def test_cosine_takes_all_outputs_of_floats_but_labels_one():
    a, b = np.ones((1, 2, 2), np.float32), np.array([[0.6, 0.8]], np.float32)
    outputs = {"a": a, "b": b, "n": np.ones(3, np.int64)}
    metric = find_metric(None, None, outputs)
    assert metric.name == "cosine"
    assert metric.scores(outputs, {**outputs, "b": -b}, None)[FLOAT] == pytest.approx(0)
    with pytest.raises(LabelError, match="--judge"):
        metric.scores(outputs, None, b)
    of_one = find_metric("cosine", "b", outputs)
    assert of_one.scores(outputs, None, 2 * b)[LABELS] == pytest.approx(1)
    with pytest.raises(LabelError, match="as many numbers"):
        of_one.scores(outputs, None, 1)


def test_iou_is_the_mean_over_classes_in_either_map():
    found, wanted = score_map([[0, 0], [1, 1]]), score_map([[0, 1], [1, 1]])
    metric = find_metric("iou", None, {"y": found})
    expected = (1 / 2 + 2 / 3) / 2  # class 2 is in neither
    label = np.array([[0, 1], [1, 1]])
    assert metric.scores({"y": found}, {"y": wanted}, label) == pytest.approx(
        {FLOAT: expected, LABELS: expected}
    )
    whole = {"y": label[None]}
    assert find_metric("iou", None, whole).scores(whole, whole, label) == {FLOAT: 1, LABELS: 1}
    with pytest.raises(LabelError, match="classes 0 to 2"):
        metric.scores({"y": found}, None, label + 2)


def test_a_metric_must_fit_the_outputs():
    outputs = {"y": np.ones((1, 2), np.float32)}
    with pytest.raises(MetricError, match=r"iou needs .*y \[1, 2\]"):
        find_metric("iou", None, outputs)
    with pytest.raises(MetricError, match="output 'z' is unknown: the model has y"):
        find_metric(None, "z", outputs)
    with pytest.raises(MetricError, match="cosine needs an output of floats"):
        find_metric(None, None, {"y": np.ones(3, np.int64)})


def test_a_function_of_the_user_s(tmp_path):
    file = tmp_path / "own.py"
    file.write_text(
        "def off(outputs, wanted, label):\n"
        "    return abs(outputs['y'].sum() - (label if wanted is None else wanted['y'].sum()))\n"
        "def odd(outputs, wanted, label):\n"
        "    return float('nan') if label else None\n"
    )
    outputs = {"y": np.ones(3, np.float32)}
    metric = read_metric(f"{file}:off")
    assert metric.columns(True, True) == ["off"]
    assert metric.scores(outputs, None, 1) == {"off": 2}
    assert metric.scores(outputs, {"y": np.ones(5)}, None) == {"off": 2}
    odd = read_metric(f"{file}:odd")
    with pytest.raises(MetricError, match="odd gave nan"):
        odd.scores(outputs, None, 1)
    with pytest.raises(MetricError, match="odd failed: TypeError"):
        odd.scores(outputs, None, 0)
    for text, error, words in [
        ("accuracy", MetricError, "choose top1, cosine, iou"),
        (f"{file}:", MetricError, "unknown"),
        (f"{file}:none", MetricError, "write def none"),
        (f"{tmp_path}/absent.py:f", InputFileError, "cannot be read"),
    ]:
        with pytest.raises(error, match=words) as caught:
            read_metric(text)
        assert "\n" not in str(caught.value)
    file.write_text("def f(:\n")
    with pytest.raises(MetricError, match=r"own\.py cannot be loaded: SyntaxError"):
        read_metric(f"{file}:f")
