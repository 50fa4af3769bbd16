"""The doctor on recorded trees of boards: what it finds, and the fix it names."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from bapq_edge.doctor import examine
from bapq_edge.sensors import Readings
from support.banks import NO_CLIP, graph_bytes, node, random_codes, write_bank

RECORDED = Path(__file__).resolve().parents[1] / "recorded"


class Told:
    def __init__(self, **values):
        self.readings = Readings(0.0, **values)

    def read(self):
        return self.readings

    def close(self):
        pass


def findings(tree, bank=None, **values):
    sensors = Told(**values) if values else None
    root = tree if isinstance(tree, Path) else RECORDED / tree
    return {finding.item: finding for finding in examine(bank, root, {}, sensors)}


def test_a_pi_4_gets_the_kernel_options_that_it_lacks():
    found = findings("pi_4")
    assert "psi=1" in found["memory pressure"].fix
    assert "/boot/firmware/cmdline.txt" in found["memory pressure"].fix
    assert "cgroup_enable=memory" in found["cgroup limit"].fix
    assert found["throttling"].state == "note" and "video" in found["throttling"].fix
    assert found["power"].state == "note"
    assert found["device profile"].found.startswith("raspberry_pi_4 ")
    assert "48.7" in found["temperature"].found and found["temperature"].fix == ""
    assert not [item for item, finding in found.items() if finding.state == "BAD"]


def test_other_boards_are_not_sent_to_a_pi_s_files():
    found = findings("laptop")
    assert "psi=1" in found["memory pressure"].fix and "/boot" not in found["memory pressure"].fix
    assert found["throttling"].state == found["power"].state == "OK"
    jetson = findings("jetson_orin_nano")
    assert "VDD_IN" in jetson["power"].found and jetson["memory pressure"].state == "OK"
    assert "112.0 MiB" in findings("cgroup_v2")["cgroup limit"].found


def test_throttling_names_its_cause():
    weak = findings("pi_5", throttled=0x10001)["throttling"]
    assert weak.state == "note" and "supply" in weak.fix and "fan" not in weak.fix
    hot = findings("pi_5", throttled=0x80000)["throttling"]
    assert "since boot: soft temperature limit" in hot.found and "fan" in hot.fix
    assert findings("pi_5", throttled=0)["throttling"].state == "OK"


@pytest.mark.parametrize(
    ("swaps", "state", "part"),
    [
        ("/dev/zram0 partition 1000 0 100\n", "OK", "compressed"),
        ("/var/swap file 1000 0 -2\n", "note", "/var/swap"),
        ("", "OK", "none"),
    ],
)
def test_swap_on_a_card_is_noted_and_zram_is_not(tmp_path, swaps, state, part):
    root = Path(shutil.copytree(RECORDED / "pi_4", tmp_path / "root"))
    (root / "proc" / "swaps").write_text(f"Filename Type Size Used Priority\n{swaps}")
    swap = findings(root)["swap"]
    assert swap.state == state and part in swap.found
    assert ("swapoff" in swap.fix) == (state == "note")


def test_a_precision_for_sensors_that_cannot_be_is_said():
    found = {f.item: f for f in examine(environment={"BAPQ_SENSORS": "mock"})}
    assert found["sensors"].state == "note" and "unset BAPQ_SENSORS" in found["sensors"].fix


def test_a_bank_that_is_absent_broken_or_incomplete(tmp_path):
    assert findings("pi_4", tmp_path / "no.bank")["bank"].state == "BAD"
    scale_columns = {4: 32, 2: 64, 1: 128}
    codes = random_codes(np.random.default_rng(0), 64, 96, scale_columns, True)
    free = {"use_bias": 1, "clip_low": -NO_CLIP, "clip_high": NO_CLIP}
    graph = graph_bytes([node("Gemm", "x", "y", layer=0, **free)], ["n", 96], ["n", 64])
    description = {
        "rows": 64,
        "columns": 96,
        "chunk_rows": 32,
        "residual_steps": 15,
        "scale_columns": scale_columns,
        "has_bias": True,
    }
    layers = [("dense", "Gemm", codes, description)]
    bank = write_bank(tmp_path / "a.bank", graph, layers)
    found = findings("pi_4", bank)
    assert found["bank"].state == "OK" and "32, 8, 4, 2, 1" in found["bank"].found
    assert found["direct reads"].state in ("OK", "note") and "MB/s" in found["read speed"].found
    aside = bank.rename(tmp_path / "a.bank.bapq-replaced")
    assert "was cut off" in findings("pi_4", bank)["bank"].found
    assert findings("pi_4", bank)["bank"].fix == "install the new bank again"
    aside.rename(bank)
    (bank / "planes" / "r8.bin").unlink()
    assert "r8" in findings("pi_4", bank)["bank"].found
    (bank / "manifest.json").write_text("{}")
    assert findings("pi_4", bank)["bank"].state == "BAD"


def test_a_board_that_is_less_than_its_profile_says_is_noted(monkeypatch):
    monkeypatch.setattr("bapq_edge.doctor.kernels_name", lambda: "scalar")
    found = findings("pi_4", temperature_c=50.0)["kernels"]
    assert found.state == "note" and found.found == "scalar, the board's profile says neon"
    monkeypatch.setattr("bapq_edge.doctor.kernels_name", lambda: "neon")
    assert findings("pi_4", temperature_c=50.0)["kernels"].state == "OK"


def test_the_soft_limit_of_a_3b_plus_is_noted(tmp_path):
    model = tmp_path / "proc/device-tree/model"
    model.parent.mkdir(parents=True)
    model.write_text("Raspberry Pi 3 Model B Plus Rev 1.3\0")
    warm = findings(tmp_path, temperature_c=61.0, temperature_source="cpu-thermal")["temperature"]
    assert warm.state == "note" and "from 60 °C on this board lowers its clock" in warm.found
    cool = findings(tmp_path, temperature_c=59.0, temperature_source="cpu-thermal")["temperature"]
    assert cool.state == "OK"


def test_a_meter_is_told_with_its_scope_and_error():
    told = {"power_w": 2.5, "power_source": "hwmon ina219", "power_scope": "where the meter sits"}
    power = findings("pi_4", **told, power_error_percent=2.0)["power"]
    assert power.found == "2.50 W (hwmon ina219), measures: where the meter sits, ±2 %"
