"""The controller inside a session: a scripted trace gives the plans one would draw by hand."""

from __future__ import annotations

import time
from itertools import pairwise

import numpy as np
import pytest

from bapq_edge import Session
from bapq_edge.bank.layout import LEVELS
from bapq_edge.control.monitor import Monitor
from bapq_edge.errors import SensorError
from bapq_edge.planning.planner import Request, smallest_limit
from bapq_edge.planning.speed_meter import SpeedMeter
from support.internals import adopt, bank_of, costs_of, monitor_of, plan_of, plans_of, store_of
from support.streaming import (
    all_resident,
    chain_bank,
    inputs,
    matrix_bank,
    resident_outputs,
    run,
    settled,
)

MIB = 1 << 20
HEADER = "time_s,available_bytes,battery_percent,on_battery,temperature_c"
CALM = {"available_bytes": 1000 * MIB, "battery_percent": 80, "on_battery": 1, "temperature_c": 50}


@pytest.fixture(scope="module")
def bank(tmp_path_factory):
    """2.4 MiB of weights at level 8."""
    return matrix_bank(tmp_path_factory.mktemp("controlled") / "m.bank", 2048, 512, LEVELS)


@pytest.fixture
def by_hand(monkeypatch):
    """The monitor's thread does not start: the test takes its steps. No speed is measured either,
    so that readings alone decide."""
    monkeypatch.setattr(Monitor, "start", lambda self: None)
    monkeypatch.setattr(SpeedMeter, "speeds", lambda self, threads: None)


@pytest.fixture
def play(monkeypatch, tmp_path):
    """Makes a trace the sensors: rows of what differs from CALM, one per second."""

    def prepare(rows, mode="mock-step"):
        lines = [HEADER]
        for second, row in enumerate(rows):
            values = {**CALM, **row}
            lines.append(",".join(str(value) for value in (second, *values.values())))
        (tmp_path / "trace.csv").write_text("\n".join(lines) + "\n")
        monkeypatch.setenv("BAPQ_SENSORS", f"{mode}:{tmp_path / 'trace.csv'}")
        return len(lines) - 1

    return prepare


def steps(session, count, x):
    """[(second, level, bits, threads)] after each step that changed one of them; runs go on."""
    seen = []
    for second in range(count):
        monitor_of(session).step()
        run(session, x)
        stats = session.stats()
        state = (stats.level, round(stats.planned_bits_per_weight, 2), plans_of(session).threads)
        if not seen or seen[-1][1:] != state:
            seen.append((second, *state))
    return seen


def switches(session):
    return [event for event in session.events() if event.kind == "switch"]


X = np.linspace(-1, 1, 512, dtype=np.float32)[None]


def test_a_battery_that_runs_down_caps_the_level_once_per_threshold(by_hand, play, bank):
    percents = list(range(80, 9, -1)) + [10] * 5
    count = play({"battery_percent": percent} for percent in percents)
    with Session(bank, controller="auto", threads=2) as session:
        seen = steps(session, count, X)
        # Below 30 % at most level 4, below 15 % at most level 2.
        assert [entry[:2] for entry in seen] == [(0, 32), (51, 4), (66, 2)]
        assert [event.reason for event in switches(session)] == [
            "battery_percent 29 < 30",
            "battery_percent 14 < 15",
        ]
        assert session.stats().switches == 2


def test_a_battery_around_its_threshold_does_not_flap(by_hand, play, bank):
    count = play({"battery_percent": 29 + second % 4} for second in range(60))
    with Session(bank, controller="auto") as session:
        assert [entry[:2] for entry in steps(session, count, X)] == [(0, 4)]


def test_heat_halves_the_threads_and_caps_the_level_until_it_has_cooled(by_hand, play, bank):
    degrees = [70, 74, 76, 78, 74, 76, 72] + [68] * 15
    count = play({"temperature_c": value} for value in degrees)
    with Session(bank, controller="auto", threads=2) as session:
        seen = steps(session, count, X)
    # Over 75 °C at second 2; below 70 °C from second 7, so 10 s later it is over.
    assert [(second, level, threads) for second, level, _, threads in seen] == [
        (0, 32, 2),
        (2, 4, 1),
        (17, 32, 2),
    ]


def test_heat_halves_the_threads_of_a_session_whose_level_is_fixed(
    by_hand, play, bank, monkeypatch
):
    count = play({"temperature_c": value} for value in [70, 78, 78] + [60] * 12)
    published = []
    with Session(bank, controller="auto", threads=2, level=4) as session:
        publish = store_of(session).publish

        def spy(levels, pinned, ring_bytes, home_limit_bytes, threads, **rest):
            published.append(threads)
            publish(levels, pinned, ring_bytes, home_limit_bytes, threads, **rest)

        monkeypatch.setattr(store_of(session), "publish", spy)
        (level,) = {entry[1] for entry in steps(session, count, X)}
    assert level == 4  # the caller's own precision stays
    assert published == [1, 2]


