"""The recording of reads and waits, its Chrome trace, and the meters."""

from __future__ import annotations

import json
import mmap
import subprocess
import sys
import time

import numpy as np
import pytest
from onnx import TensorProto

from bapq_edge import Session
from bapq_edge.bank.layout import PLANES
from bapq_edge.bank.reader import Bank
from bapq_edge.engine.library import TRACE_KINDS
from bapq_edge.engine.store import Store
from bapq_edge.profiling import Meter, Recorder, measure
from bapq_edge.sensors import Readings
from support.banks import NO_CLIP, graph_bytes, node, random_codes, write_bank

SCALE_COLUMNS = {4: 32, 2: 64, 1: 128}


def description(rows, columns, chunk_rows, has_bias):
    return {
        "rows": rows,
        "columns": columns,
        "chunk_rows": chunk_rows,
        "residual_steps": 15,
        "scale_columns": SCALE_COLUMNS,
        "has_bias": has_bias,
    }


@pytest.fixture(scope="module")
def bank(tmp_path_factory):
    """A product of four chunks; x (n, 96) -> y (n, 128)."""
    codes = random_codes(np.random.default_rng(0), 128, 96, SCALE_COLUMNS, True)
    free = {"use_bias": 1, "clip_low": -NO_CLIP, "clip_high": NO_CLIP}
    graph = graph_bytes([node("Gemm", "x", "y", layer=0, **free)], ["n", 96], ["n", 128])
    layers = [("dense", "Gemm", codes, description(128, 96, 32, True))]
    return write_bank(tmp_path_factory.mktemp("trace") / "one.bank", graph, layers)


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """An embedding table of 64 rows, a chunk for each 16."""
    codes = random_codes(np.random.default_rng(1), 64, 96, SCALE_COLUMNS, False)
    graph = graph_bytes([node("Gather", "x", "y", layer=0)], ["n"], ["n", 96], TensorProto.INT64)
    layers = [("table", "Gather", codes, description(64, 96, 16, False))]
    return write_bank(tmp_path_factory.mktemp("trace") / "table.bank", graph, layers)


def feed():
    return {"x": np.ones((2, 96), np.float32)}


def publish_and_bring_in(store, bank, level):
    chunks = bank.manifest.chunk_count
    store.publish(
        np.full(chunks, level, np.uint8), np.ones(chunks, np.bool_), 1 << 20, None, threads=1
    )
    for _ in range(10_000):
        if store.stats().home_bytes == bank.weight_bytes(level):
            return
        time.sleep(0.001)
    pytest.fail(f"level {level} does not come in")


def test_every_read_is_recorded_with_its_chunk_plane_and_bytes(bank):
    opened = Bank.open(bank)
    store = Store(opened)
    store.trace_start(100)
    before_ns = time.monotonic_ns()
    publish_and_bring_in(store, opened, 8)
    after_ns = time.monotonic_ns()
    events, lost = store.trace_read()
    assert lost == 0 and {TRACE_KINDS[kind] for kind in events["kind"]} == {"read"}
    found = {(event["chunk"], tuple(PLANES)[event["plane"]]): event["bytes"] for event in events}
    expected = {
        (chunk, plane): opened.chunks(plane)["bytes"][chunk]
        for chunk in range(4)
        for plane in ("p4", "r8")
    }
    assert found == expected and len(events) == 8
    assert events["bytes"].sum() == store.stats().read_bytes == opened.weight_bytes(8)
    times = np.stack([events["start_ns"], events["end_ns"]], 1).ravel()
    assert before_ns <= times[0] and times[-1] <= after_ns
    assert (np.diff(times) >= 0).all()  # one thread reads, one chunk after the other
    assert len(store.trace_read()[0]) == 0
    store.close()


