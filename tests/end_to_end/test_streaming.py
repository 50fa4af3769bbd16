"""Streaming under a limit: bit for bit the answers of the same plan with everything in memory."""

from __future__ import annotations

import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import bapq_tools
from bapq_edge import Session
from bapq_edge.bank.layout import LEVELS
from bapq_edge.errors import StorageError
from bapq_edge.planning.planner import Request, plan
from bapq_edge.planning.timing import Speeds
from benchmarks.zoo import make_model
from benchmarks.zoo.digits import INPUT_NAMES, calibration_npz, load_digits_split
from support.internals import adopt, costs_of, graphs_of, store_of
from support.streaming import (
    BANKS,
    PRECISIONS,
    all_resident,
    chain_bank,
    inputs,
    limits,
    publish,
    resident_outputs,
    run,
    settled,
)

MIB = 1 << 20


pytestmark = pytest.mark.usefixtures("watchdog")


@pytest.fixture(scope="module", params=BANKS)
def bank(request, tmp_path_factory):
    """(kind, bank, inputs, [precision][input] of outputs)"""
    kind = request.param
    path = BANKS[kind](tmp_path_factory.mktemp(kind) / "m.bank")
    return kind, path, inputs(kind), resident_outputs(path, inputs(kind))


def assert_streams_right(session, request, limit, xs, expected):
    planned = publish(session, replace(request, weight_bytes_limit=limit))
    assert planned.streamed_bytes > 0 and planned.resident_bytes <= limit
    before = store_of(session).stats().read_bytes
    for _ in range(2):
        for x, y in zip(xs, expected, strict=True):
            np.testing.assert_array_equal(run(session, x), y)
            stats = settled(session)
            assert stats.home_bytes + stats.ring_bytes <= limit
    assert stats.read_bytes - before >= planned.streamed_bytes


@pytest.mark.parametrize("threads", [1, 2])
def test_a_streamed_run_equals_the_resident_one(bank, threads):
    _, path, xs, outputs = bank
    with Session(path, threads=threads) as session:
        for precision, expected in zip(PRECISIONS, outputs, strict=True):
            request = Request(**{"level": "auto", **precision})
            for limit in limits(costs_of(session), request):
                assert_streams_right(session, request, limit, xs, expected)


def test_levels_chosen_for_a_limit_give_what_they_give_in_memory(bank):
    _, path, xs, _ = bank
    with Session(path, level=8) as session:  # at "auto" it would follow the speeds that it measures
        costs = replace(costs_of(session), guessed=False)  # so that levels are mixed
        whole = costs.level_bytes[:, 0].sum()
        seen = set()
        for share in (0.03, 0.06, 0.12, 0.2, 0.5):
            request = Request(
                weight_bytes_limit=max(
                    int(whole * share), *limits(costs_of(session), Request())[:1]
                ),
                latency_s=0.001,
                max_slowdown=None,
                speeds=Speeds(whole * 100, np.zeros(len(costs.chunks_of_layer))),
            )
            planned = plan(costs, request)
            adopt(session, planned)
            streamed = [run(session, x) for x in xs]
            adopt(session, all_resident(costs_of(session), planned))
            for x, y in zip(xs, streamed, strict=True):
                np.testing.assert_array_equal(run(session, x), y)
            seen.add(planned.bits_per_weight)
        assert len(seen) >= 3


def test_the_digits_cnn_streams_right(tmp_path):
    make_model("digits_cnn", tmp_path / "model.onnx")
    calibration_npz(tmp_path / "calibration.npz", "cnn")
    path = bapq_tools.build_bank(
        tmp_path / "model.onnx",
        tmp_path / "m.bank",
        calibration=tmp_path / "calibration.npz",
        levels=LEVELS,
        progress=False,
    )
    images = load_digits_split(flat=False).x_test
    xs = [images[:1], images[:50]]
    outputs = resident_outputs(path, xs)
    with Session(path, threads=2) as session:
        assert session.get_inputs()[0].name == INPUT_NAMES["cnn"]
        for precision, expected in zip(PRECISIONS, outputs, strict=True):
            request = Request(**{"level": "auto", **precision})
            limit = limits(costs_of(session), request)[0]
            assert_streams_right(session, request, limit, xs, expected)


