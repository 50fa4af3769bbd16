"""The controller on scripted traces: the switches one would draw by hand, and no others."""

from __future__ import annotations

import random

import pytest

from bapq_edge.control.controller import (
    Controller,
    ControllerConfig,
    automatic_budget_bytes,
)
from bapq_edge.control.device_profile import load_profile
from bapq_edge.errors import InputFileError, RequestError, SensorError
from bapq_edge.sensors import Readings
from benchmarks import controller_trace

MIB = 1 << 20
CONFIG = ControllerConfig(reserve_bytes=100 * MIB, reserve_band_bytes=20 * MIB, hold_s=10)
LEVELS = (8, 4, 2, 1)


def controller(config=CONFIG, levels=LEVELS, budget_mib=80, **more):
    budget = None if budget_mib is None else budget_mib * MIB
    return Controller(config, levels, budget, **{"threads": 4, **more})


def play(control, trace):
    """[(time, changed part, cause)] of every switch of a trace of Readings."""
    switches = []
    for readings in trace:
        before = control.envelope
        decision = control.update(readings)
        after = decision.envelope
        assert decision.changed == (
            (before.weight_bytes_limit, before.highest_level, before.threads)
            != (after.weight_bytes_limit, after.highest_level, after.threads)
        )
        assert (decision.cause is not None) == decision.changed
        if decision.changed:
            limit = after.weight_bytes_limit
            mib = None if limit is None else limit // MIB
            switches.append((readings.time_s, mib, after.highest_level, after.threads))
    return switches


def seconds(name, values, **fixed):
    return [Readings(float(t), **{name: value}, **fixed) for t, value in enumerate(values)]


# ---- memory ----


def squeeze(control, others_mib, total_mib=300, noise_mib=0.0, seed=0):
    """Switches while another process holds so many MiB each second; the weights count too."""
    noise = random.Random(seed)
    switches = []
    for time_s, other in enumerate(others_mib):
        weights = control.envelope.weight_bytes_limit
        free = int((total_mib - other + noise.uniform(-noise_mib, noise_mib)) * MIB) - weights
        switches += play(control, [Readings(float(time_s), available_bytes=max(0, free))])
    return switches


def test_memory_that_another_process_takes_is_given_at_once_and_taken_back_by_steps():
    # 300 MiB, 80 of them weights. At 5 s another process takes 150: 70 are left, the reserve is 100
    # and its band 20, so 50 go. Freed at 20 s, 10 MiB (1/8 of 80) come back every 10 s.
    control = controller()
    switches = squeeze(control, [0] * 5 + [150] * 15 + [0] * 70)
    assert switches == [
        (5.0, 30, 8, 4),
        (30.0, 40, 8, 4),
        (40.0, 50, 8, 4),
        (50.0, 60, 8, 4),
        (60.0, 70, 8, 4),
        (70.0, 80, 8, 4),
    ]
    assert control.envelope.reasons == ()


def test_a_deeper_squeeze_is_followed_at_once():
    switches = squeeze(controller(), [0] * 3 + [120, 140, 155, 155, 155])
    # 100 left is enough; at 140 there are 80, so 40 go; then 105 are left, which is enough
    assert switches == [(4.0, 40, 8, 4)]
    # What was given shows at 4 s, and then another 25 MiB are taken.
    switches = squeeze(controller(), [0] * 3 + [140, 140, 165, 165, 165])
    assert switches == [(3.0, 40, 8, 4), (5.0, 15, 8, 4)]
    # It has not shown, but less is left than before it was given.
    switches = squeeze(controller(), [0] * 3 + [140, 205, 205, 205])
    assert switches == [(3.0, 40, 8, 4), (4.0, 15, 8, 4)]


def test_the_weight_limit_never_goes_below_its_minimum():
    control = controller(minimum_bytes=25 * MIB)
    switches = squeeze(control, [0, 290, 290, 290])
    assert switches == [(1.0, 25, 8, 4)]