def test_memory_that_others_take_is_given_at_once_and_comes_back_slowly(by_hand, play, bank):
    """The reserve is 128 MiB and its band 64: at 131.5 MiB of reserve nothing happens, at 127 the
    lack of 65 MiB is more than all weights, so the least that works remains."""
    free = [1000, 131.5] + [127] * 3 + [1000] * 90
    count = play({"available_bytes": int(value * MIB)} for value in free)
    outputs = resident_outputs(bank, [X], [{"level": level} for level in LEVELS])
    with Session(bank, controller="auto", threads=2) as session:
        smallest = smallest_limit(costs_of(session), Request())
        full = settled(session)
        run(session, X)
        full = settled(session).home_bytes
        assert full == bank_of(session).weight_bytes(32)
        resident = []
        for _ in range(count):
            monitor_of(session).step()
            y = run(session, X)
            stats = settled(session)
            resident.append(stats.home_bytes + stats.ring_bytes)
            if session.stats().level is not None:
                level = session.stats().level
                np.testing.assert_array_equal(y, outputs[LEVELS.index(level)][0])
            else:
                planned = plan_of(session)
                adopt(session, all_resident(costs_of(session), planned))
                np.testing.assert_array_equal(run(session, X), y)
                adopt(session, planned)
                run(session, X)
        assert resident[:2] == [full] * 2
        assert all(size <= smallest for size in resident[2:5])
        # From second 5 on there is plenty: an eighth of the whole every 10 s.
        grown = [second for second in range(5, count) if resident[second] > resident[second - 1]]
        assert grown[0] == 15 and resident[-1] == full
        assert all(size <= smallest for size in resident[5:15])
        assert resident[5:] == sorted(resident[5:])
        kinds = {event.kind for event in session.events()}
        assert kinds == {"open", "switch"} | (kinds & {"controller", "storage"})
        assert "available_bytes 127.0 MiB < 128.0 MiB" in switches(session)[0].reason
        bits = [event.bits_per_weight for event in switches(session)]
        assert bits[0] == min(bits) and bits[1:] == sorted(bits[1:]) and bits[-1] == 32
        assert len(bits) <= 9


def test_a_day_of_trouble_gives_few_switches_and_ends_where_it_began(by_hand, play, bank):
    rows = [{}] * 5
    rows += [{"available_bytes": 100 * MIB}] * 5 + [{}] * 100
    rows += [{"battery_percent": percent} for percent in range(80, 9, -2)]
    rows += [{"battery_percent": 10, "temperature_c": 80}] * 5
    rows += [{"battery_percent": 10, "on_battery": 0}] * 40
    count = play(rows)
    heard = []
    with Session(bank, controller="auto", threads=2, on_switch=heard.append) as session:
        steps(session, count, X)
        stats = session.stats()
        assert stats.level == 32 and plans_of(session).threads == 2
        assert heard == switches(session) and 4 <= len(heard) <= 14
        causes = [event.reason.split()[0] for event in heard]
        order = [cause for i, cause in enumerate(causes) if i == 0 or causes[i - 1] != cause]
        assert order[:2] == ["available_bytes", "battery_percent"]
        assert all(
            event.previous_bits_per_weight == before.bits_per_weight
            for before, event in pairwise(heard)
        )


def test_a_sensor_that_goes_is_told_once_and_its_limit_stays(by_hand, play, bank):
    rows = [{"temperature_c": 80}] * 2 + [{"temperature_c": ""}] * 30
    count = play(rows)
    with Session(bank, controller="auto", threads=2) as session:
        seen = steps(session, count, X)
        assert [entry[:2] for entry in seen] == [(0, 4)]
        told = [event.reason for event in session.events() if event.kind == "sensor"]
        assert told == ["temperature_c can no longer be read; its limits stay"]


def test_a_budget_changed_under_the_controller_holds(by_hand, play, bank):
    count = play([{}] * 3 + [{"available_bytes": 100 * MIB}] * 3 + [{}] * 100)
    with Session(bank, controller="auto", memory_budget="1GiB", level=8) as session:
        whole = bank_of(session).weight_bytes(8)
        expected = run(session, X)
        for second in range(count):
            if second == 4:
                session.set_memory_budget("512MiB")
            monitor_of(session).step()
            np.testing.assert_array_equal(run(session, X), expected)
            if second in (3, 4, 5):
                stats = settled(session)
                assert stats.home_bytes + stats.ring_bytes < whole // 4
        assert settled(session).home_bytes == whole


def test_an_automatic_budget_is_half_of_what_is_free(by_hand, play, bank):
    play([{"available_bytes": 800 * MIB}])
    with Session(bank, memory_budget="auto", level=8) as session:
        (told,) = (event.reason for event in session.events() if event.kind == "budget")
        assert told == "400.0 MiB: 50% of available_bytes 800.0 MiB"
        run(session, X)
        assert monitor_of(session) is None
    play([{"available_bytes": ""}])
    with pytest.raises(SensorError, match="give it as a size"):
        Session(bank, memory_budget="auto")


def test_without_a_controller_nothing_is_read_and_nothing_switches(play, tmp_path):
    path = chain_bank(tmp_path / "m.bank")
    (x, _) = inputs("chain")
    play([{"available_bytes": 0, "battery_percent": 1, "temperature_c": 120}])
    with Session(path, threads=2) as session:
        for _ in range(50):
            run(session, x)
        assert [event.kind for event in session.events()] == ["open"]
        assert session.stats().level == 32


def test_the_thread_switches_by_itself_and_ends_with_the_session(play, bank):
    play([{"battery_percent": 10}])
    with Session(bank, controller="auto") as session:
        deadline = time.monotonic() + 20
        while session.stats().level != 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert session.stats().level == 2
        thread = monitor_of(session)._thread
    assert not thread.is_alive()
