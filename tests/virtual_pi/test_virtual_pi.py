"""Whole Raspberry Pis, emulated: what a user of one would see there.

512 MB, Debian's arm64 kernel, an SD card of 40 MB/s, bapq-edge installed as the README says
(prepare.py). Every board's log is in build/virtual_pi.
"""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

import pytest

from support.documents import board_page, board_section, commands
from virtual_pi.machine import GUEST, PI_4, PI_5, ROOT, ZERO_2W, Board, Machine, Record, make_disk
from virtual_pi.prepare import MODELS, UPDATED

pytestmark = pytest.mark.pi

PYTHON = "/home/pi/bapq/bin/python"
MIB = 1 << 20

every_board = pytest.mark.parametrize("board", [ZERO_2W, PI_4, PI_5], ids=lambda board: board.name)


def run_on(
    board: Board,
    name: str,
    folder: Path,
    script: str,
    files: dict[str, Path | str],
    *,
    systemd: bool = False,
) -> list[Record]:
    """The records of a board that runs a script; `files` are on its stick, where it begins."""
    files = {**files, "run.sh": f"export HOME=/home/pi\n{script}\n", "guest": GUEST}
    stick = make_disk(folder / "stick.img", "stick", files)
    with Machine(board, stick, f"{name}_{board.name}", systemd=systemd) as machine:
        return list(machine.records())


def as_pi(command: str) -> str:
    return f"runuser -u pi -- {command}"


def test_the_walk_for_users_works_as_it_is_written(tmp_path):
    """Every command of the documents that can be given to an emulated board, under systemd."""
    blocks = commands(board_page())[1:] + commands(board_section())[1:]
    home = {
        "raspberry_pi": ROOT / "examples" / "raspberry_pi",
        "model.bank": MODELS / "digits_cnn" / "bank",
        "input.npz": MODELS / "digits_cnn" / "input.npz",
    }
    files: dict[str, Path | str] = {f"home/{name}": path for name, path in home.items()}
    files |= {f"blocks/{number:02}.sh": text for number, text in enumerate(blocks)}
    script = (GUEST / "walk.sh").read_text()
    (service, hung) = run_on(PI_4, "walk", tmp_path, script, files, systemd=True)
    assert service["NRestarts"] == "0" and service["ActiveState"] == "active"
    assert service["MemoryHigh"] == str(192 * MIB) and service["WatchdogUSec"] == "1min"
    assert hung["NRestarts"] == "1" and hung["ActiveState"] == "active"


CUTS = 3


def test_a_power_cut_leaves_the_old_bank_or_the_new(tmp_path):
    """Updates of one bank by two others in turn, cut at any moment; after each the board boots."""
    model, chance = MODELS / UPDATED, random.Random(0)
    script = f"""
        mkdir -p /mnt/card
        mount /dev/vdc /mnt/card
        {PYTHON} guest/update.py /mnt/card/model.bank updated/bank updated/update"""
    sticks = {
        installs: make_disk(
            tmp_path / f"stick{installs}.img",
            "stick",
            {"run.sh": f"{script} {installs}\n", "guest": GUEST, "updated": model},
        )
        for installs in (1, 1000)
    }
    card = make_disk(tmp_path / "card.img", "card", {}, 256)
    possible: set[str | None] = {None}
    took_s = 0.0
    for cut in range(CUTS + 1):
        stick = sticks[1000 if cut < CUTS else 1]
        with Machine(PI_4, stick, f"power_cut_{cut}", card=card) as machine:
            found = machine.next_record()
            assert found["found"] in possible and found["intact"], (found, possible)
            if cut == CUTS:
                *_, end = machine.records()
                break
            told = [{"installed": found["found"]}]
            if cut == 0:  # the first one of all in peace, and the second for the time it takes
                told += [machine.next_record() for _ in range(3)]
                started_s = time.monotonic()
                told.append(machine.next_record())
                took_s = time.monotonic() - started_s
            told.append(machine.next_record())
            time.sleep(chance.uniform(0, took_s))
            machine.cut_power()
            told += machine.told()
            # The last one that was there, and the one that was on its way.
            done = max(index for index, record in enumerate(told) if "installed" in record)
            possible = {told[done]["installed"]}
            possible |= {record["installing"] for record in told[done + 1 :]}
    assert end["installed"] and end["beside"] == []