def test_what_was_given_back_gets_the_hold_time_to_show():
    # The readings of a mock do not know of the weights: one drop is one switch.
    values = [200 * MIB] * 3 + [90 * MIB] * 8 + [200 * MIB] * 60
    switches = play(controller(), seconds("available_bytes", values))
    assert switches[0] == (3.0, 50, 8, 4)
    assert [switch[1] for switch in switches] == [50, 60, 70, 80]
    assert [switch[0] for switch in switches] == [3.0, 21.0, 31.0, 41.0]


def test_what_does_not_show_within_the_hold_time_is_asked_for_again():
    values = [90 * MIB] * 25
    switches = play(controller(), seconds("available_bytes", values))
    assert [(time, mib) for time, mib, _, _ in switches] == [(0.0, 50), (10.0, 20), (20.0, 0)]


def test_noise_at_the_reserve_makes_one_switch():
    # 105 +- 8 MiB are left: the first dip below the reserve of 100 gives back 20 and more, and then
    # there are over 112.
    switches = squeeze(controller(), [0] + [115] * 400, noise_mib=8, seed=3)
    assert len(switches) == 1


@pytest.mark.parametrize("other_mib", range(60, 200, 10))
def test_no_flapping_whatever_the_squeeze(other_mib):
    # After giving back for the squeeze nothing moves any more, in spite of noise within the band.
    switches = squeeze(controller(), [0] * 5 + [other_mib] * 300, noise_mib=9, seed=other_mib)
    assert len(switches) <= 2
    limits = [switch[1] for switch in switches]
    assert limits == sorted(limits, reverse=True)


def test_without_a_budget_the_weights_in_memory_are_what_shrinks():
    control = controller(budget_mib=None)
    assert (
        control.update(Readings(0.0, available_bytes=200 * MIB)).envelope.weight_bytes_limit is None
    )
    tight = Readings(1.0, available_bytes=70 * MIB)
    assert not control.update(tight).changed  # nobody said how much there is to give
    decision = control.update(tight, weight_bytes=80 * MIB)
    assert decision.envelope.weight_bytes_limit == 30 * MIB
    for time_s in range(2, 80):
        decision = control.update(Readings(float(time_s), available_bytes=200 * MIB))
    assert decision.envelope.weight_bytes_limit is None


def test_a_limit_far_above_the_weights_in_memory_bites_at_once():
    control = controller()
    decision = control.update(Readings(0.0, available_bytes=90 * MIB), weight_bytes=40 * MIB)
    assert decision.envelope.weight_bytes_limit == 10 * MIB


def test_a_cgroup_keeps_a_reserve_in_proportion():
    # 160 MiB: reserve 16, band 3.2. 10 free: 6 and 3.2 go.
    readings = Readings(
        0.0,
        available_bytes=4000 * MIB,
        cgroup_limit_bytes=160 * MIB,
        cgroup_used_bytes=150 * MIB,
    )
    decision = controller().update(readings)
    assert decision.envelope.weight_bytes_limit == pytest.approx((80 - 9.2) * MIB, abs=2)
    assert decision.cause == "free in cgroup 10.0 MiB < 16.0 MiB"
    assert decision.envelope.reasons == (decision.cause,)


def test_a_cgroup_limit_that_is_lifted_lets_the_weights_return():
    control = controller()
    tight = {"cgroup_limit_bytes": 160 * MIB, "cgroup_used_bytes": 150 * MIB}
    play(control, [Readings(0.0, available_bytes=4000 * MIB, **tight)])
    free = {"available_bytes": 4000 * MIB, "cgroup_used_bytes": 140 * MIB}
    play(control, [Readings(float(t), **free) for t in range(1, 40)])
    assert control.envelope.weight_bytes_limit == 80 * MIB


