"""Runs steered by policies: every answer is that of the precision it was made at, whatever is in
memory, and the session says what it did."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from bapq_edge import Session
from bapq_edge.bank.boundary import Precision
from bapq_edge.bank.reader import Bank
from bapq_edge.engine.graph import RUN_INPUT
from bapq_edge.errors import (
    BapqError,
    BudgetTooSmallError,
    LateAnswerWarning,
    RequestError,
    UnknownLevelError,
)
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
from support.internals import bank_of, plans_of, smallest_limit_of
from support.streaming import chain_bank, run

PRECISIONS = (LOW, HIGH, Precision(level=4), Precision(level=32), Precision(bits=3.5))


@pytest.fixture(scope="module")
def bank(tmp_path_factory):
    return chain_bank(tmp_path_factory.mktemp("chain") / "m.bank")


@pytest.fixture(scope="module")
def expected(bank):
    """By precision and input, what a session that knows nothing else answers."""
    return answers_of(bank, PRECISIONS)


def halves(bank):
    """The chain's graph cut behind its first product."""
    whole = onnx.load_from_string(Bank.open(bank).graph_bytes())
    nodes = list(whole.graph.node)
    ticket = helper.make_tensor_value_info(RUN_INPUT, TensorProto.INT64, [])
    x, h1, y = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", width])
        for name, width in (("x", 96), ("h1", 400), ("y", 64))
    )

    def half(part, inputs, output):
        graph = helper.make_graph(part, "half", [*inputs, ticket], [output])
        opsets = whole.opset_import
        return helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString()

    return half(nodes[:1], [x], h1), half(nodes[1:], [h1], y), 1


@pytest.mark.parametrize("share", [None, 1.0, 0.5, 0.1, 0.0])
def test_every_answer_is_that_of_its_precision_whatever_is_in_memory(bank, expected, share):
    rng = np.random.default_rng(3)
    runs = [
        tuple(PRECISIONS[i] for i in rng.permutation(5)[: rng.integers(1, 4)]) for _ in range(60)
    ]
    shares = {LOW: 1.0, HIGH: 0.2, PRECISIONS[2]: 0.1}  # the others are met unannounced
    with Session(bank, policy=Script(shares=shares), threads=2) as session:
        opened = bank_of(session)
        whole = sum(int(opened.chunks(plane)["bytes"].sum()) for plane in opened.planes)
        least = smallest_limit_of(session)
    # Level 32 is not in the shares and needs the largest ring.
    least32 = 2 * 16 * 400 * 4 + (1 << 13)
    budget = None if share is None else max(int(share * whole), least, least32)
    with Session(
        bank, policy=Script(*runs, shares=shares), threads=2, weight_budget=budget
    ) as session:
        for i, precisions in enumerate(runs):
            sign = (1, -1)[i % 2]
            np.testing.assert_array_equal(run(session, sign * PLUS), expected[precisions[-1]][sign])
            if budget is not None:
                assert session.stats().resident_bytes <= budget
        stats = session.stats()
        assert stats.runs == len(runs)
        assert stats.escalated == sum(len(precisions) > 1 for precisions in runs)


def test_bits_of_all_passes_count(bank):
    with Session(bank, policy=Script((LOW,), (LOW, HIGH)), threads=1) as session:
        run(session, PLUS)
        assert session.stats().bits_per_weight == 2 and session.stats().escalated == 0
        run(session, PLUS)
        stats = session.stats()
        assert stats.bits_per_weight == 10 and stats.mean_bits_per_weight == 6
        assert (stats.runs, stats.escalated) == (2, 1)


def test_escalation_from_4_to_8_reads_the_residual_only(bank):
    four, residual = Precision(level=4), Bank.open(bank).chunks("r8")["bytes"].sum()
    policy = Script((four,), (four, HIGH), (four,), shares={four: 1.0, HIGH: 0.1})
    base = Bank.open(bank).chunks("p4")["bytes"].sum()
    with Session(bank, policy=policy, threads=1, weight_budget=int(base) + (64 << 10)) as session:
        run(session, PLUS)
        before = session.stats().streamed_bytes
        assert before >= base
        run(session, PLUS)
        read = session.stats().streamed_bytes - before
        assert residual <= read < residual + base
        before = session.stats().streamed_bytes
        assert session.stats().resident_bytes <= base + (64 << 10)
        run(session, PLUS)  # what the ring displaced is read again, no more
        assert session.stats().streamed_bytes - before < base


def test_two_threads_do_not_get_each_others_plan(bank, expected):
    class BySign:
        def __init__(self):
            self.shares = {LOW: 0.5, HIGH: 0.5}

        def choose(self, context):
            if context.stage == "start":
                return Choice(HIGH if context.values["x"][0, 0] > 0 else LOW)
            return None

    budget = 96 << 10
    with Session(bank, policy=BySign(), threads=1, weight_budget=budget) as session:
        wrong = []

        def work(sign):
            for _ in range(200):
                if not np.array_equal(
                    run(session, sign * PLUS), expected[(HIGH, LOW)[sign < 0]][sign]
                ):
                    wrong.append(sign)

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(work, (1, -1, 1, -1)))
        assert not wrong
        assert threading.active_count() < 20


