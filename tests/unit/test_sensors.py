"""Sensors on recorded trees of boards, and the mock that plays a trace."""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path

import psutil
import pytest

from bapq_edge.control.device_profile import find_profile
from bapq_edge.errors import InputFileError, SensorError
from bapq_edge.sensors import MockSensors, Readings, SystemSensors, open_sensors

RECORDED = Path(__file__).resolve().parents[1] / "recorded"
ABSENT = {
    field.name: None for field in dataclasses.fields(Readings) if field.name not in ("time_s",)
}


class Clock:
    def __init__(self):
        self.now_s = 100.0

    def __call__(self):
        return self.now_s


def recorded_vcgencmd(tree, **other):
    """What the board's vcgencmd answers, and the list of what it was asked."""
    asked = []

    def ask(command):
        asked.append(command)
        path = RECORDED / tree / "vcgencmd" / other.get(command, command)
        return path.read_text() if path.exists() else None

    return ask, asked


def read(tree, vcgencmd=None):
    root = tree if isinstance(tree, Path) else RECORDED / tree
    return SystemSensors(root, vcgencmd=vcgencmd, clock=Clock()).read()


def copy_of(tree, tmp_path):
    return Path(shutil.copytree(RECORDED / tree, tmp_path / "root"))


# ---- boards ----


def test_pi_4_has_memory_and_temperature_and_no_power():
    readings = read("pi_4", recorded_vcgencmd("pi_4")[0])
    expected = {
        **ABSENT,
        "available_bytes": 611240 * 1024,
        "rss_bytes": 46112 * 1024,
        "temperature_c": 48.686,
        "temperature_source": "cpu-thermal",
        "throttled": 0,
        "vcgencmd_age_s": 0.0,
    }
    assert dataclasses.asdict(readings) == {"time_s": 100.0, **expected}
    assert readings.throttled_now == readings.throttled_since_boot == ()


@pytest.mark.parametrize("form", ["pmic_read_adc", "pmic_read_adc.short"])
def test_pi_5_sums_the_rails_of_its_pmic_in_both_formats(form):
    ask, _ = recorded_vcgencmd("pi_5", pmic_read_adc=form)
    readings = read("pi_5", ask)
    # volts times amperes of the 12 rails that have both; EXT5V and BATT have no current
    assert readings.power_w == pytest.approx(2.35441, abs=1e-5)
    assert readings.power_source == "pmic, 12 rails"
    assert readings.memory_pressure_percent == 1.53
    assert readings.throttled_now == ("frequency capped", "throttled")
    assert readings.throttled_since_boot == ("under-voltage", "throttled")


def test_pmic_with_a_rail_that_lacks_its_voltage_gives_no_sum():
    ask, _ = recorded_vcgencmd("pi_5")
    readings = read(
        "pi_5", lambda command: "\n".join(x for x in ask(command).splitlines() if "HDMI_V" not in x)
    )
    assert readings.power_w is None and readings.power_source is None
    assert readings.throttled == 0x50006


def test_pi_with_a_ups_hat_reads_its_ina219_and_its_gauge():
    readings = read("pi_ups_hat", recorded_vcgencmd("pi_ups_hat")[0])
    assert readings.power_w == pytest.approx(4.32)
    assert readings.power_source == "hwmon ina219"
    assert readings.battery_percent == 63
    assert readings.on_battery is None  # this gauge does not tell


def test_ina219_without_its_power_register_multiplies_current_and_voltage(tmp_path):
    root = copy_of("pi_ups_hat", tmp_path)
    (root / "sys/class/hwmon/hwmon2/power1_input").unlink()
    assert read(root).power_w == pytest.approx(0.864 * 5.0)


def test_of_two_meters_without_a_label_none_is_chosen(tmp_path):
    root = copy_of("pi_ups_hat", tmp_path)
    shutil.copytree(root / "sys/class/hwmon/hwmon2", root / "sys/class/hwmon/hwmon3")
    assert read(root).power_w is None


