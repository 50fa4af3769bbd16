"""One bank, many sessions in a process: what one brought into memory, the others do not read."""

from __future__ import annotations

import shutil
import subprocess
import sys

import numpy as np
import pytest

from bapq_edge import Session
from support.banks import graph_bytes, node, write_bank
from support.streaming import LINEAR, chain_bank, layer, run

MIB = 1 << 20
X = np.random.default_rng(1).standard_normal((5, 96)).astype(np.float32)


@pytest.fixture(scope="module")
def bank(tmp_path_factory):
    return chain_bank(tmp_path_factory.mktemp("shared") / "m.bank")


def test_a_second_session_reads_nothing_that_the_first_has_in_memory(bank):
    with Session(bank, level=8) as first:
        expected = run(first, X)
        with Session(bank, level=8) as second:
            np.testing.assert_array_equal(run(second, X), expected)
            assert second.stats().streamed_bytes == 0
            assert second.stats().resident_bytes == first.stats().resident_bytes > 0
            second.set_level(32)
            run(second, X)
            assert second.stats().streamed_bytes > 0


def test_a_session_keeps_what_it_needs_when_the_other_switches_or_closes(bank):
    answers = {}
    for level in (8, 2):
        with Session(bank, level=level) as session:
            answers[level] = run(session, X)
    with Session(bank, level=8) as second:
        with Session(bank, level=8) as first:
            run(first, X)
            np.testing.assert_array_equal(run(second, X), answers[8])
            before = second.stats()
            first.set_level(2)
            np.testing.assert_array_equal(run(first, X), answers[2])
            np.testing.assert_array_equal(run(second, X), answers[8])
        np.testing.assert_array_equal(run(second, X), answers[8])
        assert second.stats().streamed_bytes == before.streamed_bytes
        assert second.stats().resident_bytes == before.resident_bytes


def test_a_bank_that_was_replaced_has_memory_of_its_own(bank, tmp_path):
    copy = shutil.copytree(bank, tmp_path / "copy.bank")
    with Session(bank, level=8) as first, Session(copy, level=8) as second:
        np.testing.assert_array_equal(run(first, X), run(second, X))
        assert second.stats().streamed_bytes == first.stats().streamed_bytes > 0


MEASURE = """
import sys
import numpy as np
from bapq_edge import Session
from bapq_edge.telemetry import rss_bytes

def run(session):
    session.run(None, {"x": np.ones((1, 4096), np.float32)})

sessions = []
for _ in range(3):
    before = rss_bytes()
    sessions.append(Session(sys.argv[1], level=8, threads=1))
    run(sessions[-1])
    print(rss_bytes() - before)
for session in sessions[:-1]:
    session.close()
run(sessions[-1])
print(sessions[-1].internals.ledger.overhead_bytes)
"""


def test_two_sessions_take_hardly_more_memory_than_one(tmp_path):
    graph = graph_bytes([node("Gemm", "x", "y", layer=0, **LINEAR)], ["n", 4096], ["n", 4096])
    large = write_bank(tmp_path / "m.bank", graph, [layer("fc", "Gemm", 4096, 4096, 256)])
    ran = subprocess.run(
        [sys.executable, "-c", MEASURE, large], capture_output=True, text=True, check=True
    )
    first, second, third, overhead = map(int, ran.stdout.split())
    assert first > 12 * MIB
    assert max(second, third) < first / 10
    assert 0 <= overhead < first / 10
