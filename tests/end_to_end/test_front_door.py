"""What a caller of the Python API meets first: ONNX Runtime's manners, settings, log lines."""

from __future__ import annotations

import logging

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from bapq_edge import Session
from bapq_edge.bank.boundary import Precision
from bapq_edge.errors import (
    BapqError,
    DegradedWarning,
    ProfileError,
    RequestError,
    RunInputError,
    SessionClosedError,
    SizeError,
    UnknownLevelError,
)
from bapq_edge.options import SessionOptions
from bapq_edge.policy import Choice
from support.banks import graph_bytes, node, write_bank
from support.boundaries import HIGH, LOW, model, with_boundary
from support.command_line import bapq
from support.streaming import LINEAR, RELU, chain_bank, layer, run

X = np.abs(np.random.default_rng(1).standard_normal((1, 96))).astype(np.float32)


@pytest.fixture(scope="module")
def bank(tmp_path_factory):
    """x (n, 96) to y (n, 64)."""
    return chain_bank(tmp_path_factory.mktemp("chain") / "m.bank")


@pytest.fixture(scope="module")
def two_outputs(tmp_path_factory):
    """x (n, 96) to h (n, 64), and from there to y (n, 32)."""
    layers = [layer("first", "Gemm", 64, 96), layer("second", "Gemm", 32, 64)]
    nodes = [
        node("Gemm", "x", "h", layer=0, **RELU),
        node("Gemm", "h", "y", layer=1, **LINEAR),
    ]
    graph = onnx.load_from_string(graph_bytes(nodes, ["n", 96], ["n", 32]))
    hidden = helper.make_tensor_value_info("h", TensorProto.FLOAT, ["n", 64])
    graph.graph.output.insert(0, hidden)
    path = tmp_path_factory.mktemp("two") / "m.bank"
    return write_bank(path, graph.SerializeToString(), layers)


# ---- as ONNX Runtime ----


@pytest.mark.parametrize("policy", [None, "own"])
def test_outputs_come_as_they_are_asked_for(two_outputs, policy):
    class Base:
        def choose(self, context):
            return Choice(Precision(level=8)) if context.stage == "start" else None

    settings = {"level": 8} if policy is None else {"policy": Base()}
    with Session(two_outputs, **settings) as session:
        h, y = session.run(None, {"x": X})
        assert (h.shape, y.shape) == ((1, 64), (1, 32))
        for names, expected in (
            ([], [h, y]),
            ((), [h, y]),
            (["y"], [y]),
            (("y", "h", "y"), [y, h, y]),
        ):
            outputs = session.run(names, {"x": X})
            assert len(outputs) == len(expected)
            for output, value in zip(outputs, expected, strict=True):
                np.testing.assert_array_equal(output, value)
        with pytest.raises(RunInputError, match=r"has no output 'z', it has \['h', 'y'\]"):
            session.run(["y", "z"], {"x": X})
        with pytest.raises(RunInputError, match=r"output_names is 'y': give a list"):
            session.run("y", {"x": X})


@pytest.mark.parametrize("budget", [None, "1GiB"])
def test_what_is_no_feed_or_no_list_of_names_is_named(two_outputs, budget):
    with Session(two_outputs, level=8, memory_budget=budget) as session:
        (y,) = session.run((name for name in ("y",)), {"x": X})
        assert y.shape == (1, 32)
        for call in (session.run, session.submit):
            for feed in ([X], X, None, 5):
                with pytest.raises(RunInputError, match="input_feed is of type"):
                    call(None, feed)
            with pytest.raises(RunInputError, match=r"the feed has \[1, 'x'\]"):
                call(None, {"x": X, 1: X})
            with pytest.raises(RunInputError, match="output_names is of type int"):
                call(5, {"x": X})
            for name in (None, 5, X, ["y"]):
                with pytest.raises(RunInputError, match="the model has no output"):
                    call([name], {"x": X})
        for value in (None, "x", [[1.0], [1.0, 2.0]], object()):
            with pytest.raises(RunInputError):
                session.run(None, {"x": value})
        for options in (5, "fast", {}):
            with pytest.raises(RequestError, match="give an onnxruntime"):
                session.run(None, {"x": X}, options)
        session.run(None, {"x": X}, onnxruntime.RunOptions())


