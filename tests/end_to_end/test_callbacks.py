"""Callbacks: every method from a listener, a policy and a future; what they raise; no deadlock."""

from __future__ import annotations

import logging
import threading

import numpy as np
import pytest

from bapq_edge import Session
from bapq_edge.bank.boundary import Precision
from bapq_edge.errors import RequestError, SessionClosedError
from bapq_edge.policy import Choice
from support.streaming import chain_bank, run

X = np.abs(np.random.default_rng(1).standard_normal((1, 96))).astype(np.float32)
PATIENCE_S = 60


@pytest.fixture(scope="module")
def bank(tmp_path_factory):
    return chain_bank(tmp_path_factory.mktemp("callbacks") / "m.bank")


class Policy:
    """Calls something at every stage."""

    def __init__(self, act):
        self.act = act

    def choose(self, context):
        self.act(context.stage)
        return Choice(Precision(level=8)) if context.stage == "start" else None


def test_a_listener_that_raises_is_logged_and_the_switch_stands(bank, caplog):
    def raises(event):
        raise ZeroDivisionError(event.reason)

    with Session(bank, level=8, on_switch=raises) as session:
        with caplog.at_level(logging.ERROR, "bapq_edge"):
            session.set_level(4)
        assert session.stats().level == 4
        assert run(session, X).shape == (1, 64)
    (record,) = caplog.records
    assert "on_switch raised at" in record.getMessage()
    assert record.exc_info[0] is ZeroDivisionError


METHODS = {
    "run": lambda session: run(session, X),
    "submit": lambda session: session.submit(None, {"x": X}),
    "set_memory_budget": lambda session: session.set_memory_budget("1GiB"),
    "set_level": lambda session: session.set_level(session.stats().level or 8),
    "set_bits": lambda session: session.set_bits(4),
    "stats": lambda session: session.stats(),
    "events": lambda session: session.events(),
    "get_inputs": lambda session: session.get_inputs(),
    "get_outputs": lambda session: session.get_outputs(),
    "on_switch": lambda session: setattr(session, "on_switch", session.on_switch),
    "internals": lambda session: session.internals,
    "close": lambda session: session.close(),
}
REFUSED_IN_A_POLICY = {
    "set_level": "a policy decides about precision here",
    "set_bits": "a policy decides about precision here",
    "close": "a run cannot close its own session",
}


def within(act):
    """Do it on a thread that may hang."""
    failures = []

    def guarded():
        try:
            act()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=guarded, daemon=True)
    thread.start()
    thread.join(PATIENCE_S)
    assert not thread.is_alive(), "it waits for itself"
    if failures:
        raise failures[0]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_from_a_listener(bank, method, caplog):
    called = []

    def listen(event):
        if not called:
            called.append(True)
            called.append(METHODS[method](session))

    session = Session(bank, level=8, on_switch=listen)
    within(lambda: session.set_level(4))
    assert len(called) == 2 and not caplog.records
    within(session.close)
    with pytest.raises(SessionClosedError):
        session.stats()


@pytest.mark.parametrize("method", METHODS)
def test_every_method_from_a_policy(bank, method):
    depth, refused = [], []

    def act(stage):
        if depth:
            return  # a run inside a run
        depth.append(stage)
        try:
            METHODS[method](session)
        except RequestError as error:
            refused.append(str(error))
        depth.pop()

    session = Session(bank, policy=Policy(act))
    within(lambda: run(session, X))
    words = REFUSED_IN_A_POLICY.get(method)
    assert bool(refused) == (words is not None) and all(words in each for each in refused)
    within(session.close)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_from_a_future(bank, method):
    session, done, failures = Session(bank, level=8), threading.Event(), []

    def act(future):
        try:
            METHODS[method](session)
        except BaseException as error:
            failures.append(error)
        done.set()

    session.submit(None, {"x": X}).add_done_callback(act)
    assert done.wait(PATIENCE_S) and failures == []
    within(session.close)
