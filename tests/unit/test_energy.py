"""Energy: synthetic traces of every kind of meter, against their integrals by hand."""

from __future__ import annotations

import dataclasses
import math
import socket
import threading
import time

import pytest

from bapq_edge.control.device_profile import load_profile
from bapq_edge.doctor import examine
from bapq_edge.errors import InputFileError, ProfileError, SensorError
from bapq_edge.profiling import Meter
from bapq_edge.profiling.energy import EnergyTrack, estimate_energy
from bapq_edge.sensors import MockSensors, Readings, SystemSensors, open_sensors
from bapq_edge.sensors.power_feed import PowerFeed
from bapq_edge.sensors.rapl import Rapl


def power_w(time_s):
    """A board: idle at 2.5 W, a run of 4 W more every second, and a slow drift."""
    return 2.5 + 4 * (math.sin(2 * math.pi * time_s) > 0) + 0.2 * math.sin(time_s / 7)


def joules(start_s, end_s, watts=power_w, steps=200_000):
    width = (end_s - start_s) / steps
    return sum(watts(start_s + (i + 0.5) * width) for i in range(steps)) * width


# ---- the track ----


def track_of(times_s, watts=power_w):
    track = EnergyTrack()
    for time_s in times_s:
        assert track.add(Readings(0.0, power_w=watts(time_s), power_source="x"), time_s)
    return track


def test_a_track_of_powers_is_within_a_percent():
    track = track_of([i / 20 for i in range(1201)])
    piece = track.piece(0, 3.21, 57.89)
    assert piece.energy_j == pytest.approx(joules(3.21, 57.89), rel=0.01)
    assert abs(piece.energy_j - joules(3.21, 57.89)) < 10 * piece.error_j + 0.01


def test_a_gap_in_the_samples_is_bridged():
    times_s = [t / 20 for t in range(1201) if not 400 <= t < 460]  # three whole periods are lost
    piece = track_of(times_s).piece(0, 3.21, 57.89)
    assert piece.energy_j == pytest.approx(joules(3.21, 57.89), rel=0.01)


def test_a_coarse_meter_says_that_it_is():
    fine = track_of([i / 20 for i in range(400)]).piece(0, 1.0, 19.0)
    coarse = track_of([i * 0.77 for i in range(30)]).piece(0, 1.0, 19.0)
    assert coarse.error_j > 2 * fine.error_j


def test_an_answer_that_is_told_again_counts_once_for_when_it_was_measured():
    track = EnergyTrack()
    for now_s in [i / 20 for i in range(201)]:
        asked_s = now_s // 0.5 * 0.5  # the firmware is asked twice a second
        readings = Readings(0.0, power_w=asked_s, power_source="x", power_age_s=now_s - asked_s)
        track.add(readings, now_s)
    assert len(track) == 21
    assert track.piece(0, 2.0, 8.0).energy_j == pytest.approx((8**2 - 2**2) / 2, rel=1e-9)


def test_fewer_than_two_samples_tell_nothing():
    track = track_of([0.0])
    assert track.piece(0, 0.0, 1.0) is None
    assert track.piece(1, 0.5, 1.0) is None
    assert not track.add(Readings(0.0), 2.0)


# ---- counters ----


def powercap(root, zones):
    for number, (name, count, largest) in enumerate(zones):
        zone = root / "sys/class/powercap" / f"intel-rapl:{number}"
        zone.mkdir(parents=True, exist_ok=True)
        (zone / "name").write_text(f"{name}\n")
        (zone / "energy_uj").write_text(f"{count}\n")
        (zone / "max_energy_range_uj").write_text(f"{largest}\n")


def test_rapl_counts_two_packages_through_their_wraps(tmp_path):
    largest, spent = 50_000_000, [49_900_000, 10_000_000]
    powercap(tmp_path, [("package-0", spent[0], largest), ("package-1", spent[1], largest)])
    track, now_s, total_uj = EnergyTrack(), 0.0, 0
    sensors = SystemSensors(tmp_path, clock=lambda: now_s)
    track.add(sensors.read(), now_s)
    for step in range(1, 401):
        now_s = step * 0.05
        for package, watts in enumerate((35.0 + 10 * (step % 3), 12.0)):
            spent[package] += int(watts * 0.05 * 1e6)
            total_uj += int(watts * 0.05 * 1e6)
        counts = [count % largest for count in spent]  # wraps after a second or so
        powercap(tmp_path, [(f"package-{i}", count, largest) for i, count in enumerate(counts)])
        readings = sensors.read()
        track.add(readings, now_s)
    assert spent[0] > 5 * largest
    assert readings.power_source == "RAPL, 2 packages" and readings.power_scope == "CPU package"
    assert track.piece(0, 0.0, 20.0).energy_j == pytest.approx(total_uj * 1e-6, rel=1e-6)