def test_arrays_of_either_byte_order_are_the_same_numbers(bank):
    with Session(bank, level=8) as session:
        expected = run(session, X)
        for order in ("<f4", ">f4"):
            np.testing.assert_array_equal(run(session, X.astype(order)), expected)
        np.testing.assert_array_equal(
            session.submit(None, {"x": X.astype(">f4")}).result()[0], expected
        )


def test_a_policy_sees_the_outputs_that_it_reads_whatever_was_asked_for(two_outputs, tmp_path):
    answer = model(two_outputs, stage="answer", tap="y", pool=(2,), node_threshold=np.full(3, -1e9))
    fitted = with_boundary(two_outputs, tmp_path / "e.bank", answer)
    with Session(two_outputs, level=8) as session:
        (expected,) = session.run(["h"], {"x": X})
    with Session(fitted, policy="escalate", target_agreement=0.97) as session:
        outputs = session.run(["h"], {"x": X})
        assert session.stats().region is not None
        assert len(outputs) == 1 and outputs[0].shape == expected.shape


def test_a_wrong_shape_is_told_with_its_index_and_what_was_expected(bank):
    with Session(bank) as session, pytest.raises(RunInputError) as error:
        session.run(None, {"x": X[:, :95]})
    message = str(error.value)
    assert "\n" not in message and str(bank) in message
    for words in ("x", "index: 1", "Got: 95", "Expected: 96"):
        assert words in message


def test_a_closed_session_tells_its_events_and_nothing_else(bank):
    session = Session(bank)
    session.close()
    calls = {
        "run": lambda: session.run(None, {}),
        "submit": lambda: session.submit(None, {}),
        "get_inputs": session.get_inputs,
        "get_outputs": session.get_outputs,
        "stats": session.stats,
        "set_level": lambda: session.set_level(8),
        "set_level(3)": lambda: session.set_level(3),
        "set_bits": lambda: session.set_bits(3),
        "set_bits('3')": lambda: session.set_bits("3"),
        "set_memory_budget": lambda: session.set_memory_budget(None),
        "set_memory_budget(True)": lambda: session.set_memory_budget(True),
        "on_switch": lambda: session.on_switch,
        "on_switch = print": lambda: setattr(session, "on_switch", print),
        "internals": lambda: session.internals,
        "with": session.__enter__,
    }
    for name, call in calls.items():
        with pytest.raises(SessionClosedError, match="open a new one"):
            call()
            pytest.fail(name)
    assert [event.kind for event in session.events()] == ["open", "close"]
    assert "closed" in repr(session)


# ---- settings ----


NAN = float("nan")
MISTAKES = [
    ({"controller": "atuo"}, RequestError, "controller is 'atuo': give \"auto\" or None"),
    ({"controller": True}, RequestError, "controller is True"),
    ({"latency_ms": -1}, RequestError, "latency_ms is -1: give a number of milliseconds"),
    ({"latency_ms": NAN}, RequestError, "latency_ms is nan"),
    ({"latency_ms": "5"}, RequestError, "latency_ms is '5'"),
    ({"latency_ms": float("inf")}, RequestError, "latency_ms is inf"),
    ({"max_slowdown": 0.9}, RequestError, "max_slowdown is 0.9: give a number from 1 up, or None"),
    ({"max_slowdown": NAN}, RequestError, "max_slowdown is nan"),
    ({"level": True}, UnknownLevelError, 'level is True: choose "auto" or one of 32, 8, 4, 2, 1'),
    ({"level": 8.0}, UnknownLevelError, "level is 8.0"),
    ({"level": "Auto"}, UnknownLevelError, "level is 'Auto'"),
    ({"threads": 1.5}, RequestError, "threads is 1.5: give a whole number from 1 up, or None"),
    ({"threads": "2"}, RequestError, "threads is '2'"),
    ({"threads": True}, RequestError, "threads is True"),
    ({"threads": -3}, RequestError, "threads is -3, the least is 1"),
    ({"threads": 30000}, RequestError, "threads is 30000, the most is 1024"),
    ({"threads": 10**12}, RequestError, "threads is 1000000000000, the most is 1024"),
    ({"bits": "3"}, RequestError, "bits is '3': give a number of bits per weight from 1 to 32"),
    ({"bits": 99}, RequestError, "bits is 99"),
    ({"bits": 0.5}, RequestError, "bits is 0.5"),
    ({"bits": NAN}, RequestError, "bits is nan"),
    ({"bits": True}, RequestError, "bits is True"),
    ({"bits": 3, "level": 4}, RequestError, "level 4 and 3 bits are both asked for"),
    ({"target_agreement": 99}, RequestError, "target_agreement is 99: give a share from 0 to 1"),
    ({"target_agreement": 0.9, "bits": 4}, RequestError, "0.9 and 4 bits are both asked for"),
    ({"target_agreement": NAN}, RequestError, "target_agreement is nan"),
    ({"policy": object()}, RequestError, "policy of type object has no method choose: choose"),
    ({"policy": "clever"}, RequestError, "policy 'clever' is unknown"),
    ({"policy": 5}, RequestError, "policy of type int has no method choose"),
    ({"policy": Choice}, RequestError, "policy is the class Choice: give an object of it"),
    ({"on_switch": 5}, RequestError, "on_switch is 5: give a function of one argument"),
    ({"profile": 5}, ProfileError, "profile is 5: give a board's name"),
    ({"profile": "a\0"}, ProfileError, "profile is 'a.x00': give a board's name"),
    ({"trusted_key": "a\0"}, RequestError, "trusted_key is 'a.x00': give a public key's file"),
    ({"bank": "a\0"}, RequestError, "bank is 'a.x00': give the bank's directory"),
    ({"direct_io": "no"}, RequestError, "direct_io is 'no': give True or False"),
    ({"memory_budget": True}, SizeError, "memory_budget: True is not a size"),
    ({"memory_budget": "Auto"}, SizeError, "memory_budget: 'Auto' is not a size"),
    ({"weight_budget": "auto"}, SizeError, "weight_budget: 'auto' is not a size"),
    ({"weight_budget": 0}, SizeError, "weight_budget: 0 is not a size"),
    ({"on_switch": np.zeros((99, 9))}, RequestError, r"on_switch is array\("),
]


