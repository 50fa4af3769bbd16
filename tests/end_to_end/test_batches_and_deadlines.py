"""Answers made again: of a batch the samples in doubt alone, and none after the deadline."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest

from bapq_edge import Session
from bapq_edge.adaptive.policy_runner import PolicyRunner
from bapq_edge.bank.manifest import Batched
from bapq_edge.errors import LateAnswerWarning, RequestError
from bapq_edge.policy import Choice
from support.boundaries import (
    HIGH,
    LOW,
    MINUS,
    PLUS,
    Script,
    answers_of,
    escalating,
    model,
    with_boundary,
)
from support.streaming import chain_bank, run

APART = Batched(("x",), ("y",))


@pytest.fixture(scope="module")
def bank(tmp_path_factory):
    return chain_bank(tmp_path_factory.mktemp("chain") / "m.bank")


@pytest.fixture(scope="module")
def expected(bank):
    """By precision and sign of the input, the answer."""
    return answers_of(bank, (LOW, HIGH))


# ---- a deadline ----


def test_a_deadline_that_another_answer_cannot_keep_is_told_before_it_is_made(
    bank, expected, tmp_path
):
    fitted = escalating(bank, tmp_path / "deadline.bank", -1e9)
    with Session(fitted, policy="escalate", threads=1) as session:
        with pytest.warns(LateAnswerWarning, match="another would have come too late"):
            (y,) = session.run(None, {"x": PLUS}, deadline_ms=1e-6)
        np.testing.assert_array_equal(y, expected[LOW][1])
        assert session.stats().late == 1 and session.stats().escalated == 0
        (y,) = session.run(None, {"x": PLUS}, deadline_ms=600_000)
        np.testing.assert_array_equal(y, expected[HIGH][1])


@pytest.mark.parametrize("own", [False, True])
def test_at_the_deadline_the_answer_under_way_is_given_up(
    bank, expected, tmp_path, monkeypatch, own
):
    fitted = escalating(bank, tmp_path / "cut.bank", -1e9)
    options = onnxruntime.RunOptions() if own else None
    many = np.repeat(PLUS, 4000, axis=0)
    with Session(fitted, policy="escalate", threads=1) as session:
        session.run(None, {"x": many})  # both plans are there
        monkeypatch.setattr(PolicyRunner, "_lateness", lambda *_: None)  # as if it had hope
        with pytest.warns(LateAnswerWarning, match="the deadline passed while another was made"):
            (y,) = session.run(None, {"x": many}, options, deadline_ms=1e-6)
        np.testing.assert_array_equal(y, np.repeat(expected[LOW][1], 4000, axis=0))
        assert session.stats().late == 1
        # The run that was cut off has left nothing behind.
        (y,) = session.run(None, {"x": PLUS}, options, deadline_ms=600_000)
        np.testing.assert_array_equal(y, expected[HIGH][1])


@pytest.mark.parametrize("deadline_ms", [0, -1, float("nan"), "5", True])
def test_a_deadline_that_is_none_is_refused(bank, deadline_ms):
    refused = pytest.raises(RequestError, match=f"deadline_ms is {deadline_ms!r}: give a number")
    with Session(bank, policy=Script((LOW,))) as session, refused:
        session.run(None, {"x": PLUS}, deadline_ms=deadline_ms)


def test_a_deadline_needs_a_policy(bank):
    refused = pytest.raises(RequestError, match="has no policy, so no answer is made again")
    with Session(bank) as session, refused:
        session.run(None, {"x": PLUS}, deadline_ms=5)


# ---- batches ----


@pytest.fixture(scope="module")
def doubted(expected):
    """Signs of four samples, the threshold that doubts one of the signs, and which ones."""
    means = {sign: float(expected[LOW][sign][0, :32].mean()) for sign in (1, -1)}
    sign = max(means, key=means.get)
    return [-sign, sign, -sign, sign], sum(means.values()) / 2, [1, 3]


def test_of_a_batch_only_the_samples_in_doubt_are_answered_again(bank, expected, doubted, tmp_path):
    signs, threshold, again = doubted
    fitted = escalating(bank, tmp_path / "apart.bank", threshold, APART)
    batch = np.concatenate([sign * PLUS for sign in signs])
    with Session(fitted, policy="escalate", target_agreement=0.97, threads=1) as session:
        y = run(session, batch)
        for i, sign in enumerate(signs):
            np.testing.assert_array_equal(y[i], expected[HIGH if i in again else LOW][sign][0])
        stats = session.stats()
        assert (stats.runs, stats.escalated, stats.whole_batches) == (1, 1, 0)
        assert (stats.samples, stats.escalated_samples, stats.region) == (4, 2, 0)
        run(session, batch[::2])  # none in doubt
        assert session.stats().escalated == 1 and session.stats().region == 1
        run(session, batch[1::2])  # all in doubt
        assert session.stats().escalated_samples == 4 and session.stats().whole_batches == 0
        batch[0] = np.nan
        y = run(session, batch)
        assert np.isnan(y[0]).all() and session.stats().escalated_samples == 7
        np.testing.assert_array_equal(y[2], expected[LOW][signs[2]][0])
        assert run(session, batch[:0]).shape == (0, 64)


def test_a_batch_whose_samples_may_touch_each_other_is_answered_again_as_a_whole(
    bank, expected, doubted, tmp_path
):
    signs, threshold, _ = doubted
    fitted = escalating(bank, tmp_path / "whole.bank", threshold)
    batch = np.concatenate([sign * PLUS for sign in signs])
    with Session(fitted, policy="escalate", target_agreement=0.97, threads=1) as session:
        y = run(session, batch)
        for i, sign in enumerate(signs):
            np.testing.assert_array_equal(y[i], expected[HIGH][sign][0])
        stats = session.stats()
        assert (stats.samples, stats.escalated_samples, stats.whole_batches) == (4, 4, 1)


def test_samples_that_a_policy_names_are_checked(bank, expected, tmp_path):
    class Names:
        def __init__(self, samples):
            self.samples = samples

        def choose(self, context):
            if context.stage == "start":
                return Choice(LOW)
            return Choice(HIGH, samples=self.samples) if context.precision == LOW else None

    fitted = with_boundary(bank, tmp_path / "named.bank", model(bank), batched=APART)
    batch = np.concatenate([PLUS, MINUS])
    with Session(fitted, policy=Names([1]), threads=1) as session:
        y = run(session, batch)
        np.testing.assert_array_equal(y, np.concatenate([expected[LOW][1], expected[HIGH][-1]]))
    for samples, message in (
        ([2], "names sample 2 of a batch of 2: name samples from 0 to 1"),
        ([-1], "names sample -1 of a batch of 2"),
        ([0.5], "names sample 0.5 of a batch of 2"),
        ([0, 0], "names 2 samples of a batch of 2: name one or more, each once"),
        ([], "names 0 samples of a batch of 2"),
        ("0", "samples of a Choice is '0': give a list of numbers"),
        (1, "samples of a Choice is 1: give a list of numbers"),
    ):
        refused = pytest.raises(RequestError, match=message)
        with Session(fitted, policy=Names(samples), threads=1) as session, refused:
            run(session, batch)
