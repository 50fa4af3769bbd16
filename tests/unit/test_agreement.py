"""How answers are compared: found from the outputs, or as told."""

from __future__ import annotations

import numpy as np
import pytest

from bapq_edge.errors import BoundaryError, RequestError
from bapq_tools.boundary.agreement import Judge, find_judge

RNG = np.random.default_rng(0)
LOGITS = [RNG.standard_normal((1, 5)).astype(np.float32) for _ in range(4)]
PROBABILITIES = [np.exp(x) / np.exp(x).sum() for x in LOGITS]
UNIT = [x / np.linalg.norm(x) for x in LOGITS]
TOKENS = [RNG.standard_normal((1, n, 6)).astype(np.float32) for n in (3, 5, 2, 3)]
NUMBERS = [x[:, :1] for x in LOGITS]
LABELS = [x.argmax(1) for x in LOGITS]


@pytest.mark.parametrize(
    ("found", "kind", "scores"),
    [
        (LOGITS, "argmax", "logits"),
        (PROBABILITIES, "argmax", "probabilities"),
        (UNIT, "cosine", "none"),
        (TOKENS, "cosine", "none"),
    ],
    ids=["logits", "probabilities", "embedding", "tokens"],
)
def test_the_kind_is_found_from_the_output(found, kind, scores):
    judge = find_judge({"label": LABELS, "y": found})
    assert (judge.output, judge.kind, judge.scores) == ("y", kind, scores)
    np.testing.assert_allclose(judge.agreement(found, found), 1)


def test_certain_probabilities_are_no_embedding_though_their_norm_is_1():
    one_hot = [np.eye(3, dtype=np.float32)[[i]] for i in (0, 2, 1)]
    assert find_judge({"y": one_hot}).scores == "probabilities"


def test_agreement_of_every_kind():
    wanted = [np.array([[1.0, 0, 0]]), np.array([[0, 2.0, 0]]), np.array([[0, 0, 1.0]])]
    found = [np.array([[3.0, 0, 0]]), np.array([[2.0, 2.5, 0]]), np.array([[0, 0, -1.0]])]
    assert Judge("y", "argmax").agreement(found, wanted).tolist() == [1, 1, 0]
    np.testing.assert_allclose(
        Judge("y", "cosine").agreement(found, wanted), [1, 2.5 / np.hypot(2, 2.5), 0]
    )
    assert Judge("y", "tolerance", 2.0).agreement(found, wanted).tolist() == [1, 1, 1]
    assert Judge("y", "tolerance", 1.9).agreement(found, wanted).tolist() == [0, 0, 0]


def test_what_is_no_number_agrees_with_nothing():
    wanted, bad = [np.ones((1, 3), np.float32)], [np.full((1, 3), np.nan, np.float32)]
    for judge in (Judge("y", "cosine"), Judge("y", "tolerance", 1e9)):
        assert judge.agreement(bad, wanted).tolist() == [0]
    assert Judge("y", "argmax").agreement(bad, [np.array([[1.0, 0, 0]])]).tolist() == [0]


@pytest.mark.parametrize(
    ("outputs", "agreement", "output", "error", "words"),
    [
        ({"a": LOGITS, "b": TOKENS}, None, None, RequestError, "2 outputs of floats.*--judge"),
        ({"a": LABELS}, None, None, RequestError, "0 outputs of floats"),
        ({"a": LOGITS}, None, "b", RequestError, "'b' is unknown: the model has 'a'"),
        ({"a": LABELS}, None, "a", RequestError, "holds int64"),
        ({"a": NUMBERS}, None, None, BoundaryError, "--agreement tolerance:X"),
        ({"a": TOKENS}, "argmax", None, RequestError, r"needs \(1, classes\)"),
        ({"a": LOGITS}, "tolerance", None, RequestError, "'tolerance' is unknown"),
        ({"a": LOGITS}, "tolerance:nan", None, RequestError, "'tolerance:nan' is unknown"),
        ({"a": LOGITS}, "cosine:1", None, RequestError, "'cosine:1' is unknown"),
        ({"a": [np.ones((2, 3))]}, None, None, BoundaryError, "first axis must have length 1"),
        ({"a": [*LOGITS, LOGITS[0] * np.nan]}, None, None, BoundaryError, "NaN.*sample 4"),
    ],
)
def test_what_cannot_be_judged_is_refused(outputs, agreement, output, error, words):
    with pytest.raises(error, match=words):
        find_judge(outputs, agreement, output)


def test_a_number_is_judged_by_a_tolerance_once_that_is_given():
    judge = find_judge({"y": NUMBERS}, "tolerance:0.5")
    assert (judge.kind, judge.tolerance, str(judge)) == (
        "tolerance",
        0.5,
        "tolerance of 0.5 of output 'y'",
    )
