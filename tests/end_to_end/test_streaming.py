"""Streaming under a limit: bit for bit the answers of the same plan with everything in memory."""

from __future__ import annotations

import faulthandler
import os
import subprocess
import sys
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
from bapq_edge.errors import BudgetTooSmallError, StorageError
from bapq_edge.planning.planner import Request, plan
from bapq_edge.planning.timing import Speeds
from benchmarks.zoo import make_model
from benchmarks.zoo.digits import INPUT_NAMES, calibration_npz, load_digits_split
from support.internals import adopt, bank_of, costs_of, graphs_of, store_of
from support.streaming import (
    BANKS,
    PRECISIONS,
    all_resident,
    chain_bank,
    inputs,
    limits,
    matrix_bank,
    publish,
    resident_outputs,
    run,
    settled,
)

MIB = 1 << 20


@pytest.fixture(autouse=True)
def watchdog():
    """A deadlock must not hang the suite: it ends with every thread's stack."""
    faulthandler.dump_traceback_later(240, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


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


# ---- memory ----


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """60 MiB of weights at level 8."""
    return matrix_bank(tmp_path_factory.mktemp("large") / "m.bank", 15 * 1024, 4096, (8, 4))


def anonymous_bytes():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith("RssAnon:"))


def test_going_down_a_level_gives_its_memory_back_without_a_read(large):
    x = np.ones((1, 4096), np.float32)
    with Session(large, level=8) as session:
        r8_bytes = int(bank_of(session).chunks("r8")["bytes"].sum())
        assert r8_bytes > 25 * MIB
        expected = run(session, x)
        settled(session)
        before, at_8 = anonymous_bytes(), store_of(session).stats()
        session.set_level(4)
        after, at_4 = anonymous_bytes(), store_of(session).stats()
        assert before - after > 0.98 * r8_bytes
        assert at_8.home_bytes - at_4.home_bytes == r8_bytes
        run(session, x)
        assert store_of(session).stats().read_bytes == at_8.read_bytes
        session.set_level(8)
        np.testing.assert_array_equal(run(session, x), expected)
        assert store_of(session).stats().read_bytes - at_8.read_bytes == r8_bytes


def python(script, *arguments):
    """What a script prints, run in a process of its own: memory is measured there."""
    command = [sys.executable, "-c", script, *map(str, arguments)]
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=200, env={**os.environ}
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_a_process_grows_by_no_more_than_its_budget(large):
    python(
        """
import sys
import time
import numpy as np
from bapq_edge import Session
from bapq_edge.telemetry import peak_rss_bytes, rss_bytes

MIB = 1 << 20
x = np.linspace(-1, 1, 4096, dtype=np.float32)[None]

def forget_peak():
    while session.internals.store.stats().live_plans > 1:  # a read under way holds the plan before
        time.sleep(0.001)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")

before = rss_bytes()
outputs = []
with Session(sys.argv[1], memory_budget="52MiB", level=8, threads=1) as session:

    def check(mib, runs=3):
        for _ in range(runs):
            outputs.append(session.run(None, {"x": x})[0])
        grown = peak_rss_bytes() - before
        assert grown <= mib * MIB, (mib, grown / MIB)
        return session.stats()

    at_52 = check(52)
    session.set_memory_budget("44MiB")
    forget_peak()
    at_44 = check(44)
    session.set_memory_budget("64MiB")
    at_64 = check(64)
    assert at_44.resident_bytes < at_52.resident_bytes < at_64.resident_bytes
    session.set_memory_budget("200MiB")
    check(200)
    everything = session.stats()
    check(200)
    assert session.stats().streamed_bytes == everything.streamed_bytes
    session.set_memory_budget("44MiB")
    forget_peak()
    check(44)
    session.set_memory_budget(None)
    check(200)
assert all((y == outputs[-1]).all() for y in outputs)
""",
        large,
    )


