"""Sessions that live long: dropped, forked, starved of memory, and replaced."""

from __future__ import annotations

import gc
import os
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from bapq_edge import Session
from bapq_edge.bank.boundary import Precision
from bapq_edge.bank.exchange import unpack
from bapq_edge.bank.install import install
from bapq_edge.errors import (
    BankFormatError,
    BudgetTooSmallError,
    RequestError,
    ResourceError,
    RunInputError,
)
from bapq_edge.policy import Choice
from bapq_edge.telemetry import peak_rss_bytes
from support.banks import graph_bytes, node, write_bank
from support.hostile import Victim
from support.streaming import LINEAR, chain_bank, layer, run

X = np.abs(np.random.default_rng(1).standard_normal((1, 96))).astype(np.float32)
PATIENCE_S = 60


@pytest.fixture(scope="module")
def bank(tmp_path_factory):
    return chain_bank(tmp_path_factory.mktemp("lives") / "m.bank")


def handles_of(path):
    """How many files below the path this process has open."""
    found = [os.path.realpath(f"/proc/self/fd/{each}") for each in os.listdir("/proc/self/fd")]
    return sum(name.startswith(str(path)) for name in found)


def wait_for(condition):
    end_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end_s, "it never came true"
        time.sleep(0.005)


# ---- dropped ----


@pytest.mark.parametrize("listens", [False, True])
def test_a_dropped_session_gives_everything_back_with_a_warning(bank, listens):
    threads = len(os.listdir("/proc/self/task"))
    session = Session(bank, level=8, weight_budget="100KB", threads=2)
    if listens:  # a circle of references
        session.on_switch = session.run
    run(session, X)
    assert handles_of(bank) == 5
    with pytest.warns(ResourceWarning, match="was dropped while it was open: close it"):
        del session
        gc.collect()
    wait_for(lambda: handles_of(bank) == 0)
    wait_for(lambda: len(os.listdir("/proc/self/task")) <= threads)


def test_a_session_is_dropped_in_the_middle_of_anything(bank, monkeypatch, tmp_path):
    """The garbage collector may run on any thread, such as one that holds a session's lock."""
    trace = tmp_path / "trace.csv"
    trace.write_text("time_s,battery_percent,on_battery\n0,10,1\n")
    monkeypatch.setenv("BAPQ_SENSORS", f"mock:{trace}")
    session = Session(bank, controller="auto")
    replanner = session.internals.replanner
    with replanner.lock, pytest.warns(ResourceWarning):  # the controller's thread waits for it
        del session
        gc.collect()
    wait_for(lambda: handles_of(bank) == 0)


def test_a_program_may_end_with_sessions_that_are_dropped(bank):
    """It waits for what gives them back: ONNX Runtime is not taken down under it."""
    script = f"""
import atexit, threading
import numpy as np
from bapq_edge import Session

session = Session({str(bank)!r}, level=8, threads=2)

def slowly():
    threading.Event().wait(0.2)
    print("given back", flush=True)

session.internals._open_parts.callback(slowly)
atexit.register(print, "the end")
del session
"""
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.split("\n") == ["the end", "given back", ""]


def test_a_closed_session_is_dropped_without_a_warning(bank):
    with Session(bank) as session:
        run(session, X)
    del session
    gc.collect()


# ---- forks ----


def test_a_forked_process_is_told_and_ends(bank):
    """Also while the lock of the session was held as the process forked."""
    script = f"""
import os, sys
import numpy as np
from bapq_edge import Session
from bapq_edge.errors import ForkedSessionError

x = np.ones((1, 96), np.float32)
session = Session({str(bank)!r}, level=8, weight_budget="100KB", threads=2)
session.run(None, {{"x": x}})
with session.internals.replanner.lock:
    child = os.fork()
if child == 0:
    told = 0
    for call in (lambda: session.run(None, {{"x": x}}), lambda: session.set_level(4),
                 lambda: session.submit(None, {{"x": x}}), session.stats,
                 lambda: session.set_memory_budget("1GiB"), session.get_inputs):
        try:
            call()
        except ForkedSessionError as error:
            told += "open a session after the fork" in str(error)
    session.close()
    with Session({str(bank)!r}, level=8) as own:
        own.run(None, {{"x": x}})
    print("told", told, flush=True)
    sys.exit(0)  # ONNX Runtime's threads are not here to be joined
os.waitpid(child, 0)
session.run(None, {{"x": x}})
session.close()
print("parent", flush=True)
"""
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert result.stdout.splitlines() == ["told 6", "parent"], result.stderr


# ---- what the system refuses ----