def test_jetson_takes_the_total_rail_and_sums_nothing():
    readings = read("jetson_orin_nano")
    assert readings.power_w == pytest.approx(6.8)
    assert readings.power_source == "hwmon ina3221 VDD_IN"
    assert (readings.temperature_c, readings.temperature_source) == (51.968, "tj-thermal")
    assert readings.memory_pressure_percent == 0.0
    assert readings.cgroup_limit_bytes is None  # "max" on every level
    assert readings.cgroup_used_bytes == 104857600 - 20971520
    assert readings.throttled is None and readings.vcgencmd_age_s is None


def test_jetson_without_its_total_rail_has_no_power(tmp_path):
    root = copy_of("jetson_orin_nano", tmp_path)
    (root / "sys/class/hwmon/hwmon4/in1_label").write_text("VDD_GPU_SOC\n")
    assert read(root).power_w is None


def test_a_meter_is_found_whatever_its_number(tmp_path):
    root = copy_of("jetson_orin_nano", tmp_path)
    hwmon = root / "sys/class/hwmon"
    (hwmon / "hwmon4").rename(hwmon / "hwmon0")
    assert read(root).power_w == pytest.approx(6.8)


def test_laptop_on_battery_and_the_mouse_does_not_count():
    readings = read("laptop")
    assert (readings.battery_percent, readings.on_battery) == (72, True)
    assert readings.power_w == pytest.approx(8.4)
    assert readings.power_source == "power_supply BAT0"
    assert (readings.temperature_c, readings.temperature_source) == (61.0, "x86_pkg_temp")


def test_laptop_battery_in_charge_units(tmp_path):
    root = copy_of("laptop", tmp_path)
    battery = root / "sys/class/power_supply/BAT0"
    for name in ("capacity", "energy_now", "energy_full", "power_now"):
        (battery / name).unlink()
    (battery / "charge_now").write_text("2000000\n")
    (battery / "charge_full").write_text("4000000\n")
    (battery / "current_now").write_text("-1000000\n")
    readings = read(root)
    assert readings.battery_percent == 50
    assert readings.power_w == pytest.approx(11.8)


def test_two_batteries_count_by_their_energy(tmp_path):
    root = copy_of("laptop", tmp_path)
    supplies = root / "sys/class/power_supply"
    shutil.copytree(supplies / "BAT0", supplies / "BAT1")
    (supplies / "BAT1/energy_now").write_text("0\n")
    (supplies / "BAT1/status").write_text("Unknown\n")
    readings = read(root)
    assert readings.battery_percent == pytest.approx(36.0)
    assert readings.on_battery is True
    (supplies / "BAT1/energy_now").unlink()
    assert read(root).battery_percent is None  # a share of an unknown whole


@pytest.mark.parametrize(
    ("status", "online", "expected"),
    [
        ("Discharging", "1", True),  # the charger is too weak
        ("Charging", "1", False),
        ("Full", "1", False),
        ("Not charging", "0", False),
        ("Unknown", "1", False),
        ("Unknown", "0", True),
        ("Unknown", None, None),
        ("Discharging", None, True),
    ],
)
def test_on_battery(tmp_path, status, online, expected):
    root = copy_of("laptop", tmp_path)
    supplies = root / "sys/class/power_supply"
    (supplies / "BAT0/status").write_text(status)
    if online is None:
        shutil.rmtree(supplies / "AC")
    else:
        (supplies / "AC/online").write_text(online)
    readings = read(root)
    assert readings.on_battery is expected
    # While it charges, what flows into the battery is not what the board draws.
    assert (readings.power_w is not None) == (status == "Discharging")


# ---- memory ----


def test_cgroup_v1_takes_the_limit_above_and_leaves_the_cache_out():
    readings = read("cgroup_v1")
    assert readings.cgroup_limit_bytes == 160 << 20
    assert readings.cgroup_used_bytes == 150994944 - 16777216


def test_cgroup_v2_takes_the_soft_limit_of_its_own():
    readings = read("cgroup_v2")
    assert readings.cgroup_limit_bytes == 117440512
    assert readings.cgroup_used_bytes == 67108864 - 8388608