@pytest.mark.parametrize(("settings", "kind", "message"), MISTAKES)
def test_a_setting_that_is_none_is_refused_before_anything_is_opened(settings, kind, message):
    with pytest.raises(kind, match=message) as error:
        Session(**{"bank": "no/such.bank", **settings})
    assert "\n" not in str(error.value) and len(str(error.value)) < 200


def test_numbers_of_numpy_and_levels_as_text_are_as_good(bank):
    options = SessionOptions(
        bank, level="4", threads=np.int64(2), latency_ms=np.float32(3), weight_budget="1MiB"
    )
    assert (options.level, options.threads, options.weight_budget) == (4, 2, 1 << 20)
    with Session(bank, threads=np.int64(1), level=np.int32(4)) as session:
        assert session.stats().level == 4
        session.set_level(np.uint8(2))
        session.set_bits(np.float32(6))
        assert session.stats().planned_bits_per_weight <= 6


def test_live_settings_are_checked_as_at_the_open(bank):
    with Session(bank, level=8) as session:
        for call, kind in (
            (lambda: session.set_level(True), UnknownLevelError),
            (lambda: session.set_level(8.0), UnknownLevelError),
            (lambda: session.set_bits("3"), RequestError),
            (lambda: session.set_bits(99), RequestError),
            (lambda: session.set_bits(NAN), RequestError),
            (lambda: session.set_memory_budget(True), SizeError),
            (lambda: setattr(session, "on_switch", 5), RequestError),
        ):
            with pytest.raises(kind):
                call()
        assert session.stats().level == 8 and session.on_switch is None
        assert [event.kind for event in session.events()] == ["open"]


def test_a_live_budget_may_be_automatic(bank, monkeypatch, tmp_path):
    trace = tmp_path / "trace.csv"
    trace.write_text(f"time_s,available_bytes\n0,{1 << 30}\n")
    monkeypatch.setenv("BAPQ_SENSORS", f"mock:{trace}")
    with Session(bank, level=8) as session:
        expected = run(session, X)
        session.set_memory_budget("auto")
        np.testing.assert_array_equal(run(session, X), expected)
        trace.write_text("time_s,available_bytes\n0,\n")
        before = session.events()
        with pytest.raises(BapqError, match="give it as a size"):
            session.set_memory_budget("auto")
        assert session.events() == before


def test_a_raised_budget_reaches_a_session_with_a_controller(bank, monkeypatch, tmp_path):
    (tmp_path / "trace.csv").write_text(f"time_s,available_bytes\n0,{4 << 30}\n")
    monkeypatch.setenv("BAPQ_SENSORS", f"mock:{tmp_path / 'trace.csv'}")
    with Session(bank, level=8, controller="auto", memory_budget="1GiB") as session:
        session.set_memory_budget("2GiB")
        assert session.internals.monitor.envelope.weight_bytes_limit == 2 << 30