@every_board
def test_models_are_right_at_every_level(board, tmp_path):
    script = [
        f'echo "{{\\"doctor\\": $({as_pi("/home/pi/bapq/bin/bapq doctor minilm/bank --json")} '
        '| tr -d "\\n")}"',
        as_pi(f"{PYTHON} guest/levels.py digits_cnn digits_cnn 32MiB"),
        as_pi(f"{PYTHON} guest/levels.py minilm minilm 32MiB"),
    ]
    files = {name: MODELS / name for name in ("digits_cnn", "minilm")}
    doctor, *records = run_on(board, "levels", tmp_path, "\n".join(script), files)

    found = {finding["item"]: finding for finding in doctor["doctor"]}
    assert not [finding for finding in found.values() if finding["state"] == "BAD"]
    assert found["kernels"]["found"].split(";")[0].split(",")[0] == board.kernels
    assert found["page size"]["found"] == f"{board.page_bytes / 1024:.1f} KiB"
    assert found["cores"]["found"] == f"{board.cores} usable"
    assert found["device profile"]["state"] == "OK", found["device profile"]
    assert found["memory pressure"]["state"] == "OK"

    assert [(r["model"], r["level"]) for r in records] == [
        (model, level) for model in ("digits_cnn", "minilm") for level in (32, 8, 4, 2, 1)
    ]
    for record in records:
        assert record["kernels"] == board.kernels
        assert record["resident_is_same"], record
        assert record["growth_bytes"] <= 1.05 * 32 * MIB, record
        if record["model"] == "digits_cnn":
            assert record["difference"] < 1e-5, record
        # Our layers give the same bits everywhere. A last bit in ONNX Runtime's Softmax or Erf may
        # turn the rounding of an activation in the next one, by a 127th of the row's largest.
        assert record["cosine_to_host"] > (0.9995 if record["level"] < 32 else 0.999999), record
        assert abs(record["cosine_to_float"] - record["cosine_to_float_on_host"]) < 1e-3, record


@pytest.mark.parametrize("board", [PI_5], ids=lambda board: board.name)
def test_vgg19_answers_within_96_mib(board, tmp_path):
    script = as_pi(f"{PYTHON} guest/levels.py vgg19 vgg19 96MiB")
    (record,) = run_on(board, "vgg19", tmp_path, script, {"vgg19": MODELS / "vgg19"})
    assert record["level"] == 4
    assert record["growth_bytes"] <= 1.05 * 96 * MIB, record
    assert record["read_bytes"] > 0
    assert record["cosine_to_host"] > 0.9999, record


PROFILE = """
name: emulated
description: an emulated board, in a hurry to return
model_prefix: none
cpu: cortex-a72
cores: 2
memory_mib: 512
page_bytes: 4096
storage_read_mb_s: 40
throttle_c: 80
temperature_margin_c: 5
reserve_mib: 64
pressure_percent: 10
battery_low_percent: 30
battery_critical_percent: 15
hold_s: 2
"""

ZRAM = """modprobe zram
echo 256M >/sys/block/zram0/disksize
mkswap /dev/zram0 >/dev/null
swapon --priority 100 /dev/zram0
"""


@pytest.mark.parametrize("zram", [False, True], ids=["no swap", "zram"])
def test_memory_that_another_program_eats_is_given_back_and_taken_again(zram, tmp_path):
    board = ZERO_2W if zram else PI_4
    keep_mib = 16 if zram else 40  # where nothing can be swapped, less kills
    command = f"{PYTHON} guest/pressure.py alexnet/bank alexnet/input.npz profile.yaml {keep_mib}"
    files = {"alexnet": MODELS / "bvlc_alexnet", "profile.yaml": PROFILE}
    name = f"pressure{'_zram' if zram else ''}"
    script = (ZRAM if zram else "") + as_pi(command)
    *stages, end = run_on(board, name, tmp_path, script, files)
    calm, *eaten, free = stages
    least = min(eaten, key=lambda record: record["weight_bytes"])
    assert end["eater_exit"] == 0, json.dumps(end)
    assert end["finite"]
    assert least["weight_bytes"] < 0.5 * calm["weight_bytes"], stages
    assert least["rss_bytes"] < calm["rss_bytes"] - 0.4 * calm["weight_bytes"], stages
    assert free["weight_bytes"] == calm["weight_bytes"], stages
    assert end["same_answer"], json.dumps(end)
    assert zram == any(record["swap_used_bytes"] > 0 for record in stages)


@pytest.mark.timed
def test_a_cold_card_streams_as_fast_as_it_reads_or_the_cpu_computes(tmp_path):
    """Once with more to compute, once with more to read."""
    script = "\n".join(
        f"{PYTHON} guest/streaming.py minilm/bank minilm/input.npz {length} {level} 6MiB"
        for length, level in ((64, 8), (8, 32))
    )
    records = run_on(PI_4, "streaming", tmp_path, script, {"minilm": MODELS / "minilm"})
    computing, reading = records
    assert computing["compute_s"] > computing["io_s"]
    assert reading["compute_s"] < reading["io_s"]
    for record in records:
        assert record["same_answer"]
        assert record["run_s"] <= 1.2 * max(record["compute_s"], record["io_s"]), record