def test_a_ring_that_found_no_memory_is_made_by_the_next_run(bank):
    script = f"""
import resource
import numpy as np
from bapq_edge import Session
from bapq_edge.errors import OutOfMemoryError, StorageError

def address_bytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()

x = np.ones((1, 96), np.float32)
session = Session({str(bank)!r}, level=8, threads=1)
expected = session.run(None, {{"x": x}})[0]
unlimited = resource.getrlimit(resource.RLIMIT_AS)
parts = session.internals
chunks = parts.bank.manifest.chunk_count
levels = np.full(chunks, 8, np.uint8)
resource.setrlimit(resource.RLIMIT_AS, (address_bytes() + (1 << 20), unlimited[1]))
parts.store.publish(levels, np.zeros(chunks, bool), 1 << 30, 0, 1)
for _ in range(2):
    try:
        session.run(None, {{"x": x}})
        print("ran without a ring")
    except OutOfMemoryError as error:
        assert not isinstance(error, StorageError)
        print("refused:", error)
resource.setrlimit(resource.RLIMIT_AS, unlimited)
assert np.array_equal(session.run(None, {{"x": x}})[0], expected)
print("right again")
session.close()
"""
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=PATIENCE_S
    )
    lines = result.stdout.splitlines()
    assert len(lines) == 3 and lines[2] == "right again", result.stdout + result.stderr
    assert all("no ring of 1073741824 bytes" in line for line in lines[:2])


@pytest.mark.parametrize("free", range(8))
def test_without_file_handles_the_error_is_named(bank, free):
    used = len(os.listdir("/proc/self/fd")) - 1
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    spare = [os.dup(0) for _ in range(max(map(int, os.listdir("/proc/self/fd"))) - used)]
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + len(spare) + free, hard))
    try:
        with Session(bank, level=8) as session:
            run(session, X)
    except ResourceError as error:
        assert "raise 'ulimit -n'" in str(error) and "\n" not in str(error)
    else:
        assert free > 4
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for each in spare:
            os.close(each)


def test_inputs_beyond_any_memory_are_refused_before_they_are_made(tmp_path):
    nodes = [node("MatMul", "x", "y", layer=0, **LINEAR)]
    graph = graph_bytes(nodes, [1 << 40, 96], [1 << 40, 64])
    path = write_bank(tmp_path / "m.bank", graph, [layer("fc", "MatMul", 64, 96)])
    with pytest.raises(BudgetTooSmallError, match=r"422212465065984 bytes .* for the inputs alone"):
        Session(path, memory_budget="1GiB")


def test_a_bank_is_not_unpacked_into_itself(bank):
    for inside in (bank, bank / "planes", bank / ".." / bank.name):
        with pytest.raises(RequestError, match=r"is in the bank .* itself: choose another place"):
            unpack(bank, inside)


def test_a_graph_larger_than_the_budget_is_not_read(tmp_path):
    nodes = [node("MatMul", "x", "y", layer=0, **LINEAR)]
    graph = graph_bytes(nodes, ["n", 96], ["n", 64]) + b"\x12\x80\x80\x80\x08" + bytes(16 << 20)
    path = write_bank(tmp_path / "m.bank", graph, [layer("fc", "MatMul", 64, 96)])
    with pytest.raises(BudgetTooSmallError, match=r"main\.onnx is read whole and has 16777\d+ byt"):
        Session(path, memory_budget="16MiB")


def test_a_manifest_larger_than_the_budget_is_not_read(bank):
    with pytest.raises(BudgetTooSmallError, match=r"has \d+ bytes, which take about"):
        Session(bank, memory_budget="16KiB")


@pytest.mark.parametrize("size", [1 << 30, 1 << 40])
def test_a_sparse_graph_of_any_size_takes_no_memory(tmp_path, size):
    victim = Victim(chain_bank(tmp_path / "m.bank"))

    def declare(document):
        document["graph"]["bytes"] = size

    victim.edit_manifest(declare)
    os.truncate(victim.file("graph/main.onnx"), size)
    before = peak_rss_bytes()
    with pytest.raises((BudgetTooSmallError, BankFormatError)):
        Session(victim.path, memory_budget="16MiB")
    assert peak_rss_bytes() - before < 16 << 20


# ---- many wishes ----


class EverNew:
    """Wishes for other bits at every run."""

    bits = 2.0

    def choose(self, context):
        if context.stage != "start":
            return None
        self.bits += 0.03125
        return Choice(Precision(bits=self.bits))


def test_a_policy_may_wish_for_ever_new_precisions(bank):
    with Session(bank, policy=EverNew()) as session:
        replanner = session.internals.replanner
        for _ in range(40):
            run(session, X)
        assert len(replanner.plans.by_precision) <= 9
        assert session.stats().bits_per_weight == pytest.approx(2 + 40 * 0.03125, abs=0.2)