def test_the_gate_of_a_bank_finds_region_and_precision(bank, expected, tmp_path):
    fitted = with_boundary(bank, tmp_path / "g.bank", model(bank))
    with Session(fitted, policy="gate", target_agreement=0.97, threads=1) as session:
        np.testing.assert_array_equal(run(session, PLUS), expected[HIGH][1])
        stats = session.stats()
        assert (stats.region, stats.bits_per_weight, stats.escalated) == (0, 8, 0)
        np.testing.assert_array_equal(run(session, MINUS), expected[LOW][-1])
        assert (session.stats().region, session.stats().bits_per_weight) == (1, 2)
        # Of a batch the sample most in doubt decides.
        both = np.concatenate([MINUS, PLUS])
        np.testing.assert_array_equal(run(session, both)[1:], expected[HIGH][1])
    with Session(fitted, policy="gate", bits=3, threads=1) as session:
        np.testing.assert_array_equal(run(session, PLUS), expected[LOW][1])


def test_the_gate_behind_the_first_half_of_the_graph(bank, expected, tmp_path):
    gate = model(bank, stage="gate", tap="h1", base=HIGH, pool=(2,), node_threshold=np.full(3, -1))
    fitted = with_boundary(bank, tmp_path / "s.bank", gate, split=halves(bank))
    with Session(fitted, policy="gate", target_agreement=0.97, threads=1) as session:
        assert [value.name for value in session.get_inputs()] == ["x"]
        assert [value.name for value in session.get_outputs()] == ["y"]
        # Means after a Relu are above -1: always region 0, all at level 8.
        np.testing.assert_array_equal(run(session, PLUS), expected[HIGH][1])
        assert session.stats().bits_per_weight == 8
    gate = model(bank, stage="gate", tap="h1", base=HIGH, node_threshold=np.full(3, 1e9))
    fitted = with_boundary(bank, tmp_path / "l.bank", gate, split=halves(bank))
    with Session(fitted, policy="gate", target_agreement=0.97, threads=1) as session:
        y = run(session, PLUS)
        weights = np.array([layer.weights for layer in bank_of(session).manifest.layers])
        bits = (8 * weights[0] + 2 * weights[1:].sum()) / weights.sum()
        assert session.stats().bits_per_weight == pytest.approx(bits)
        assert not np.array_equal(y, expected[LOW][1])


def test_escalation_answers_again_where_in_doubt(bank, expected, tmp_path):
    means = {sign: float(expected[LOW][sign][0, :32].mean()) for sign in (1, -1)}
    doubted = max(means, key=means.get)
    fitted = escalating(bank, tmp_path / "e.bank", sum(means.values()) / 2)
    with Session(fitted, target_agreement=0.97, threads=1) as session:
        for sign in (1, -1):
            precision = HIGH if sign == doubted else LOW
            np.testing.assert_array_equal(run(session, sign * PLUS), expected[precision][sign])
        stats = session.stats()
        assert (stats.runs, stats.escalated, stats.mean_bits_per_weight) == (2, 1, 6)
        # An empty list asks for all outputs, as in ONNX Runtime.
        (y,) = session.run([], {"x": PLUS})
        np.testing.assert_array_equal(y, expected[HIGH if doubted == 1 else LOW][1])


def test_an_answer_too_late_stands_and_is_flagged(bank, expected, tmp_path):
    fitted = escalating(bank, tmp_path / "late.bank", -1e9)
    with Session(fitted, policy="escalate", latency_ms=0, threads=1) as session:
        with pytest.warns(LateAnswerWarning, match="another would have come too late"):
            np.testing.assert_array_equal(run(session, PLUS), expected[LOW][1])
        stats = session.stats()
        assert (stats.escalated, stats.late, stats.region) == (0, 1, 0)
        assert session.events()[-1].kind == "latency"


def test_other_inputs_than_calibration_saw_are_an_event(bank, tmp_path):
    fitted = with_boundary(bank, tmp_path / "d.bank", model(bank, samples=2000))
    with Session(fitted, policy="gate", threads=1) as session:
        signs = np.random.default_rng(0).random(700) < 0.25  # as the model's region shares say
        for plus in signs:
            run(session, PLUS if plus else MINUS)
        assert "drift" not in [event.kind for event in session.events()]
        for _ in range(300):
            run(session, PLUS)
        (event,) = [event for event in session.events() if event.kind == "drift"]
        assert "region 0" in event.reason