def test_pressure_takes_one_step_per_hold_time():
    values = [0.0, 12.0, 15.0] + [9.0] * 5 + [20.0] * 12 + [7.0] * 15 + [2.0] * 25
    trace = seconds("memory_pressure_percent", values, available_bytes=500 * MIB)
    assert [(time, mib) for time, mib, _, _ in play(controller(), trace)] == [
        (1.0, 70),
        (11.0, 60),
        (45.0, 70),  # 7 % is not yet good; 2 % is, from 35 s on
        (55.0, 80),
    ]


# ---- battery ----


def test_battery_from_80_to_10_percent_and_charging():
    falling = [Readings(float(t), battery_percent=80.0 - t, on_battery=True) for t in range(71)]
    charging = [
        Readings(70.0 + t, battery_percent=10.0 + t / 10, on_battery=False) for t in range(1, 40)
    ]
    control = controller()
    assert play(control, falling) == [(51.0, 80, 4, 4), (66.0, 80, 2, 4)]
    assert control.envelope.reasons == ("battery_percent 14 < 15",)
    assert play(control, charging) == [(81.0, 80, 4, 4), (91.0, 80, 8, 4)]
    assert control.envelope.reasons == ()


def test_battery_that_falls_through_both_thresholds_sheds_both_at_once():
    decision = controller().update(Readings(0.0, battery_percent=5.0, on_battery=True))
    assert decision.envelope.highest_level == 2
    assert decision.cause == "battery_percent 5 < 15"


def test_battery_without_a_charger_state_returns_past_the_band():
    values = [29.0] + [34.0] * 30 + [35.0] * 9 + [34.9] + [35.0] * 12
    switches = play(controller(), seconds("battery_percent", values))
    assert switches == [(0.0, 80, 4, 4), (51.0, 80, 8, 4)]


@pytest.mark.parametrize("threshold", [15, 30])
def test_noise_at_a_battery_threshold_makes_one_switch(threshold):
    noise = random.Random(threshold)
    start = [threshold + 10.0] * 3
    values = start + [threshold + noise.uniform(-2.4, 2.4) for _ in range(500)]
    switches = play(controller(), seconds("battery_percent", values, on_battery=True))
    assert len(switches) == (1 if threshold == 30 else 2)  # 25 % is already below the first


def test_a_plug_that_bounces_makes_no_switch():
    trace = [Readings(float(t), battery_percent=20.0, on_battery=t % 4 != 0) for t in range(1, 100)]
    assert play(controller(), trace) == [(1.0, 80, 4, 4)]


# ---- temperature ----


def test_temperature_over_the_limit_and_back():
    values = [60, 70, 74.9, 75, 78, 82, 76, 74, 71] + [69] * 11 + [68]
    control = controller()
    assert play(control, seconds("temperature_c", [float(x) for x in values])) == [
        (3.0, 80, 4, 2),
        (19.0, 80, 8, 4),  # below 70 from 9 s on
    ]


def test_noise_at_the_temperature_limit_makes_one_switch():
    noise = random.Random(1)
    values = [75 + noise.uniform(-4.5, 4.5) for _ in range(500)]
    assert len(play(controller(), seconds("temperature_c", values))) == 1


def test_the_firmware_throttling_counts_as_heat():
    since_boot = 0x50000
    trace = [
        Readings(float(t), temperature_c=60.0, throttled=since_boot | (6 if 2 <= t < 5 else 0))
        for t in range(20)
    ]
    control = controller()
    assert play(control, trace) == [(2.0, 80, 4, 2), (15.0, 80, 8, 4)]
    decision = control.update(Readings(30.0, temperature_c=60.0, throttled=0x4))
    assert decision.cause == "throttled: throttled"


def test_the_firmware_is_enough_without_a_thermometer():
    trace = [Readings(float(t), throttled=2 if t == 1 else 0) for t in range(20)]
    assert play(controller(), trace) == [(1.0, 80, 4, 2), (12.0, 80, 8, 4)]


# ---- together ----


