"""Budgets: what is refused, in which words, and what a session does that is over its budget."""

from __future__ import annotations

import re
import warnings

import numpy as np
import pytest

from bapq_edge import Session
from bapq_edge.errors import BudgetExceededWarning, BudgetTooSmallError
from bapq_edge.planning.ledger import MemoryLedger, too_small
from bapq_edge.units import format_size, parse_size
from support.banks import graph_bytes, node, write_bank
from support.streaming import LINEAR, chain_bank, layer, run

MIB = 1 << 20
LARGE = np.random.default_rng(1).standard_normal((20_000, 96)).astype(np.float32)
"""Its run takes some 50 MiB."""


@pytest.fixture(scope="module")
def bank(tmp_path_factory):
    return chain_bank(tmp_path_factory.mktemp("budgets") / "m.bank")


def smallest(bank, **settings):
    """The smallest budget that works, as the refusal of a smaller one says it; and the message."""
    with pytest.raises(BudgetTooSmallError) as refused:
        Session(bank, memory_budget="64KiB", **settings)
    message = str(refused.value)
    return int(re.search(r"works is (\d+) bytes", message)[1]), message


def test_a_session_over_its_budget_may_become_smaller_but_not_larger(bank):
    with Session(bank, level=1) as session:
        expected = run(session, LARGE)
    works, _ = smallest(bank, level=8)
    heard = []
    with Session(bank, level=8, memory_budget=works + 8 * MIB, on_switch=heard.append) as session:
        with pytest.warns(BudgetExceededWarning, match="the smallest that works is"):
            run(session, LARGE)
        assert session.events()[-1].kind == "budget"
        with pytest.warns(BudgetExceededWarning, match="the smallest that works is"):
            session.set_level(1)
        assert session.stats().level == 1 and session.events()[-1].kind == "budget"
        assert [event.bits_per_weight for event in heard] == [1]
        np.testing.assert_array_equal(run(session, LARGE), expected)
        for larger in (lambda: session.set_level(8), lambda: session.set_bits(6)):
            with pytest.raises(BudgetTooSmallError):
                larger()
        with pytest.raises(BudgetTooSmallError):
            session.set_memory_budget(works + 9 * MIB)
        assert session.stats().level == 1
        session.set_memory_budget("1GiB")
        session.set_level(8)
        assert session.stats().level == 8


def test_a_session_over_its_budget_warns_once_and_not_with_every_run(bank):
    works, _ = smallest(bank, level=8)
    with Session(bank, level=8, memory_budget=works + 8 * MIB) as session:
        with pytest.warns(BudgetExceededWarning):
            expected = run(session, LARGE)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for _ in range(3):
                np.testing.assert_array_equal(run(session, LARGE), expected)


def test_what_only_real_inputs_show_is_told_as_a_lower_bound(bank, tmp_path):
    _, message = smallest(bank, level=8)
    assert "at least" in message
    graph = graph_bytes([node("MatMul", "x", "y", layer=0, **LINEAR)], [1, 96], [1, 64])
    fixed = write_bank(tmp_path / "m.bank", graph, [layer("fc", "MatMul", 64, 96)])
    _, message = smallest(fixed, level=8)
    assert "at least" not in message
    with Session(bank, level=8, memory_budget="1GiB") as session:
        run(session, LARGE)
        with pytest.raises(BudgetTooSmallError) as refused:
            session.set_memory_budget("1MiB")
        assert "at least" not in str(refused.value)


def test_the_parts_of_the_smallest_budget_add_up():
    ledger = MemoryLedger()
    ledger.settle(ledger.overhead_bytes + 10**10, weight_bytes=0)
    with pytest.raises(BudgetTooSmallError) as refused:
        ledger.weight_limit_bytes(1000, smallest_bytes=3 * MIB)
    message = str(refused.value)
    whole = int(re.search(r"works is (\d+) bytes", message)[1])
    parts = re.findall(r"([\d.]+ [KMG]iB) (?:for|kept)", message)
    assert len(parts) == 3
    assert sum(map(parse_size, parts)) == pytest.approx(whole, rel=0.01)


def test_a_size_that_works_never_looks_like_the_one_refused_and_works_as_written():
    for size in (20 * MIB, 20 * MIB + 60_000, 2047, 1000):
        for works in (size + 1, size + 50_000):
            message = str(too_small("memory_budget", size, works, ""))
            given, written = re.findall(r"\((.*?)\)", message)
            assert given != written and parse_size(written) >= works
            assert given == format_size(size, "down")
