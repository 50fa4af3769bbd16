"""Device profiles: the bundled ones, their schema and sources, and what calibration writes."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest
import yaml

from bapq_edge.bank.storage import storage_class
from bapq_edge.control.device_profile import (
    DeviceProfile,
    find_profile,
    load_profile,
    profile_names,
    save_profile,
)
from bapq_edge.errors import ProfileError
from bapq_edge.profiling.calibration import calibrate
from bapq_edge.sensors import MockSensors

FOLDER = Path(__file__).resolve().parents[2] / "device_profiles"
SCHEMA = json.loads((FOLDER / "schema.json").read_text())
CHOICES = {
    "temperature_margin_c",
    "reserve_mib",
    "pressure_percent",
    "battery_low_percent",
    "battery_critical_percent",
    "hold_s",
}


def test_the_schema_has_the_keys_of_the_code():
    entries = dataclasses.fields(DeviceProfile)
    missing = dataclasses.MISSING
    needed = [e.name for e in entries if e.default is missing and e.default_factory is missing]
    assert sorted(SCHEMA["properties"]) == sorted(entry.name for entry in entries)
    assert sorted(SCHEMA["required"]) == sorted(needed)
    kinds = {"int": "integer", "str": "string", "float": "number", "Mapping[str": "object"}
    for entry in entries:
        told = SCHEMA["properties"][entry.name]
        kind = kinds[str(entry.type).split(" | ")[0].split(",")[0]]
        assert told.get("type", "string") == kind, entry.name


@pytest.mark.parametrize("name", profile_names())
def test_every_number_has_a_source(name):
    profile = load_profile(name)
    values = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
    assert profile.name == name
    numbers = {
        key for key, value in values.items() if key != "sources" and not isinstance(value, str)
    }
    assert numbers - set(profile.sources) <= CHOICES
    assert set(profile.sources) <= set(values)
    assert profile.idle_w < profile.busy_w


def test_the_boards_of_the_list_are_there():
    assert len(profile_names()) == 15
    three_b_plus = load_profile("raspberry_pi_3b_plus")
    assert (three_b_plus.soft_limit_c, three_b_plus.throttle_c) == (60, 80)
    assert load_profile("raspberry_pi_3a_plus").memory_mib == 512


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("Raspberry Pi Zero 2 W Rev 1.0", "raspberry_pi_zero_2w"),
        ("Raspberry Pi 3 Model B Rev 1.2", "raspberry_pi_3"),
        ("Raspberry Pi 3 Model B Plus Rev 1.3", "raspberry_pi_3b_plus"),
        ("Raspberry Pi 3 Model A Plus Rev 1.0", "raspberry_pi_3a_plus"),
        ("Raspberry Pi 4 Model B Rev 1.4", "raspberry_pi_4"),
        ("Raspberry Pi 400 Rev 1.0", "raspberry_pi_400"),
        ("Raspberry Pi Compute Module 4 Rev 1.0", "raspberry_pi_cm4"),
        ("Raspberry Pi 5 Model B Rev 1.0", "raspberry_pi_5"),
        ("Raspberry Pi 500 Rev 1.0", "raspberry_pi_500"),
        ("Raspberry Pi Compute Module 5 Rev 1.0", "raspberry_pi_cm5"),
        ("NVIDIA Jetson Nano Developer Kit", "jetson_nano"),
        ("NVIDIA Jetson Orin Nano Developer Kit", "jetson_orin_nano"),
    ],
)
def test_a_board_finds_its_profile(tmp_path, model, name):
    (tmp_path / "proc/device-tree").mkdir(parents=True)
    (tmp_path / "proc/device-tree/model").write_text(model + "\0")
    assert find_profile(tmp_path).name == name


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("idle_w", -1, "a positive number"),
        ("idle_w", 100, "busy_w"),
        ("soft_limit_c", "warm", "a positive integer"),
        ("storage_classes_mb_s", {"sd": 0.5}, "positive integers by name"),
        ("gmac_s", {"level_8": 0}, "positive numbers by level, such as level_8"),
        ("gmac_s", {"level_5": 1.5}, "positive numbers by level, such as level_8"),
        ("sources", ["here"], "texts by key"),
        ("colour", "red", "unknown keys"),
    ],
)
def test_a_value_that_fits_no_key_is_refused(tmp_path, key, value, said):
    values = yaml.safe_load((FOLDER / "raspberry_pi_4.yaml").read_text())
    (tmp_path / "own.yaml").write_text(yaml.safe_dump({**values, key: value}))
    with pytest.raises(ProfileError, match=said):
        load_profile(tmp_path / "own.yaml")


def test_a_file_without_the_newer_keys_still_loads(tmp_path):
    values = yaml.safe_load((FOLDER / "raspberry_pi_4.yaml").read_text())
    old = {key: values[key] for key in SCHEMA["required"]}
    (tmp_path / "old.yaml").write_text(yaml.safe_dump(old))
    profile = load_profile(tmp_path / "old.yaml")
    assert profile.busy_w is None and profile.read_mb_s(tmp_path) == 40


@pytest.mark.parametrize(
    ("place", "kind", "expected"),
    [
        ("pci0/nvme/nvme0/nvme0n1/nvme0n1p1", None, "nvme"),
        ("platform/mmc0/mmc0:0001/block/mmcblk0/mmcblk0p2", "SD", "sd"),
        ("platform/mmc0/mmc0:0001/block/mmcblk0/mmcblk0p2", "MMC", "emmc"),
        ("pci0/usb2/2-1/host0/block/sda/sda1", None, "usb"),
        ("pci0/ata1/host0/block/sda/sda1", None, "sata"),
        ("virtual/block/dm-0", None, None),
    ],
)
def test_the_class_of_the_disk_below_a_path(tmp_path, place, kind, expected):
    disk = tmp_path / "sys/devices" / place
    disk.mkdir(parents=True)
    if kind is not None:
        (disk.parent / "device").mkdir()
        (disk.parent / "device/type").write_text(kind)
    number = os.stat(tmp_path).st_dev
    (tmp_path / "sys/dev/block").mkdir(parents=True)
    (tmp_path / f"sys/dev/block/{os.major(number)}:{os.minor(number)}").symlink_to(disk)
    assert storage_class(tmp_path, str(tmp_path)) == expected


def test_calibration_writes_a_profile_that_loads(tmp_path):
    (tmp_path / "plane.bin").write_bytes(bytes(8 << 20))
    (tmp_path / "trace.csv").write_text(
        "time_s,power_w,temperature_c,throttled\n0,2,50,4\n1.99,6,70,4\n"
    )
    base = load_profile("raspberry_pi_4")
    profile = calibrate(
        tmp_path / "plane.bin",
        load_s=0.5,
        base=base,
        sensors=lambda: MockSensors(tmp_path / "trace.csv"),
    )
    save_profile(profile, tmp_path / "board.yaml")
    assert load_profile(tmp_path / "board.yaml") == profile
    measured = profile.measured
    assert profile.storage_read_mb_s == pytest.approx(
        measured["read_mb_s_256_kib"], rel=0.01, abs=1
    )
    assert {f"gmac_s_level_{level}_one_row" for level in (32, 8, 4, 2, 1)} <= set(measured)
    assert profile.products_s(8) == pytest.approx(
        measured["gmac_s_level_8_196_rows"] * 1e9, rel=0.01
    )
    assert not profile.assumes("gmac_s", "memory_mib") and profile.assumes("power_unknown")
    assert measured["load_gmac_s_at_last"] > 0 and measured["load_throttled_share"] == 1
    assert profile.idle_w == pytest.approx(2, abs=0.3) and profile.busy_w > profile.idle_w
    assert profile.throttle_c == base.throttle_c
    assert profile.sources["busy_w"] == "measured by bapq doctor --calibrate"
    assert profile.sources["throttle_c"] == base.sources["throttle_c"]