def test_the_parts_of_a_package_are_not_added_to_it(tmp_path):
    powercap(tmp_path, [("package-0", 0, 10**9), ("core", 0, 10**9), ("psys", 0, 10**9)])
    rapl = Rapl(str(tmp_path))
    assert rapl.read(0.0).watts is None
    powercap(tmp_path, [("package-0", 5 * 10**6, 10**9), ("core", 10**6, 10**9)])
    assert rapl.read(2.0).watts == 2.5 and rapl.read(2.0).source == "RAPL, 1 package"


def test_counters_that_only_root_may_read_are_no_meter(tmp_path):
    powercap(tmp_path, [("package-0", "secret", 10**9)])
    assert SystemSensors(tmp_path).read().power_source is None


# ---- a meter of the user's ----


class Stream:
    """What a meter's program writes, and a clock."""

    def __init__(self):
        self.now_s, self.waiting = 1_764_000_000.0, b""
        self.feed = PowerFeed(self.take, lambda: None, "file x", clock=lambda: self.now_s)

    def take(self):
        waiting, self.waiting = self.waiting, b""
        return waiting

    def write(self, text):
        self.waiting += text.encode()


def test_two_rails_at_two_rates_are_added():
    stream, begin_s = Stream(), 1_764_000_000.0
    track = EnergyTrack()

    def usb_w(time_s):
        return 0.8 + 0.3 * math.sin(time_s)

    for step in range(1, 2401):  # 40 and 3 samples a second, sixty seconds long
        time_s = step / 40
        stream.now_s = begin_s + time_s
        stream.write(f"{begin_s + time_s:.4f} {power_w(time_s):.4f} board\n")
        if step % 13 == 0:
            stream.write(f"{begin_s + time_s:.4f}, {usb_w(time_s):.4f}, usb\n")
        told = stream.feed.read()
        if told is not None:
            track.add(Readings(0.0, **told.as_readings()), time_s)
    piece = track.piece(0, 5.0, 55.0)
    by_hand = joules(5.0, 55.0) + joules(5.0, 55.0, usb_w)
    assert piece.energy_j == pytest.approx(by_hand, rel=0.01)


def test_a_meter_says_what_it_is_and_how_good():
    stream = Stream()
    stream.write("# source UM25C\n# scope board and disk\n# error_percent 1.5\n# a remark\n")
    stream.write(f"{stream.now_s} 3.25\n{stream.now_s + 1}")  # the last line is not whole yet
    told = stream.feed.read()
    assert (told.watts, told.source, told.scope) == (3.25, "UM25C", "board and disk")
    assert told.error_percent == 1.5
    stream.now_s += 1
    stream.write(" 4.25\n")
    told = stream.feed.read()
    assert (told.watts, told.age_s, told.energy_j) == (4.25, 0.0, 3.75)


def test_a_line_that_is_none_and_a_silent_meter_are_not_passed_over():
    stream = Stream()
    stream.write(f"{stream.now_s} 3\nwatts: 3\n")
    assert stream.feed.read() is None
    assert stream.feed.read().watts == 3
    stream.now_s += 11
    assert stream.feed.read() is None


def test_the_environment_names_a_file(tmp_path):
    path = tmp_path / "watts"
    path.write_text("# source bench supply\n" + "1 2.0\n" * 2000 + f"{time.time()} 3.5\n")
    sensors = open_sensors(environment={"BAPQ_POWER": f"file:{path}"})
    readings = sensors.read()
    assert (readings.power_w, readings.power_source) == (3.5, "bench supply")
    assert readings.power_age_s < 5
    with open(path, "a") as file:
        file.write(f"{time.time()} 4.5\n")
    assert sensors.read().power_w == 4.5
    sensors.close()


def test_the_environment_names_a_socket(tmp_path):
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(tmp_path / "meter"))
    server.listen()
    sensors = open_sensors(environment={"BAPQ_POWER": f"socket:{tmp_path / 'meter'}"})
    with server, server.accept()[0] as connection:
        connection.sendall(f"{time.time()} 5.5\n".encode())
        assert sensors.read().power_w == 5.5
    sensors.close()


def test_a_meter_that_is_not_there_is_told(tmp_path):
    with pytest.raises(InputFileError, match="check the path"):
        open_sensors(environment={"BAPQ_POWER": f"file:{tmp_path / 'none'}"})
    with pytest.raises(SensorError, match="start the meter's program"):
        open_sensors(environment={"BAPQ_POWER": f"socket:{tmp_path / 'none'}"})
    for setting in ("watts", "file:", "tcp:1"):
        with pytest.raises(SensorError, match="file:PATH, socket:PATH"):
            open_sensors(environment={"BAPQ_POWER": setting})


# ---- windows ----


def mock(tmp_path, text, **options):
    path = tmp_path / "trace.csv"
    path.write_text(text)
    return MockSensors(path, **options)