def test_a_switch_to_a_budget_that_streams_takes_no_memory_meanwhile(large):
    """The peak of the call and of the runs after it, not only what is held once it is over."""
    python(
        """
import sys
import numpy as np
from bapq_edge import Session
from bapq_edge.telemetry import peak_rss_bytes, rss_bytes

MIB = 1 << 20
x = np.linspace(-1, 1, 4096, dtype=np.float32)[None]
before = rss_bytes()
with Session(sys.argv[1], memory_budget="200MiB", level=8, threads=1) as session:
    session.run(None, {"x": x})
    for mib in (52, 200, 44, 64, 44):
        held = rss_bytes() - before
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
        session.set_memory_budget(mib * MIB)
        at_once = peak_rss_bytes() - before
        for _ in range(3):
            session.run(None, {"x": x})
        grown = peak_rss_bytes() - before
        assert at_once <= held + 4.5 * MIB, (mib, held / MIB, at_once / MIB)  # the ring
        assert grown <= max(held + MIB / 2, mib * MIB), (mib, held / MIB, grown / MIB)
        assert ("streamed" in session.stats().plan) == (mib < 200)
        assert rss_bytes() - before <= mib * MIB
""",
        large,
    )


def test_an_earlier_peak_of_the_process_is_not_the_sessions(large):
    python(
        """
import sys
import numpy as np
from bapq_edge import Session

x = np.ones((1, 4096), np.float32)
np.ones(400 << 20, np.uint8)  # and gone
with Session(sys.argv[1], memory_budget="52MiB", level=8, threads=1) as session:
    session.run(None, {"x": x})
    hidden = session.stats().peak_bytes
    assert 40 << 20 < hidden <= 52 << 20, hidden
    large = np.ones(800 << 20, np.uint8)
    assert session.stats().peak_bytes > 800 << 20
""",
        large,
    )


def test_sessions_that_stream_leave_no_memory_behind(large):
    python(
        """
import sys
import numpy as np
from bapq_edge import Session
from bapq_edge.telemetry import rss_bytes

x = np.ones((1, 4096), np.float32)

def cycle():
    with Session(sys.argv[1], memory_budget="64MiB", level=8, threads=2) as session:
        session.run(None, {"x": x})
        session.set_memory_budget("48MiB")
        session.set_level(4)
        session.run(None, {"x": x})
        return session.internals.store.stats().read_bytes

cycle()
before = rss_bytes()
for _ in range(20):
    assert cycle() > 30e6
after = rss_bytes()
assert after <= before * 1.05, (before, after)
""",
        large,
    )


def test_a_budget_too_small_for_streaming_names_one_that_works(tmp_path):
    path = chain_bank(tmp_path / "m.bank")
    with Session(path, level=8) as session:
        (x, _) = inputs("chain")
        expected = run(session, x)
        with pytest.raises(BudgetTooSmallError, match="smallest that works is"):
            session.set_memory_budget(1)
        np.testing.assert_array_equal(run(session, x), expected)
        assert settled(session).live_plans == 1


def test_the_smallest_budget_that_is_named_works(tmp_path):
    script = """
import sys
import warnings
import numpy as np
from bapq_edge import Session
from bapq_edge.errors import BudgetTooSmallError
from bapq_edge.telemetry import peak_rss_bytes, rss_bytes

x = np.ones((1, 96), np.float32)
warnings.simplefilter("error")
if sys.argv[2] == "0":
    try:
        Session(sys.argv[1], memory_budget="64KiB", level=8, threads=1)
    except BudgetTooSmallError as error:
        print(str(error).split("works is ")[1].split()[0])
else:
    before, budget = rss_bytes(), int(sys.argv[2])
    with Session(sys.argv[1], memory_budget=budget, level=8, threads=1) as session:
        for _ in range(5):
            session.run(None, {"x": x})
        assert peak_rss_bytes() - before <= 1.05 * budget, (peak_rss_bytes() - before, budget)
"""
    path = chain_bank(tmp_path / "m.bank")
    works = python(script, path, 0).strip()
    assert int(works) > 1 << 20
    python(script, path, works)


def test_code_that_only_loading_needs_is_given_back(tmp_path):
    python(
        """
import sys
from bapq_edge import Session

def file_bytes():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith("RssFile:"))

before = file_bytes()
session = Session(sys.argv[1], level=8, threads=1)
assert file_bytes() < before, (before, file_bytes())
""",
        chain_bank(tmp_path / "m.bank"),
    )