def test_a_full_buffer_loses_events_and_says_so_and_none_are_recorded_when_it_is_off(bank):
    opened = Bank.open(bank)
    store = Store(opened)
    publish_and_bring_in(store, opened, 4)
    assert len(store.trace_read()[0]) == 0
    store.trace_start(3)
    publish_and_bring_in(store, opened, 8)
    events, lost = store.trace_read()
    assert (len(events), lost) == (3, 1)
    publish_and_bring_in(store, opened, 32)
    assert [len(store.trace_read()[0]), store.trace_read()[1]] == [3, 2]
    store.trace_start(0)
    publish_and_bring_in(store, opened, 2)
    events, lost = store.trace_read()
    assert (len(events), lost) == (0, 0)
    store.close()


def test_failed_reads_are_recorded_as_such(bank, tmp_path):
    import shutil

    broken = shutil.copytree(bank, tmp_path / "broken.bank")
    with open(broken / "planes" / "p4.bin", "r+b") as plane:
        plane.write(b"\xff" * 8)
    opened = Bank.open(broken)
    store = Store(opened)
    store.trace_start(100)
    store.publish(np.full(4, 4, np.uint8), np.ones(4, np.bool_), 1 << 20, None, threads=1)
    failed = []
    for _ in range(10_000):
        events, _ = store.trace_read()
        failed += [event for event in events.tolist() if event[3] != 0]
        if failed:
            break
        time.sleep(0.001)
    assert failed and all(event[1] == 0 and event[6] == 0 for event in failed)
    store.close()


def test_the_trace_shows_runs_reads_and_the_switch_between(bank, tmp_path):
    with Session(bank, level=8) as session:
        expected = session.run(None, feed())
        session.set_level(4)
        session.run(None, feed())
        before = session.stats()
        with Recorder(session) as recorder:
            recorder.run(feed())
            session.set_level(8)
            outputs = recorder.run(feed())
        after = session.stats()
        summary = recorder.write(tmp_path / "trace.json")
    np.testing.assert_array_equal(outputs, expected)
    trace = json.loads((tmp_path / "trace.json").read_text())
    entries = trace["traceEvents"]
    slices = [entry for entry in entries if entry["ph"] == "X"]
    reads = [entry for entry in slices if "bytes" in entry["args"]]
    assert sum(entry["args"]["bytes"] for entry in reads) == summary.read_bytes
    assert summary.read_bytes == after.streamed_bytes - before.streamed_bytes > 0
    assert sorted(entry["name"] for entry in reads) == [f"dense #{i}" for i in range(4)]
    assert {entry["args"]["plane"] for entry in reads} == {"r8"}

    runs = [entry for entry in slices if entry["name"].startswith("run ")]
    assert [entry["name"] for entry in runs] == ["run 1", "run 2"] and summary.runs == 2
    (switch,) = [entry for entry in entries if entry["ph"] == "i"]
    assert switch["name"] == "switch" and "set_level(8)" in switch["args"]["reason"]
    assert runs[0]["ts"] + runs[0]["dur"] <= switch["ts"] <= runs[1]["ts"]
    for wait in [entry for entry in slices if entry["name"].startswith("wait")]:
        assert any(
            run["ts"] <= wait["ts"] and wait["ts"] + wait["dur"] <= run["ts"] + run["dur"]
            for run in runs
        )
    assert summary.lost_events == trace["otherData"]["lost_events"] == 0
    named = {entry["tid"] for entry in entries if entry["name"] == "thread_name"}
    assert {entry["tid"] for entry in slices} | {switch["tid"]} <= named
    counters = {entry["name"] for entry in entries if entry["ph"] == "C"}
    assert {"process MB", "pinned weights MB", "ring MB", "available MB"} <= counters


def test_rows_that_an_operator_reads_itself_are_on_the_track_of_its_run(table, tmp_path):
    rows = {"x": np.array([3, 40, 4], np.int64)}
    with Session(table, level=8) as session, Recorder(session) as recorder:
        recorder.run(rows)
        recorder.run(rows)
        stats = session.stats()
    summary = recorder.write(tmp_path / "trace.json")
    entries = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    reads = [entry for entry in entries if "bytes" in entry.get("args", {})]
    names = ["read rows of table #0"] * 2 + ["read rows of table #2"] * 2  # two planes each, once
    assert sorted(entry["name"] for entry in reads) == names
    assert summary.read_bytes == stats.streamed_bytes
    assert list(summary.waits_by_layer_ms) == ["table"] and summary.wait_share > 0
    (run,) = {entry["tid"] for entry in entries if entry["name"].startswith("run ")}
    assert {entry["tid"] for entry in reads} == {run}