def test_a_sleep_and_a_busy_loop_give_the_joules_by_hand(tmp_path):
    """The mock draws 2 W for half a second and 5 W from then on."""
    sensors = mock(tmp_path, "time_s,power_w,power_error_percent\n0,2,3\n0.5,5,3\n")
    with Meter(sensors=sensors, sample_hz=200) as meter:
        idle = meter.measure_idle(0.3)
        with meter.window("sleep"):
            time.sleep(0.1)
        time.sleep(0.15)  # over the step
        with meter.window("busy"):
            end_s = time.monotonic() + 0.2
            while time.monotonic() < end_s:
                pass
    slept, busy = meter.windows
    assert idle.power_w == pytest.approx(2, rel=0.001)
    assert slept.energy_j == pytest.approx(2 * slept.wall_s, rel=0.01)
    assert slept.net_energy_j == pytest.approx(0, abs=0.001)
    assert busy.energy_j == pytest.approx(5 * busy.wall_s, rel=0.01)
    assert busy.net_energy_j == pytest.approx(3 * busy.wall_s, rel=0.01)
    assert busy.energy_error_j == pytest.approx(0.03 * busy.energy_j, rel=0.05)
    assert "2.00 W idle" in str(busy)
    per_run = busy.energy_per_run(10)
    assert per_run.energy_j == pytest.approx(busy.net_energy_j / 10)
    assert "mJ a run more than idle (2.00 W, measured for 0.3 s before); mock" in str(per_run)


def test_a_mock_without_a_source_works_alike_in_doctor_and_meter(tmp_path):
    sensors = mock(tmp_path, "time_s,power_w\n0,2.5\n")
    (found,) = [each for each in examine(sensors=sensors, environment={}) if each.item == "power"]
    assert (found.state, found.found) == ("OK", "2.50 W (mock)")
    with Meter(sensors=sensors) as meter, meter.window("run"):
        time.sleep(0.02)
    assert meter.windows[0].energy_j == pytest.approx(2.5 * meter.windows[0].wall_s)
    assert meter.windows[0].power_source == "mock"


def test_a_mock_may_count_energy(tmp_path):
    rows = "".join(f"{i / 100},{3 * i / 100}\n" for i in range(200))
    sensors = mock(tmp_path, "time_s,energy_j\n" + rows)
    with Meter(sensors=sensors, sample_hz=200) as meter, meter.window("run"):
        time.sleep(0.5)
    assert meter.windows[0].energy_j == pytest.approx(3 * meter.windows[0].wall_s, rel=0.05)


class Throttled:
    """Draws 2 W; the bits change when told."""

    bits = 0

    def read(self):
        return Readings(0.0, power_w=2.0, power_source="pmic", throttled=self.bits)

    def close(self):
        pass


def test_a_throttling_bit_that_changed_voids_the_window():
    sensors = Throttled()
    with Meter(sensors=sensors) as meter:
        with meter.window("before"):
            time.sleep(0.02)
        with meter.window("changed"):
            sensors.bits = 0x50005
        with meter.window("after"):
            time.sleep(0.02)
    before, changed, after = meter.windows
    assert changed.energy_j is None and changed.void == "throttling changed: 0x0, 0x50005"
    assert changed.energy_per_run(1) is None and "throttling" in str(changed)
    assert before.energy_j and after.energy_j and after.void is None


def test_a_window_waits_for_a_meter_that_answers_late(tmp_path):
    path = tmp_path / "watts"
    path.write_text("")
    stopping = threading.Event()

    def write():
        while not stopping.wait(0.04):
            with open(path, "a") as file:
                file.write(f"{time.time() - 0.1:.4f} 3.0\n")  # it tells what was before

    thread = threading.Thread(target=write)
    thread.start()
    sensors = open_sensors(environment={"BAPQ_POWER": f"file:{path}"})
    time.sleep(0.3)
    with Meter(sensors=sensors) as meter, meter.window("run"):
        time.sleep(0.25)
    stopping.set()
    thread.join()
    assert meter.windows[0].energy_j == pytest.approx(3 * meter.windows[0].wall_s, rel=0.01)


# ---- without a meter ----


def test_an_estimate_is_one_and_says_so():
    profile = load_profile("raspberry_pi_4")
    two = estimate_energy(profile, 2, 0.1)
    assert two.energy_j == pytest.approx((profile.busy_w - profile.idle_w) / 2 * 0.1)
    assert two.error_j == pytest.approx(two.energy_j * profile.power_error_percent / 100)
    assert two.estimated and str(two).startswith("estimate: ")
    assert "raspberry_pi_4" in str(two)
    assert estimate_energy(profile, 64, 0.1).energy_j == pytest.approx(2 * two.energy_j)


def test_a_profile_without_a_power_model_gives_no_estimate(tmp_path):
    profile = dataclasses.replace(load_profile("raspberry_pi_4"), busy_w=None)
    with pytest.raises(ProfileError, match="no power model"):
        estimate_energy(profile, 1, 1.0)
