"""Progress: it moves during a long step, never runs ahead of itself, and ends."""

from __future__ import annotations

import re
import time

from bapq_tools.build_support import progress
from bapq_tools.build_support.progress import Progress


def test_a_long_step_is_not_silent(monkeypatch, capsys):
    monkeypatch.setattr(progress, "_LINE_S", 0.05)
    with Progress(True).stage("work", 4) as advance:
        time.sleep(0.12)
        advance()
        time.sleep(0.3)  # longer than three quarters of what a quarter took foretell
    lines = capsys.readouterr().err.splitlines()
    states = [re.fullmatch(r"work: (\d+)% after \d+ s, (\S+) left", line) for line in lines[:-1]]
    shares = [int(state[1]) for state in states]
    assert len(shares) >= 4 and states[0][2] == "-:--"
    assert shares == sorted(shares) and shares[0] == 0 and 25 <= shares[-1] <= 99
    assert lines[-1].startswith("work: 0.")


def test_a_step_that_took_no_time_foretells_nothing_wrong(monkeypatch):
    clock = progress._Clock(2)
    clock.advance(2)
    assert clock.share_now == 1
    clock = progress._Clock(1000)
    clock.advance()
    assert 0 < clock.share_now <= 0.99


def test_without_it_nothing_is_shown(capsys):
    stages = Progress(False)
    with stages.stage("work") as advance:
        advance()
    assert capsys.readouterr().err == "" and "work" in stages.seconds
