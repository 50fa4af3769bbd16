"""profile_memory.py and profile_energy.py: commands, callables, banks and models in one table."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"
MIB = 1 << 20
WORK = """
import mmap, time

def large():
    pages = mmap.mmap(-1, 96 << 20)
    for page in range(0, 96 << 20, 4096):
        pages[page] = 1
    pages.close()

def busy():
    end_s = time.monotonic() + 0.2
    while time.monotonic() < end_s:
        pass
"""


def script(name, *arguments, folder, code=0, **environment):
    command = [sys.executable, str(TOOLS / name), *map(str, arguments)]
    ended = subprocess.run(
        command,
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )
    assert ended.returncode == code, ended.stderr
    return ended.stdout, ended.stderr


@pytest.fixture
def work(tmp_path):
    (tmp_path / "work.py").write_text(WORK)
    return tmp_path


def test_peak_memory_of_every_kind_in_one_table(work, made):
    small = f"{sys.executable} -S -c pass"
    large = f"{sys.executable} -c 'import work; work.large()'"
    script(
        *("profile_memory.py", "-r", 2, "-o", "t.csv", "--input", made / "one.npz"),
        *("--command", f"small={small}", "--command", f"large={large}"),
        *("--callable", "ours=work:large", "--bank", f"{made / 'one.bank'}@8"),
        *("--onnx", f"ort={made / 'one.onnx'}"),
        folder=work,
    )
    with open(work / "t.csv") as file:
        rows = {row["name"]: row for row in csv.DictReader(file)}
    assert [*rows] == ["small", "large", "ours", "one.bank@8", "ort"]
    grown = int(rows["large"]["peak_bytes"]) - int(rows["small"]["peak_bytes"])
    assert 94 * MIB <= grown < 104 * MIB  # one that is small is told as small as can be measured
    assert 95 * MIB <= int(rows["ours"]["growth_bytes"]) < 97 * MIB
    assert 0 < int(rows["ort"]["growth_bytes"]) < int(rows["ort"]["peak_bytes"])
    assert rows["large"]["bound"] == "0"


def test_energy_of_a_command_and_a_callable(work):
    (work / "trace.csv").write_text("time_s,power_w\n0,2\n1.9,5\n")
    mock = {"BAPQ_SENSORS": "mock:trace.csv"}
    out, _ = script(
        *("profile_energy.py", "-r", 2, "--callable", "ours=work:busy", "-o", "t.json"),
        folder=work,
        **mock,
    )
    assert out == ""
    (row,) = json.loads((work / "t.json").read_text())
    # The idle seconds see the step as well: what counts is that the sum is that of the trace.
    assert row["meter"] == "mock" and 2 <= row["idle_w"] < 5
    expected = (5 - row["idle_w"]) * row["run_ms"] / 1e3
    assert row["energy_j"] == pytest.approx(expected, rel=0.02)
    out, _ = script("profile_energy.py", "-r", 1, "--command", "true", folder=work, **mock)
    assert out.startswith("| name | kind |") and "mock" in out


def test_errors_are_one_line(work):
    for arguments, code, said in [
        (("profile_energy.py", "--command", "true"), 48, "no power meter"),
        (("profile_memory.py",), 40, "nothing to profile"),
        (("profile_memory.py", "--command", "false"), 46, "ended with 1"),
        (("profile_memory.py", "--command", "no-such-program"), 46, "cannot be started"),
        (("profile_memory.py", "--callable", "work:none"), 40, "module:function"),
    ]:
        _, err = script(*arguments, folder=work, code=code)
        assert said in err and err.count("\n") == 1