# ---- policies of the caller's own ----


def is_dark(image):
    return float(np.mean(image)) < 0.5


class NightShift:  # as in README
    def choose(self, context):
        level = 2 if is_dark(context.values["x"]) else 8
        return Choice(Precision(level=level)) if context.stage == "start" else None


@pytest.mark.parametrize("budget", [None, "256MiB"])
def test_a_policy_may_look_at_the_input_at_every_stage(bank, budget):
    with Session(bank, policy=NightShift(), memory_budget=budget) as session:
        for image, bits in ((X + 1, 8), (0 * X, 2), (X + 1, 8)):
            run(session, image)
            assert session.stats().bits_per_weight == bits


def test_every_stage_sees_the_feed_and_what_came_of_it(bank):
    seen = []

    class Spy:
        def choose(self, context):
            seen.append((context.stage, sorted(context.values)))

    with Session(bank, policy=Spy()) as session:
        run(session, X)
    assert seen == [("start", ["x"]), ("answer", ["x", "y"])]


def test_a_policy_may_have_any_attribute_of_its_own(bank):
    class Mine:
        model, expected_regions = object(), "mine too"

        def choose(self, context):
            return Choice(HIGH, region=3) if context.stage == "start" else None

    with Session(bank, policy=Mine()) as session:
        run(session, X)
        assert session.stats().region == 3


# ---- log lines ----


def test_events_and_plans_are_logged_at_info_and_decisions_at_debug(bank, tmp_path, caplog):
    caplog.set_level(logging.DEBUG, "bapq_edge")
    with Session(bank, level=8) as session:
        session.set_level(4)
        run(session, X)
        session.set_level(8)
    fitted = with_boundary(bank, tmp_path / "g.bank", model(bank))
    with Session(fitted, policy="gate", target_agreement=0.97) as session:
        run(session, X)
    infos = [r.getMessage() for r in caplog.records if r.levelno == logging.INFO]
    debugs = [r.getMessage() for r in caplog.records if r.levelno == logging.DEBUG]
    assert {record.name for record in caplog.records} == {"bapq_edge"}
    assert any("switch: 8.00 -> 4.00 bits" in line for line in infos)
    assert any("m.bank: plan: level 4" in line for line in infos)
    assert any("g.bank" in line and "open" in line for line in infos)
    assert any("policy at start" in line and str(LOW.level) in line for line in debugs)
    assert not any(record.levelno > logging.INFO for record in caplog.records)


def test_a_degraded_run_is_logged_and_warned_of_at_the_caller(bank, tmp_path, caplog):
    import shutil

    copy = shutil.copytree(bank, tmp_path / "c.bank")
    caplog.set_level(logging.INFO, "bapq_edge")
    with Session(copy, level=4) as session:
        run(session, X)
        plane = copy / "planes" / "r8.bin"
        plane.write_bytes(bytes(plane.stat().st_size))
        session.set_level(8)
        with pytest.warns(DegradedWarning) as heard:
            session.run(None, {"x": X})
        stats = session.stats()
    assert (stats.runs, stats.degraded) == (2, 1)
    assert heard[0].filename == __file__
    (line,) = [r.getMessage() for r in caplog.records if "degraded" in r.getMessage()]
    assert "ran at a lower level" in line


def test_degraded_runs_are_counted_in_what_the_command_line_prints(bank, tmp_path):
    import json
    import shutil

    copy = shutil.copytree(bank, tmp_path / "c.bank")
    np.savez(tmp_path / "x.npz", x=X)
    command = ("run", copy, "--input", tmp_path / "x.npz", "--level", "8")
    assert "degraded" not in bapq(*command)[0]
    plane = copy / "planes" / "r8.bin"
    plane.write_bytes(bytes(plane.stat().st_size))
    assert "\n1 run degraded: " in bapq(*command)[0]
    assert "\n2 runs degraded: " in bapq(*command, "--repeat", "2")[0]
    assert json.loads(bapq(*command, "--repeat", "2", "--json")[0])["degraded"] == 2


def test_without_a_handler_nothing_is_printed(bank):
    import subprocess
    import sys

    script = f"""
import bapq_edge
with bapq_edge.Session({str(bank)!r}, level=8) as session:
    session.set_level(4)
"""
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    assert result.stdout == result.stderr == ""