def test_direct_reads_give_the_same_bits_or_are_refused_by_name(request):
    """On the file system that the project is on; some of those for temporary files refuse."""
    place = request.config.cache.mkdir("direct")
    with tempfile.TemporaryDirectory(dir=place) as folder:
        for kind, make in BANKS.items():
            path = make(Path(folder) / f"{kind}.bank")
            outputs = resident_outputs(path, inputs(kind), PRECISIONS[1:3])
            try:
                session = Session(path, direct_io=True)
            except StorageError as error:
                assert "for direct reads" in str(error)
                continue
            with session:
                for precision, expected in zip(PRECISIONS[1:3], outputs, strict=True):
                    wanted = Request(**precision)
                    for limit in limits(costs_of(session), wanted):
                        assert_streams_right(session, wanted, limit, inputs(kind), expected)


def test_more_runs_at_once_than_the_ring_can_serve(bank):
    """One run at a time takes from the ring; the others wait, and nobody waits for ever."""
    _, path, xs, outputs = bank
    wrong = []
    with Session(path, threads=2) as session:
        request = Request(level=8)
        publish(session, replace(request, weight_bytes_limit=limits(costs_of(session), request)[0]))

        def work():
            for _ in range(10):
                for x, y in zip(xs, outputs[LEVELS.index(8)], strict=True):
                    if not np.array_equal(run(session, x), y):
                        wrong.append(y)

        workers = [threading.Thread(target=work) for _ in range(6)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert session.stats().runs == 120
    assert not wrong


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_thousand_random_changes_under_two_running_threads(bank, seed):
    """Every output is that of one legal plan, and nothing is left of the plans that went."""
    _, path, xs, outputs = bank
    legal = [{y[i].tobytes() for y in outputs} for i in range(len(xs))]
    wrong, counts, failures = [], [0, 0], []
    stop = threading.Event()
    rng = np.random.default_rng(seed)
    with Session(path, level=8, threads=2) as session:

        def work(number):
            try:
                while not stop.is_set():
                    i = counts[number] % len(xs)
                    if run(session, xs[i]).tobytes() not in legal[i]:
                        wrong.append(i)
                    counts[number] += 1
            except Exception as error:
                failures.append(error)

        workers = [threading.Thread(target=work, args=(number,)) for number in range(2)]
        for worker in workers:
            worker.start()
        budgets = [None, 1024 * MIB, 2048 * MIB]
        for _ in range(1000):
            precision = PRECISIONS[rng.integers(len(PRECISIONS))]
            match rng.integers(5):
                case 0 if "level" in precision:
                    session.set_level(precision["level"])
                case 0 | 1:
                    session.set_bits(precision.get("bits", 3.5))
                case 2:
                    session.set_memory_budget(budgets[rng.integers(len(budgets))])
                case _:
                    request = Request(**{"level": "auto", **precision})
                    low, _, high = limits(costs_of(session), request)
                    limit = int(rng.integers(low, 2 * high))
                    publish(session, replace(request, weight_bytes_limit=limit))
            if rng.random() < 0.3:
                time.sleep(rng.random() * 0.004)
        stop.set()
        for worker in workers:
            worker.join()
        assert not wrong and not failures
        assert min(counts) > 20
        session.set_memory_budget(None)
        for level in (8, 4):
            session.set_level(level)
            for x in xs:
                run(session, x)
            stats = settled(session)
            in_memory = costs_of(session).level_bytes[~costs_of(session).row_read]
            assert stats.live_plans == 1
            assert stats.home_bytes == in_memory[:, LEVELS.index(level)].sum()


def test_a_run_outlives_any_number_of_changes(tmp_path, monkeypatch):
    (x, _) = inputs("chain")
    with Session(chain_bank(tmp_path / "m.bank"), level=8, threads=1) as session:
        expected = run(session, x)
        graph = graphs_of(session)["whole"]
        call = graph.call

        def switching(*arguments):
            for i in range(2000):
                session.set_level((4, 8)[i % 2])
            return call(*arguments)

        monkeypatch.setattr(graph, "call", switching)
        np.testing.assert_array_equal(run(session, x), expected)
        assert session.stats().bits_per_weight == 8
        assert settled(session).live_plans == 1
        session.set_level(4)
