"""The numbered examples: short, listed, and they run as their page says."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("[0-9]*"))
SAID = {
    "01_run_a_bank.py": r"level 1: 59\d of 600 right",
    "02_live_budget.py": r"12MiB: \d+ KiB of weights in memory",
    "03_battery.py": r"2 bits per weight at the end",
    "04_camera.py": r"\d in \d+\.\d\d ms",
    "05_sentences.py": r"email(.|\n)*the session took",
    "06_energy.py": r"mJ a run more than idle",
    "07_policy.py": r"59\d of 600 right, \d+ asked twice",
    "10_voice_activity.py": r"a voice from 2\.0 to (2\.9|3\.0) s\n125 frames",
}
"""What each prints at its end, as a pattern."""


def environment():
    return {**os.environ, "PYTHONPATH": str(ROOT / "tools")}


def test_they_are_short_and_listed():
    page = (ROOT / "examples" / "README.md").read_text()
    assert len(EXAMPLES) == 10
    for example in EXAMPLES:
        assert f"]({example.name})" in page
        if example.suffix == ".py":
            assert len(example.read_text().splitlines()) <= 40, example.name


@pytest.mark.slow
@pytest.mark.parametrize("name", SAID)
def test_an_example_runs(name):
    command = [sys.executable, "-W", "error", str(ROOT / "examples" / name)]
    ended = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert re.search(SAID[name], ended.stdout), ended.stdout


@pytest.mark.slow
def test_the_service_answers():
    command = [sys.executable, str(ROOT / "examples" / "08_service.py"), "18017"]
    service = subprocess.Popen(command, env=environment(), stderr=subprocess.DEVNULL)
    place = "http://127.0.0.1:18017"
    try:
        for _ in range(600):  # it may have to build its bank first
            time.sleep(0.1)
            try:
                stats = json.load(urllib.request.urlopen(f"{place}/stats"))
                break
            except urllib.error.URLError:
                assert service.poll() is None
        assert stats["stats"]["runs"] == 0
        body = np.zeros(64, np.float32).tobytes()
        answer = json.load(urllib.request.urlopen(f"{place}/classify", body))
        assert 0 <= answer["class"] <= 9
        assert json.load(urllib.request.urlopen(f"{place}/stats"))["stats"]["runs"] == 1
        metrics = urllib.request.urlopen(f"{place}/metrics").read().decode()
        assert re.search(r"^bapq_runs_total\{.*\} 1$", metrics, re.MULTILINE)
        with pytest.raises(urllib.error.HTTPError, match="64 are needed"):
            urllib.request.urlopen(f"{place}/classify", b"1234")
    finally:
        service.terminate()
        service.wait()


@pytest.mark.slow
def test_the_notebook_runs(monkeypatch, tmp_path):
    (tmp_path / "examples").mkdir()
    monkeypatch.chdir(tmp_path / "examples")  # it writes to ../build
    (path,) = (each for each in EXAMPLES if each.suffix == ".ipynb")
    notebook = json.loads(path.read_text())
    names: dict[str, object] = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
    right = [row[2] for row in names["rows"]]
    assert right[0] > 0.99
    assert (tmp_path / "build/examples/notebook.svg").is_file()