def test_threads_with_ever_new_wishes_do_not_lose_their_plans(bank):
    with Session(bank, policy=EverNew(), threads=1) as session:
        threads = [
            threading.Thread(target=lambda: [run(session, X) for _ in range(15)]) for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE_S)
        assert session.stats().runs == 60


# ---- the largest input ----


def test_an_input_beyond_the_largest_is_refused_before_anything_is_allocated(bank):
    options = {"level": 8, "memory_budget": "64MiB", "max_shapes": {"x": (64, 96)}}
    with Session(bank, **options) as session:
        assert run(session, np.ones((64, 96), np.float32)).shape == (64, 64)
        with pytest.raises(RunInputError, match=r"x has shape \(65, 96\), max_shapes allows \(64,"):
            run(session, np.ones((65, 96), np.float32))
        assert session.stats().runs == 1
    with Session(bank, allow_overrun=True, **options) as session:
        assert run(session, np.ones((65, 96), np.float32)).shape == (65, 64)


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        ({"z": (1, 96)}, "max_shapes names 'z', the model's inputs are"),
        ({"x": (1, 95)}, "max_shapes has .* for x, the model's is"),
        ({"x": (96,)}, "max_shapes has .* for x, the model's is"),
        ({"x": (0, 96)}, "max_shapes is"),
        ({"x": "96"}, "max_shapes is"),
        ([("x", (1, 96))], "max_shapes is"),
    ],
)
def test_shapes_that_the_model_cannot_have(bank, shapes, words):
    with pytest.raises(RequestError, match=words):
        Session(bank, max_shapes=shapes)


def test_the_budget_holds_for_the_largest_input_from_the_first_run_on(bank):
    script = f"""
import numpy as np
from bapq_edge import Session
from bapq_edge.telemetry import peak_rss_bytes, rss_bytes

x = np.ones((4096, 96), np.float32)
before = rss_bytes()
with Session({str(bank)!r}, level=8, memory_budget="40MiB", max_shapes={{"x": x.shape}},
             threads=1) as session:
    for _ in range(3):
        session.run(None, {{"x": x}})
    print(peak_rss_bytes() - before, [e.kind for e in session.events()])
"""
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    grown = int(result.stdout.split()[0])
    assert grown < 1.05 * 40 * 2**20, result.stdout


# ---- updates ----


def test_a_session_opens_the_old_bank_or_the_new_one_while_it_is_replaced(tmp_path):
    versions = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        layers = [layer(name, "MatMul", 64, 96)]
        nodes = [node("MatMul", "x", "y", layer=0, **LINEAR)]
        graph = graph_bytes(nodes, ["n", 96], ["n", 64])
        versions.append(write_bank(tmp_path / name / "m.bank", graph, layers))
    legal = []
    for version in versions:
        with Session(version, level=8) as session:
            legal.append(run(session, X).tobytes())
    board = tmp_path / "board.bank"
    install(versions[0], board)
    stopping, failures = threading.Event(), []

    def update():
        number = 0
        while not stopping.is_set():
            number += 1
            try:
                install(versions[number % 2], board)
            except BaseException as error:
                failures.append(error)
                return

    updater = threading.Thread(target=update)
    updater.start()
    try:
        seen = set()
        for _ in range(60):
            with Session(board, level=8, threads=1) as session:
                answer = run(session, X).tobytes()
            assert answer in legal
            seen.add(answer)
    finally:
        stopping.set()
        updater.join(PATIENCE_S)
    assert failures == [] and len(seen) == 2


def test_nothing_of_onnx_runtime_reaches_stderr(bank, tmp_path):
    broken = graph_bytes([node("Nonsense", "x", "y", layer=0)], ["n", 96], ["n", 64])
    broken = broken.replace(b"Nonsense", b"Non\xeeense")  # no UTF-8: its message cannot be read
    other = write_bank(tmp_path / "broken.bank", broken, [layer("fc", "MatMul", 64, 96)])
    script = f"""
import numpy as np
from bapq_edge import Session
from bapq_edge.errors import BapqError
for path, x in (({str(bank)!r}, (1, 96)), ({str(bank)!r}, (1, 95)), ({str(other)!r}, (1, 96))):
    try:
        with Session(path, level=8) as session:
            session.run(None, {{"x": np.ones(x, np.float32)}})
    except BapqError as error:
        assert "\\n" not in str(error)
"""
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


# ---- all of it at once ----


def test_a_short_soak_gives_no_other_answer_and_keeps_nothing():
    """`make soak` takes an hour for it."""
    soak = Path(__file__).parents[1] / "fuzz/soak.py"
    command = [sys.executable, str(soak), "--seconds", "4"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr[-2000:]