def test_cgroup_v2_takes_the_slice_above_when_that_is_fuller(tmp_path):
    root = copy_of("cgroup_v2", tmp_path)
    (root / "sys/fs/cgroup/system.slice/memory.current").write_text("270000000\n")
    readings = read(root)
    assert readings.cgroup_limit_bytes == 268435456
    assert readings.cgroup_used_bytes == 260000000


@pytest.mark.parametrize("tree", ["cgroup_v1", "cgroup_v2"])
def test_in_a_container_the_mount_itself_is_the_cgroup(tmp_path, tree):
    root = copy_of(tree, tmp_path)
    mount = root / "sys/fs/cgroup" / ("memory" if tree == "cgroup_v1" else "")
    for child in mount.iterdir():
        if child.is_dir():
            shutil.rmtree(child)
    limit = "memory.limit_in_bytes" if tree == "cgroup_v1" else "memory.max"
    used = "memory.usage_in_bytes" if tree == "cgroup_v1" else "memory.current"
    (mount / limit).write_text("104857600\n")
    (mount / used).write_text("52428800\n")
    readings = read(root)
    assert (readings.cgroup_limit_bytes, readings.cgroup_used_bytes) == (100 << 20, 50 << 20)


def test_a_cgroup_outside_of_the_namespace_tells_nothing(tmp_path):
    root = copy_of("cgroup_v2", tmp_path)
    (root / "proc/self/cgroup").write_text("0::/../other\n")
    readings = read(root)
    assert (readings.cgroup_limit_bytes, readings.cgroup_used_bytes) == (None, None)


def test_pressure_that_is_there_and_fails_to_read_is_absent(tmp_path):
    root = copy_of("pi_5", tmp_path)
    path = root / "proc/pressure/memory"
    path.unlink()
    path.symlink_to("/proc/self/mem")  # opens, and reading its first page fails
    with open(path, "rb") as file, pytest.raises(OSError):
        os.read(file.fileno(), 1)
    readings = read(root)
    assert readings.memory_pressure_percent is None
    assert readings.available_bytes == 1612800 * 1024


def test_everything_absent_reads_none(tmp_path):
    assert dataclasses.asdict(read(tmp_path)) == {"time_s": 100.0, **ABSENT}
    readings = read(tmp_path, lambda command: None)
    assert dataclasses.asdict(readings) == {"time_s": 100.0, **ABSENT}


def test_malformed_files_read_none(tmp_path):
    root = copy_of("pi_ups_hat", tmp_path)
    for path in root.rglob("*"):
        if path.is_file() and path.name not in ("name", "type", "cgroup"):
            path.write_bytes(b"\xff nonsense -1 avg10=x\n")
    readings = read(root, lambda command: "\x00nonsense")
    expected = {"time_s": 100.0, **ABSENT}
    assert dataclasses.asdict(readings) == expected


def test_this_machine_agrees_with_psutil():
    with_psutil = psutil.virtual_memory()
    readings = open_sensors(environment={}).read()
    assert abs(readings.available_bytes - with_psutil.available) < 0.2 * with_psutil.total
    assert readings.rss_bytes > 10 << 20


# ---- vcgencmd ----


def test_vcgencmd_is_asked_every_few_seconds_and_its_age_is_told():
    ask, asked = recorded_vcgencmd("pi_5")
    clock = Clock()
    sensors = SystemSensors(RECORDED / "pi_5", vcgencmd=ask, clock=clock)
    ages = []
    for _ in range(11):
        ages.append(sensors.read().vcgencmd_age_s)
        clock.now_s += 1
    assert asked == ["get_throttled", "pmic_read_adc"] * 3
    assert ages == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0]


def test_vcgencmd_that_failed_is_left_alone_for_a_minute():
    clock, asked = Clock(), []
    sensors = SystemSensors(RECORDED / "pi_4", vcgencmd=asked.append, clock=clock)
    for _ in range(61):
        assert sensors.read().throttled is None
        clock.now_s += 1
    assert asked == ["get_throttled", "pmic_read_adc"] * 2