def test_the_lowest_cap_holds_and_each_returns_by_itself():
    control = controller()
    hot_and_empty = Readings(0.0, temperature_c=80.0, battery_percent=10.0, on_battery=True)
    envelope = control.update(hot_and_empty).envelope
    assert (envelope.highest_level, envelope.threads) == (2, 2)
    assert envelope.reasons == ("temperature_c 80.0 >= 75", "battery_percent 10 < 15")
    cool = [Readings(float(t), temperature_c=50.0, battery_percent=9.0, on_battery=True)
            for t in range(1, 30)]  # fmt: skip
    assert play(control, cool) == [(11.0, 80, 2, 4)]
    assert control.envelope.reasons == ("battery_percent 10 < 15",)


@pytest.mark.parametrize(
    ("levels", "expected"), [((8,), 8), ((32, 8), 8), ((8, 2), 2), ((1, 4, 8, 32), 4)]
)
def test_a_cap_takes_the_nearest_level_that_the_bank_holds(levels, expected):
    decision = controller(levels=levels).update(Readings(0.0, battery_percent=20.0))
    assert decision.envelope.highest_level == expected
    assert decision.changed == (expected != max(levels))


def test_one_thread_stays_one_thread():
    decision = controller(threads=1).update(Readings(0.0, temperature_c=90.0))
    assert decision.envelope.threads == 1


# ---- absent readings ----


def test_nothing_to_read_changes_nothing():
    control = controller()
    for time_s in range(50):
        decision = control.update(Readings(float(time_s)))
        assert not decision.changed and decision.lost == ()
    assert decision.envelope.weight_bytes_limit == 80 * MIB
    assert (decision.envelope.highest_level, decision.envelope.threads) == (8, 4)


@pytest.mark.parametrize(
    ("bad", "good"),
    [
        ({"available_bytes": 50 * MIB}, {"available_bytes": 500 * MIB}),
        ({"temperature_c": 90.0}, {"temperature_c": 20.0}),
        ({"throttled": 4}, {"throttled": 0}),
        ({"battery_percent": 5.0}, {"battery_percent": 90.0}),
        ({"battery_percent": 5.0, "on_battery": True}, {"battery_percent": 90.0}),
    ],
)
def test_a_reading_that_disappears_keeps_the_envelope_and_says_so_once(bad, good):
    control = controller()
    assert control.update(Readings(0.0, **bad)).changed
    told = []
    for time_s in range(1, 100):
        decision = control.update(Readings(float(time_s)))
        assert not decision.changed
        told += [(time_s, name) for name in decision.lost]
    assert told == [(1, name) for name in told_order(bad)]
    if len(bad) == len(good):
        switches = play(control, [Readings(100.0 + t, **good) for t in range(60)])
        assert switches and switches[0][0] == 110.0  # time unseen is not time on the good side
        assert control.envelope.reasons == () or "available" in control.envelope.reasons[0]
        assert control.update(Readings(161.0)).lost == told_order(bad)


def told_order(bad):
    return tuple(bad)


def test_memory_does_not_return_while_one_of_its_readings_is_missing():
    control = controller()
    readings = {"available_bytes": 50 * MIB, "memory_pressure_percent": 0.0}
    assert control.update(Readings(0.0, **readings)).changed
    only = [Readings(float(t), memory_pressure_percent=0.0) for t in range(1, 60)]
    assert play(control, only) == []


def test_a_reading_that_flickers_is_told_once():
    control = controller()
    told = []
    for time_s in range(100):
        celsius = 50.0 if time_s % 3 else None
        told += control.update(Readings(float(time_s), temperature_c=celsius)).lost
    assert told == ["temperature_c"]


# ---- budget ----