# ---- meters ----


class FakeSensors:
    """Tells these powers one after the other, and then the last one."""

    def __init__(self, *powers, source="test meter", age_s=None):
        self.powers, self.source, self.age_s = list(powers), source, age_s
        self.closed = False

    def read(self):
        power = self.powers.pop(0) if len(self.powers) > 1 else self.powers[0]
        source = None if power is None else self.source
        age_s = None if self.age_s is None else time.monotonic() - self.age_s
        return Readings(0.0, power_w=power, power_source=source, power_age_s=age_s)

    def close(self):
        self.closed = True


def test_energy_is_the_integral_of_the_meter_and_windows_nest():
    sensors = FakeSensors(2.5)
    with Meter(sensors=sensors) as meter, meter.window("outer"):
        with meter.window("inner"):
            time.sleep(0.06)
        time.sleep(0.06)
    inner, outer = meter.windows
    assert (inner.name, outer.name) == ("inner", "outer") and sensors.closed
    for window in (inner, outer):
        assert window.energy_j == pytest.approx(2.5 * window.wall_s, rel=1e-6)
        assert window.power_source == "test meter" and window.power_hz > 0
    assert outer.wall_s > inner.wall_s and "J of test meter" in str(outer)


@pytest.mark.parametrize(
    "sensors",
    [
        FakeSensors(None),  # no meter
        FakeSensors(2.0, 2.0, None),  # one that stops answering
        FakeSensors(2.0, source="pmic, 12 rails", age_s=time.monotonic()),  # one old answer
    ],
)
def test_energy_that_was_not_measured_is_none(sensors):
    with Meter(sensors=sensors) as meter, meter.window("run"):
        time.sleep(0.02)
    (window,) = meter.windows
    assert window.energy_j is None
    assert (window.power_source is None) == (window.power_hz is None)


def test_peak_memory_of_a_window_is_its_own_or_none():
    with Meter(sensors=FakeSensors(None)) as meter:
        with meter.window("large"):
            np.ones(64 << 20, np.uint8)
        with meter.window("small"):
            np.ones(1 << 20, np.uint8)
    large, small = meter.windows
    # The tests before may have left as much behind; then nothing tells, and that is said.
    assert large.peak_growth_bytes is None or large.peak_growth_bytes > 60 << 20
    assert small.peak_growth_bytes is None
    assert small.rss_anon_bytes > 0 and small.rss_file_bytes > 0


def test_measure_gives_the_result_and_the_window():
    def allocate():
        # A mapping of its own: memory from the heap may be some that an earlier test gave back.
        pages = np.frombuffer(mmap.mmap(-1, 64 << 20), np.uint8)
        pages[:] = 1
        return pages

    kept, window = measure(allocate, "allocate")
    assert kept.nbytes == 64 << 20 and window.name == "allocate"
    assert window.rss_growth_bytes > 60 << 20


def test_a_window_s_peak_is_that_of_the_kernel_to_the_page():
    """In a process of its own, so that no earlier peak hides it."""
    code = """
import mmap
from bapq_edge.profiling import Meter
def kilobytes(field):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(field))
with Meter() as meter:
    pages = mmap.mmap(-1, 80 << 20)
    pages[:] = bytes(1) * (80 << 20)
    pages.close()
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = kilobytes("VmRSS")
    with meter.window("large"):
        pages = mmap.mmap(-1, 48 << 20)
        for page in range(0, 48 << 20, 4096):
            pages[page] = 1
        pages.close()
    peak = kilobytes("VmHWM")
print(meter.windows[0].peak_growth_bytes // 1024, peak - before)
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    window, kernel = map(int, ended.stdout.split())
    assert kernel >= (48 << 10) - 512  # less what the process gave back
    assert abs(window - kernel) <= 64  # what reading the two files took between