def test_rows_of_a_region_are_skipped(bank, expected, tmp_path):
    skipping = Precision(level=8, region=1)
    manifest = Bank.open(bank).manifest
    rows = sum(layer.stored_rows for layer in manifest.layers)
    skipped = np.zeros((2, manifest.chunk_count))
    skipped[1, :5] = 1
    values = np.zeros((2, rows))
    values[1] = np.random.default_rng(5).random(rows)
    gate = model(
        bank,
        precisions=(HIGH, skipping),
        assignment=np.array([[0, 0], [0, 1]]),
        outlook=np.array([[8.0, 1.0, 0.98], [7.0, 1.0, 0.99]]),
        skipped=skipped,
        row_values=values,
    )
    fitted = with_boundary(bank, tmp_path / "r.bank", gate)
    with Session(fitted, policy="gate", target_agreement=0.99, threads=1) as session:
        np.testing.assert_array_equal(run(session, PLUS), expected[HIGH][1])
        full = session.stats().bits_per_weight
        y = run(session, MINUS)
        assert session.stats().bits_per_weight < full
        h1 = plans_of(session).by_precision[skipping]
        assert (h1.levels[:5] == 0).all() and (h1.levels[5:] == 8).all()
        assert not np.array_equal(y, expected[HIGH][-1])
    unknown = Script((Precision(level=8, region=2),), shares={skipping: 1.0})
    refused = pytest.raises(RequestError, match=r"region 2 is asked for, .* have regions 0 to 1")
    with Session(fitted, policy=unknown, threads=1) as session, refused:
        run(session, PLUS)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"policy": "gate"}, RequestError, "has no boundary model to gate with: make one"),
        ({"target_agreement": 0.9}, RequestError, "has no boundary model: make one with"),
        ({"policy": "clever"}, RequestError, "policy 'clever' is unknown: choose"),
        ({"policy": "static", "target_agreement": 0.9}, RequestError, "leave policy out"),
        ({"policy": "gate", "level": 8}, RequestError, "level 8 and a policy are both asked for"),
        ({"policy": Script(), "target_agreement": 0.9}, RequestError, "for policies by name"),
    ],
)
def test_what_contradicts_itself_is_refused(bank, arguments, error, message):
    with pytest.raises(error, match=message):
        Session(bank, **arguments)


def test_what_a_policy_may_not_ask_for(bank, tmp_path):
    class Bad:
        def __init__(self, answer):
            self.answer = answer

        def choose(self, context):
            return self.answer(context)

    for answer, error, message in (
        (lambda context: HIGH, RequestError, "gave Precision, expected Choice or None"),
        (lambda context: Choice(8), RequestError, "a Choice's precision is 8: give a Precision"),
        (lambda context: Choice(Precision(bits="3")), RequestError, "bits of a Precision is '3'"),
        (
            lambda context: Choice(Precision(level=3)),
            UnknownLevelError,
            "level 3 is not in the bank",
        ),
        (
            lambda context: Choice(LOW if context.precision == HIGH else HIGH),
            RequestError,
            "more than 8 answers",
        ),
    ):
        with (
            Session(bank, policy=Bad(answer), threads=1) as session,
            pytest.raises(error, match=message),
        ):
            run(session, PLUS)
    with pytest.raises(RequestError, match="shares are no mapping from a Precision"):
        Session(bank, policy=Script(shares={8: 1.0}))
    with Session(bank, policy=Script((LOW,)), threads=1) as session:
        with pytest.raises(RequestError, match="a policy decides"):
            session.set_level(4)
        run(session, PLUS)


def test_a_target_beyond_the_bank_says_what_can_be_stated(bank, tmp_path):
    fitted = with_boundary(bank, tmp_path / "t.bank", model(bank))
    with pytest.raises(RequestError, match=r"can state 0.9700 at most"):
        Session(fitted, target_agreement=0.99)
    with pytest.raises(RequestError, match=r"needs 2 on average"):
        Session(fitted, policy="gate", bits=1.5)


def test_a_refused_target_names_the_best_of_all_models(bank, tmp_path):
    better = {"outlook": np.array([[1.9, 0.94, 0.9], [3.5, 0.99, 0.98]])}
    models = [model(bank), model(bank, name="better", **better), model(bank, name="last")]
    fitted = with_boundary(bank, tmp_path / "b.bank", *models)
    with pytest.raises(RequestError, match=r"model better can state 0.9800 at most"):
        Session(fitted, target_agreement=0.99)
    with pytest.raises(RequestError, match=r"model better needs 1.9 on average"):
        Session(fitted, policy="gate", bits=1.5)


def test_a_weight_budget_too_small_names_the_smallest(bank):
    with pytest.raises(BudgetTooSmallError, match="allow more"):
        Session(bank, policy=Script(shares={HIGH: 1.0}), weight_budget=1000)
    with pytest.raises(BapqError, match=r"weight_budget is 1000 bytes \(1000 B\)") as refused:
        Session(bank, level=8, weight_budget=1000)
    works = int(str(refused.value).split("works is ")[1].split()[0])
    with Session(bank, level=8, weight_budget=works) as session:
        run(session, PLUS)
        assert session.stats().resident_bytes <= works
    with pytest.raises(BapqError, match="weight_budget"):
        Session(bank, level=8, weight_budget=works - 1)
