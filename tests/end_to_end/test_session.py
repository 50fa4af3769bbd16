"""The session's promises: switching, concurrency, errors, and memory given back."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import weakref

import numpy as np
import pytest
from onnx import helper, numpy_helper

from bapq_edge import Session
from bapq_edge.bank.layout import LEVELS
from bapq_edge.errors import (
    BankIntegrityError,
    BudgetTooSmallError,
    DegradedWarning,
    ExecutionError,
    MissingPlaneWarning,
    PlatformError,
    RequestError,
    RunInputError,
    SessionClosedError,
    SizeError,
    UnknownLevelError,
)
from support.banks import NO_CLIP, graph_bytes, node, random_codes, write_bank
from support.internals import bank_of, graphs_of
from support.streaming import settled

SCALE_COLUMNS = {4: 32, 2: 64, 1: 128}


@pytest.fixture(scope="module")
def bank(tmp_path_factory):
    """Two layers with a Relu between them; x (n, 96) -> y (n, 40)."""
    rng = np.random.default_rng(0)
    shapes = {"first": (128, 96), "second": (40, 128)}
    layers = []
    for name, (rows, columns) in shapes.items():
        codes = random_codes(rng, rows, columns, SCALE_COLUMNS, True)
        description = {
            "rows": rows,
            "columns": columns,
            "chunk_rows": 32,
            "residual_steps": 15,
            "scale_columns": SCALE_COLUMNS,
            "has_bias": True,
        }
        layers.append((name, "Gemm", codes, description))
    free = {"use_bias": 1, "clip_low": -NO_CLIP, "clip_high": NO_CLIP}
    graph = graph_bytes(
        [
            node("Gemm", "x", "h", layer=0, **{**free, "clip_low": 0.0}),
            node("Gemm", "h", "y", layer=1, **free),
        ],
        ["n", 96],
        ["n", 40],
    )
    return write_bank(tmp_path_factory.mktemp("session") / "two.bank", graph, layers)


@pytest.fixture
def x():
    return np.random.default_rng(1).standard_normal((4, 96)).astype(np.float32)


def fresh_outputs(bank, x, levels=LEVELS):
    outputs = {}
    for level in levels:
        with Session(bank, level=level) as session:
            (outputs[level],) = session.run(None, {"x": x})
    return outputs


def test_set_level_gives_bit_for_bit_what_a_fresh_session_gives(bank, x):
    expected = fresh_outputs(bank, x)
    with Session(bank, level=8) as session:
        graph = graphs_of(session)
        for level in (8, 1, 32, 2, 4, 8, 32, 1):
            session.set_level(level)
            (y,) = session.run(None, {"x": x})
            np.testing.assert_array_equal(y, expected[level])
        assert graphs_of(session) is graph


def test_going_down_reads_nothing_and_going_up_only_the_missing_plane(bank, x):
    with Session(bank, level=8) as session:
        session.run(None, {"x": x})
        at_8 = session.stats()
        session.set_level(4)
        at_4 = session.stats()
        session.run(None, {"x": x})
        after_4 = session.stats()
        session.set_level(8)
        session.run(None, {"x": x})
        again = session.stats()
    residual = at_8.resident_bytes - at_4.resident_bytes
    assert 0 < at_4.resident_bytes < at_8.resident_bytes == again.resident_bytes
    assert after_4.streamed_bytes == at_8.streamed_bytes
    assert again.streamed_bytes - at_8.streamed_bytes == residual


def test_runs_in_flight_finish_on_the_level_they_began(bank, x):
    expected = fresh_outputs(bank, x)
    wrong = []
    with Session(bank, level=8, threads=2) as session:
        stop = threading.Event()

        def work():
            while not stop.is_set():
                (y,) = session.run(None, {"x": x})
                if not any(np.array_equal(y, value) for value in expected.values()):
                    wrong.append(y)

        workers = [threading.Thread(target=work) for _ in range(2)]
        for worker in workers:
            worker.start()
        rng = np.random.default_rng(3)
        for level in rng.choice(LEVELS, 300):
            session.set_level(int(level))
        stop.set()
        for worker in workers:
            worker.join()
        assert settled(session).live_plans == 1
        assert session.stats().runs > 0
        session.set_level(1)
        session.run(None, {"x": x})
        settled(session)
        assert session.stats().resident_bytes == bank_of(session).weight_bytes(1)
    assert not wrong


def test_events_tell_every_switch_once_and_the_callback_hears_it(bank):
    heard = []
    with Session(bank, level=8, on_switch=heard.append) as session:
        session.set_level(8)
        session.set_level(2)
        session.on_switch = None
        session.set_level(4)
        events = session.events()
    changes = [(e.kind, e.previous_bits_per_weight, e.bits_per_weight) for e in events]
    assert changes == [("open", None, 8), ("switch", 8, 2), ("switch", 2, 4)]
    assert [event.bits_per_weight for event in heard] == [2]
    assert "8.00 -> 2.00 bits" in str(heard[0]) and "set_level(2)" in str(heard[0])
    assert session.events()[-1].kind == "close"


def test_stats_count_runs_and_bits(bank, x):
    with Session(bank, level=8) as session:
        assert session.stats().bits_per_weight == 0
        session.run(None, {"x": x})
        session.set_level(2)
        session.run(None, {"x": x})
        stats = session.stats()
        assert stats.resident_bytes == bank_of(session).weight_bytes(2)
    assert (stats.runs, stats.switches, stats.level) == (2, 1, 2)
    assert (stats.bits_per_weight, stats.mean_bits_per_weight) == (2.0, 5.0)
    with pytest.raises(AttributeError):
        stats.runs = 0


def test_it_is_a_drop_in_for_an_onnxruntime_session(bank, x):
    with Session(bank) as session:
        assert [(i.name, i.shape, i.type) for i in session.get_inputs()] == [
            ("x", ["n", 96], "tensor(float)")
        ]
        assert [o.name for o in session.get_outputs()] == ["y"]
        (by_name,) = session.run(["y"], {"x": x})
        (later,) = session.submit(None, {"x": x}).result()
        np.testing.assert_array_equal(by_name, later)


def test_bits_are_spread_over_the_chunks(bank, x):
    with Session(bank, bits=6) as session:
        session.run(None, {"x": x})
        stats = session.stats()
        assert stats.level is None
        assert 5 <= stats.bits_per_weight <= 6
        session.set_bits(3)
        assert session.stats().planned_bits_per_weight <= 3
        session.set_level("auto")
        assert session.stats().level == 32


def test_a_budget_too_small_is_refused_with_the_smallest_that_works(bank, x):
    with pytest.raises(
        BudgetTooSmallError, match=r"the smallest that works is (\d+) bytes"
    ) as error:
        Session(bank, memory_budget="64KiB")
    works = int(str(error.value).split("works is ")[1].split()[0])
    with Session(bank, memory_budget=4 * works, level=8) as session:
        (expected,) = session.run(None, {"x": x})
        with pytest.raises(BudgetTooSmallError):
            session.set_memory_budget("64KiB")
        (y,) = session.run(None, {"x": x})
        np.testing.assert_array_equal(y, expected)
        session.set_memory_budget(None)
        (y,) = session.run(None, {"x": x})
        np.testing.assert_array_equal(y, expected)


@pytest.mark.parametrize("precision", [{}, {"bits": 6}, {"level": 4}])
def test_a_first_larger_input_is_answered_at_the_same_precision(bank, precision):
    xs = np.random.default_rng(3).standard_normal((64, 96), np.float32)
    with Session(bank, **precision) as session:
        (expected,) = session.run(None, {"x": xs})
        bits = session.stats().bits_per_weight
    with Session(bank, memory_budget="64MiB", **precision) as session:
        (y,) = session.run(None, {"x": xs})  # its memory was not measured when it opened
        assert session.stats().bits_per_weight == bits
        np.testing.assert_array_equal(y, expected)


def test_unknown_levels_are_refused_and_change_nothing(bank, x):
    for level in (3, "high", 0, None):
        with pytest.raises(UnknownLevelError, match="32, 8, 4, 2, 1"):
            Session(bank, level=level)
    with Session(bank, level="4") as session:
        with pytest.raises(UnknownLevelError):
            session.set_level(16)
        assert session.stats().level == 4


def test_bad_requests_have_their_own_errors(bank):
    for size in ("64 potatoes", "", "-1", 0, "0MB"):
        with pytest.raises(SizeError):
            Session(bank, memory_budget=size)
    with pytest.raises(RequestError, match="threads is 0"):
        Session(bank, threads=0)


def test_feeds_that_do_not_fit_are_named(bank, x):
    with Session(bank) as session:
        for feed in ({}, {"x": x, "extra": x}, {"X": x}, {"x": x, "bapq.run": np.array(1)}):
            with pytest.raises(RunInputError, match=r"the model needs \['x'\]"):
                session.run(None, feed)
        for value in (x[:, :95], x.astype(np.float64), x[0]):
            with pytest.raises(RunInputError) as error:
                session.run(None, {"x": value})
            assert "\n" not in str(error.value)
        session.run(None, {"x": x})


def test_a_closed_session_says_so(bank, x):
    session = Session(bank)
    session.close()
    session.close()
    for call in (
        lambda: session.run(None, {"x": x}),
        lambda: session.submit(None, {"x": x}),
        lambda: session.set_level(4),
        session.stats,
        session.get_outputs,
    ):
        with pytest.raises(SessionClosedError):
            call()


def test_close_waits_for_runs_in_flight(bank, x):
    session = Session(bank)
    results = [session.submit(None, {"x": x}) for _ in range(50)]
    session.close()
    for result in results:
        if not result.cancelled() and result.exception() is not None:
            assert isinstance(result.exception(), SessionClosedError)


def test_a_chunk_that_changed_on_disk_is_named_and_a_lower_level_stands_in(bank, x, tmp_path):
    import shutil

    copy = tmp_path / "copy.bank"
    shutil.copytree(bank, copy)
    with Session(copy, level=4) as session:
        session.run(None, {"x": x})
        (expected,) = fresh_outputs(bank, x, [8]).values()
        plane = copy / "planes" / "r8.bin"
        data = bytearray(plane.read_bytes())
        data[100] ^= 1
        plane.write_bytes(data)
        session.set_level(8)
        with pytest.warns(DegradedWarning, match=r"layer first: plane r8, chunk 0: CRC-32"):
            session.run(None, {"x": x})
        assert session.events()[-1].kind == "degraded"
        data[100] ^= 1
        plane.write_bytes(data)
        (after,) = session.run(None, {"x": x})
        np.testing.assert_array_equal(after, expected)
    data[100] ^= 1
    plane.write_bytes(data)
    (copy / "planes" / "p4.bin").write_bytes(bytes((copy / "planes" / "p4.bin").stat().st_size))
    broken = pytest.raises(BankIntegrityError, match=r"layer first: plane p4, chunk 0: CRC-32")
    with Session(copy, level=8) as session, broken:
        session.run(None, {"x": x})


def test_a_missing_plane_leaves_the_levels_below(bank, x, tmp_path):
    import shutil

    copy = tmp_path / "copy.bank"
    shutil.copytree(bank, copy)
    (copy / "planes" / "r8.bin").unlink()
    (copy / "planes" / "f32.bin").unlink()
    with pytest.warns(MissingPlaneWarning, match=r"r8|f32"):
        session = Session(copy)
    with session:
        assert session.stats().level == 4
        with pytest.raises(UnknownLevelError, match="holds 4, 2, 1"):
            session.set_level(8)


def test_kernels_that_this_cpu_lacks_are_refused(bank, monkeypatch):
    monkeypatch.setenv("BAPQ_ISA", "altivec")
    with pytest.raises(PlatformError, match="BAPQ_ISA=altivec"):
        Session(bank)


def test_closing_gives_the_memory_back(tmp_path):
    """In a process of its own: 20 sessions on 40 MB of weights leave RSS where it was."""
    rng = np.random.default_rng(0)
    codes = random_codes(rng, 4096, 2048, SCALE_COLUMNS, False, levels=(32,))
    description = {
        "rows": 4096,
        "columns": 2048,
        "chunk_rows": 64,
        "residual_steps": 15,
        "scale_columns": {},
        "has_bias": False,
    }
    graph = graph_bytes(
        [node("MatMul", "x", "y", layer=0, use_bias=0, clip_low=-NO_CLIP, clip_high=NO_CLIP)],
        ["n", 2048],
        ["n", 4096],
    )
    bank = write_bank(
        tmp_path / "b.bank", graph, [("fc", "MatMul", codes, description)], levels=(32,)
    )
    script = f"""