def test_a_new_budget_holds_at_once_unless_memory_is_tight():
    control = controller()
    assert control.set_budget(40 * MIB).weight_bytes_limit == 40 * MIB
    assert control.set_budget(120 * MIB).weight_bytes_limit == 120 * MIB
    control.update(Readings(0.0, available_bytes=80 * MIB))
    assert control.envelope.weight_bytes_limit == 80 * MIB
    assert control.set_budget(200 * MIB).weight_bytes_limit == 80 * MIB
    envelope = control.set_budget(60 * MIB)
    assert envelope.weight_bytes_limit == 60 * MIB and envelope.reasons == ()


def test_automatic_budget_takes_the_tighter_of_system_and_cgroup():
    readings = Readings(0.0, available_bytes=400 * MIB)
    assert automatic_budget_bytes(readings) == (200 * MIB, "50% of available_bytes 400.0 MiB")
    in_cgroup = Readings(
        0.0, available_bytes=400 * MIB, cgroup_limit_bytes=160 * MIB, cgroup_used_bytes=60 * MIB
    )
    budget, reason = automatic_budget_bytes(in_cgroup, share=0.25)
    assert (budget, reason) == (25 * MIB, "25% of free in cgroup 100.0 MiB")
    full = Readings(0.0, cgroup_limit_bytes=1 * MIB, cgroup_used_bytes=2 * MIB)
    assert automatic_budget_bytes(full)[0] == 0
    with pytest.raises(SensorError, match="give it as a size"):
        automatic_budget_bytes(Readings(0.0, battery_percent=50.0))


# ---- the picture in docs/explanation/controller.md ----


def test_the_scripted_trace_makes_the_switches_that_the_docs_show(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["controller_trace", "-o", str(tmp_path / "trace.svg")])
    assert controller_trace.main() == 0
    lines = capsys.readouterr().out.splitlines()
    switches = [
        (line.split("level <= ")[1][0], line.split("(")[1].split()[0]) for line in lines[:-1]
    ]
    assert switches == [
        *[("8", "available_bytes")] * 8,
        ("4", "temperature_c"),
        ("8", "temperature_c"),
        ("4", "battery_percent"),
        ("2", "battery_percent"),
        ("4", "on_battery"),
        ("8", "on_battery"),
    ]
    assert (tmp_path / "trace.svg").stat().st_size < 100_000


def test_a_mock_trace_is_drawn_as_the_mock_would_play_it(tmp_path, capsys, monkeypatch):
    path = tmp_path / "trace.csv"
    path.write_text("time_s,temperature_c\n0,50\n10,80\n20,50\n60,50\n")
    out = tmp_path / "trace.svg"
    monkeypatch.setattr("sys.argv", ["controller_trace", "--trace", str(path), "-o", str(out)])
    assert controller_trace.main() == 0
    times = [line.split(" s ")[0].strip() for line in capsys.readouterr().out.splitlines()[:-1]]
    assert times == ["10", "30"]
    monkeypatch.setattr("sys.argv", ["controller_trace", "--trace", str(tmp_path / "none.csv")])
    assert controller_trace.main() == InputFileError.exit_code


# ---- configuration ----


def test_the_profile_sets_the_thresholds():
    profile = load_profile("raspberry_pi_4")
    config = ControllerConfig.from_profile(profile)
    assert config.temperature_limit_c == profile.throttle_c - profile.temperature_margin_c == 75
    assert config.reserve_bytes == 96 * MIB
    assert config.reserve_band_bytes == 48 * MIB
    assert (config.battery_low_percent, config.battery_critical_percent) == (30, 15)


@pytest.mark.parametrize(
    "change",
    [
        {"hold_s": -1},
        {"memory_steps": 0},
        {"period_s": 0},
        {"reserve_bytes": float("nan")},
        {"pressure_percent": "ten"},
        {"battery_critical_percent": 40},
    ],
)
def test_thresholds_that_make_no_rule_are_refused(change):
    with pytest.raises(RequestError, match=next(iter(change))):
        ControllerConfig(**change)


def test_a_controller_needs_levels():
    with pytest.raises(RequestError, match="levels"):
        controller(levels=())