def test_hardware_that_is_plugged_in_later_is_found(tmp_path):
    clock = Clock()
    root = tmp_path / "root"
    sensors = SystemSensors(root, clock=clock)
    assert sensors.read().power_w is None
    shutil.copytree(RECORDED / "laptop", root)
    clock.now_s += 60
    assert sensors.read().power_w == pytest.approx(8.4)
    shutil.rmtree(root / "sys")
    readings = sensors.read()
    assert readings.power_w is None and readings.temperature_c is None


# ---- profiles ----


@pytest.mark.parametrize(
    ("tree", "name"),
    [
        ("pi_4", "raspberry_pi_4"),
        ("pi_5", "raspberry_pi_5"),
        ("jetson_orin_nano", "jetson_orin_nano"),
        ("laptop", None),
    ],
)
def test_the_board_finds_its_profile(tree, name):
    profile = find_profile(RECORDED / tree)
    assert (profile and profile.name) == name


# ---- mock ----


def write_trace(tmp_path, text):
    path = tmp_path / "trace.csv"
    path.write_text(text)
    return path


TRACE = """time_s,available_bytes,on_battery,battery_percent,power_source
0,1000000,0,80.5,bench
2,500000,1,,
5,250000,,20,
"""


def test_mock_plays_in_real_time_from_its_first_read(tmp_path):
    clock = Clock()
    sensors = MockSensors(write_trace(tmp_path, TRACE), clock=clock)
    clock.now_s += 50  # opened long before
    first = sensors.read()
    assert first == Readings(
        0.0, 1000000, on_battery=False, battery_percent=80.5, power_source="bench"
    )
    clock.now_s += 1.5
    assert sensors.read() == dataclasses.replace(first, time_s=1.5)
    clock.now_s += 0.5
    assert sensors.read() == Readings(2.0, 500000, on_battery=True)
    clock.now_s += 100
    assert sensors.read() == Readings(102.0, 250000, battery_percent=20.0)


def test_mock_steps_one_row_per_read_and_stays_on_the_last(tmp_path):
    path = write_trace(tmp_path, TRACE)
    sensors = open_sensors(environment={"BAPQ_SENSORS": f"mock-step:{path}"})
    assert [sensors.read().time_s for _ in range(5)] == [0, 2, 5, 5, 5]
    sensors.close()


def test_the_environment_chooses_the_mock(tmp_path):
    path = write_trace(tmp_path, TRACE)
    sensors = open_sensors(environment={"BAPQ_SENSORS": f"mock:{path}"})
    assert sensors.read().available_bytes == 1000000
    assert isinstance(open_sensors(environment={}), SystemSensors)
    for precision in ("mock", "mock:", "trace.csv", "play:trace.csv"):
        with pytest.raises(SensorError, match="BAPQ_SENSORS"):
            open_sensors(environment={"BAPQ_SENSORS": precision})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("time_s,available_bytes\n", "no rows"),
        ("available_bytes,time_s\n1,2\n", "time_s first"),
        ("time_s,time_s\n1,2\n", "each once"),
        ("time_s,ram\n1,2\n", r"unknown columns \['ram'\]"),
        ("time_s,power_w\n1,two\n", "line 2: power_w is 'two'"),
        ("time_s,power_w\n1,nan\n", "power_w is 'nan'"),
        ("time_s,power_w\n,1\n", "time_s is ''"),
        ("time_s,available_bytes\n1,1.5\n", "whole number"),
        ("time_s,available_bytes\n1,-5\n", "the least is 0"),
        ("time_s,on_battery\n1,2\n", "0 or 1"),
        ("time_s,power_w\n1,2,3\n", "3 cells, the header has 2"),
        ("time_s,power_w\n2,1\n\n1,1\n", "line 4: time_s 1 does not come after 2"),
        ("time_s,power_w\n2,1\n2,1\n", "does not come after"),
    ],
)
def test_a_malformed_trace_is_refused(tmp_path, text, message):
    with pytest.raises(SensorError, match=message):
        MockSensors(write_trace(tmp_path, text))


def test_a_trace_that_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(InputFileError, match="cannot be read: No such file"):
        MockSensors(tmp_path / "absent.csv")
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SensorError, match="cannot be read"):
        MockSensors(tmp_path / "binary.csv")