import numpy as np
from bapq_edge import Session
from bapq_edge.telemetry import rss_bytes
x = np.zeros((1, 2048), np.float32)
def cycle():
    with Session({str(bank)!r}) as session:
        session.run(None, {{"x": x}})
        return rss_bytes()
cycle()
before = rss_bytes()
inside = [cycle() for _ in range(20)]
after = rss_bytes()
assert min(inside) - before > 30e6, (inside, before)
assert after <= before * 1.05, (before, after)
"""
    subprocess.run([sys.executable, "-c", script], check=True, env={**os.environ})


def test_a_session_loads_no_module_that_the_package_did_not(bank):
    # It would count against the session's memory budget, and stay when the session is closed. The
    # budget leaves room for what an emulated CPU's emulator takes in this process.
    script = f"""
import sys
import numpy as np
import bapq_edge
loaded = set(sys.modules)
with bapq_edge.Session({str(bank)!r}, memory_budget="1GiB") as session:
    session.run(None, {{"x": np.ones((3, 96), np.float32)}})
    session.set_level(4)
    session.submit(None, {{"x": np.ones((3, 96), np.float32)}}).result()
    session.stats(), session.events()
print(sorted(set(sys.modules) - loaded))
"""
    result = subprocess.run(
        [sys.executable, "-c", script], check=True, stdout=subprocess.PIPE, text=True
    )
    assert result.stdout == "[]\n"


def test_a_closed_session_goes_with_its_last_reference(bank, x):
    gc.disable()  # which would find it later, if it stood in a circle of references
    try:
        session = Session(bank, level=8, on_switch=print)
        session.run(None, {"x": x})
        session.close()
        gone = weakref.ref(session)
        del session
        assert gone() is None
    finally:
        gc.enable()


def test_a_tensor_that_no_memory_can_hold_is_an_error(tmp_path):
    rng = np.random.default_rng(0)
    codes = random_codes(rng, 64, 96, SCALE_COLUMNS, True)
    description = {
        "rows": 64,
        "columns": 96,
        "chunk_rows": 16,
        "residual_steps": 15,
        "scale_columns": SCALE_COLUMNS,
        "has_bias": True,
    }
    shape = numpy_helper.from_array(np.array([10**11, 64], np.int64))
    nodes = [
        node("Gemm", "x", "h", layer=0, use_bias=1, clip_low=0.0, clip_high=NO_CLIP),
        helper.make_node("Constant", [], ["shape"], value=shape),
        helper.make_node("Expand", ["h", "shape"], ["huge"]),
        helper.make_node("ReduceMax", ["huge"], ["y"], axes=[0]),
    ]
    path = write_bank(
        tmp_path / "m.bank",
        graph_bytes(nodes, [1, 96], [1, 64]),
        [("first", "Gemm", codes, description)],
    )
    with Session(path, level=8) as session:
        for _ in range(2):
            with pytest.raises(ExecutionError, match="alloc"):
                session.run(None, {"x": np.ones((1, 96), np.float32)})
