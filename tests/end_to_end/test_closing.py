"""Closing: whoever closes, on any thread, never waits for itself and leaves nothing behind."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from bapq_edge import Session
from bapq_edge.bank.boundary import Precision
from bapq_edge.errors import RequestError, SessionClosedError
from bapq_edge.policy import Choice
from support.streaming import chain_bank, run

X = np.abs(np.random.default_rng(1).standard_normal((1, 96))).astype(np.float32)
PATIENCE_S = 20


@pytest.fixture(scope="module")
def bank(tmp_path_factory):
    return chain_bank(tmp_path_factory.mktemp("closing") / "m.bank")


class Asked:
    """A policy that does something before every run."""

    def __init__(self, before):
        self.before = before

    def choose(self, context):
        if context.stage != "start":
            return None
        self.before()
        return Choice(Precision(level=8))


class Held:
    """Holds runs until they may go on."""

    def __init__(self):
        self.begun, self.go_on = threading.Event(), threading.Event()

    def __call__(self):
        self.begun.set()
        assert self.go_on.wait(PATIENCE_S)


def closes(session):
    return [event.kind for event in session.events()].count("close")


def test_a_run_cannot_close_its_own_session(bank):
    session = Session(bank, policy=Asked(lambda: session.close()))
    with pytest.raises(RequestError, match="a run cannot close its own session"):
        run(session, X)
    with pytest.raises(RequestError, match="a run cannot close its own session"):
        session.submit(None, {"x": X}).result(PATIENCE_S)
    assert session.stats().runs == 0 and closes(session) == 0
    session.close()
    assert closes(session) == 1


def test_a_future_may_close_the_session_it_came_from(bank):
    session = Session(bank)
    done = threading.Event()

    def close(future):
        session.close()
        session.close()
        done.set()

    session.submit(None, {"x": X}).add_done_callback(close)
    assert done.wait(PATIENCE_S)
    assert closes(session) == 1
    with pytest.raises(SessionClosedError):
        session.stats()


def test_what_has_not_begun_is_cancelled_and_may_close_as_well(bank):
    held = Held()
    session = Session(bank, policy=Asked(held))
    futures = [session.submit(None, {"x": X}) for _ in range(6)]
    futures[-1].add_done_callback(lambda future: session.close())
    assert held.begun.wait(PATIENCE_S)
    closer = threading.Thread(target=session.close)
    closer.start()
    while not futures[1].cancelled():
        time.sleep(0.001)
    assert closer.is_alive() and not futures[0].done()
    held.go_on.set()
    closer.join(PATIENCE_S)
    assert not closer.is_alive() and closes(session) == 1
    assert len(futures[0].result(PATIENCE_S)) == 1
    assert all(future.cancelled() for future in futures[1:])


def test_every_close_waits_until_the_session_is_closed(bank):
    held = Held()
    session = Session(bank, policy=Asked(held))
    runner = threading.Thread(target=run, args=(session, X))
    runner.start()
    assert held.begun.wait(PATIENCE_S)
    returned = []

    def close():
        session.close()
        returned.append(closes(session))

    closers = [threading.Thread(target=close) for _ in range(3)]
    for closer in closers:
        closer.start()
    while "closed" not in repr(session):
        time.sleep(0.001)
    time.sleep(0.05)
    assert returned == []
    held.go_on.set()
    for thread in (*closers, runner):
        thread.join(PATIENCE_S)
    assert returned == [1, 1, 1]


def test_a_switch_of_the_controller_may_close_while_others_do(bank, monkeypatch, tmp_path):
    trace = tmp_path / "trace.csv"
    trace.write_text("time_s,battery_percent,on_battery\n0,10,1\n")
    monkeypatch.setenv("BAPQ_SENSORS", f"mock:{trace}")
    opened, heard, closed = threading.Event(), threading.Event(), threading.Event()

    def close(event):
        heard.set()
        assert opened.wait(PATIENCE_S)
        session.close()
        closed.set()

    session = Session(bank, controller="auto", on_switch=close)
    assert heard.wait(PATIENCE_S)
    opened.set()
    session.close()
    assert closed.wait(PATIENCE_S) and closes(session) == 1
