"""The report's experiments, run as scripts with the report's own flags."""

from __future__ import annotations

import csv
import hashlib
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.zoo.digits import digits_mlp_path

SCRIPTS = Path(__file__).resolve().parents[2] / "tools" / "experiments"


def script(name, *arguments, folder, code=0):
    """Run a script as a user does; (stdout, stderr)."""
    command = [sys.executable, str(SCRIPTS / name), *map(str, arguments)]
    ended = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert ended.returncode == code, ended.stderr
    return ended.stdout, ended.stderr


def rows_of(path):
    with open(path) as file:
        return list(csv.DictReader(file))


def test_pruning_a_synthetic_mlp(tmp_path):
    script("run_boundary_pruning_synthetic.py", "--runs", 2, "--output", "r.csv", folder=tmp_path)
    rows = rows_of(tmp_path / "r.csv")
    assert [*rows[0]][:4] == ["run", "time_s", "peak_mem_mb", "param_ratio"]
    assert [row["run"] for row in rows] == ["1", "2"]
    for row in rows:
        assert abs(float(row["param_ratio"]) - 0.8) < 0.005
        assert float(row["peak_mem_mb"]) > 2.1  # the weights alone, in float32
    assert (tmp_path / "r_summary.csv").is_file()
    assert "<svg" in (tmp_path / "r.svg").read_text()


def test_pruning_a_cnn_on_digits(tmp_path):
    arguments = [
        "--dataset",
        "digits",
        "--threshold",
        0.2,
        "--batch-size",
        64,
        "--runs",
        1,
        "--epochs",
        3,
    ]
    output = "real_pruning_results.csv"
    script("run_boundary_pruning_cnn.py", *arguments, "--output", output, folder=tmp_path)
    (row,) = rows_of(tmp_path / output)
    assert float(row["accuracy_float"]) > 0.8
    assert 0.2 < float(row["param_ratio"]) < 0.7


def test_pruning_a_cnn_on_cifar10(tmp_path):
    data = tmp_path / "cifar-10-batches-py"
    data.mkdir()
    for number, name in enumerate(("data_batch_1", "test_batch")):
        random = np.random.default_rng(number)
        pixels = random.integers(0, 256, (20, 3072)).astype(np.uint8)
        batch = {b"data": pixels, b"labels": [i % 10 for i in range(20)]}
        (data / name).write_bytes(pickle.dumps(batch, protocol=2))
    sums = [f"{hashlib.md5(p.read_bytes()).hexdigest()}  {p.name}\n" for p in data.iterdir()]
    (tmp_path / "sums").write_text("".join(sums))
    arguments = ["--dataset", "cifar10", "--threshold", 0.2, "--batch-size", 16, "--runs", 1]
    arguments += ["--epochs", 1, "--data-dir", tmp_path]
    own = ["--checksums", "sums"]
    script("run_boundary_pruning_cnn.py", *arguments, *own, folder=tmp_path)
    (row,) = rows_of(tmp_path / "real_pruning_results.csv")
    assert 0 <= float(row["accuracy"]) <= 1
    # They are not the published ones, and that is said in one line.
    _, said = script("run_boundary_pruning_cnn.py", *arguments, folder=tmp_path, code=51)
    assert "published is c99cafc152244af753f735de768cd75f" in said
    assert len(said.splitlines()) == 1


def test_cifar10_without_its_files_says_where_to_get_them(tmp_path):
    arguments = ["--dataset", "cifar10", "--data-dir", "nowhere"]
    for name in ("run_boundary_pruning_cnn.py", "run_quantization_switching_cnn.py"):
        _, said = script(name, *arguments, folder=tmp_path, code=51)
        assert "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz" in said


def test_switching_between_the_levels_of_a_cnn(tmp_path):
    script("run_quantization_switching_cnn.py", "--runs", 1, "--output", "q.csv", folder=tmp_path)
    rows = {row["level"]: row for row in rows_of(tmp_path / "q.csv")}
    assert [*rows] == ["float32", "8", "4", "2", "1"]
    assert all(float(row["accuracy"]) > 0.98 for row in rows.values())
    resident = [int(rows[level]["resident_bytes"]) for level in ("8", "4", "2", "1")]
    assert resident == sorted(resident, reverse=True)
    switches = {(row["levels"], row["way"]): row for row in rows_of(tmp_path / "q_switches.csv")}
    # Level 4 is a part of level 8: down reads nothing, up reads the rest only.
    assert switches["8:4", "down"]["read_bytes"] == "0"
    up = int(switches["8:4", "up"]["read_bytes"])
    assert up == resident[0] - resident[1]
    trace = rows_of(tmp_path / "q_trace.csv")
    assert len(trace) == 7
    for row in trace:
        assert int(row["resident_bytes"]) <= int(row["budget_bytes"])


@pytest.mark.slow
def test_switching_between_the_levels_of_a_synthetic_mlp(tmp_path):
    name = "run_quantization_switching_synthetic.py"
    script(name, "--runs", 1, "--output", "q.csv", folder=tmp_path)
    accuracy = [float(row["accuracy"]) for row in rows_of(tmp_path / "q.csv")]
    assert accuracy[0] == 1
    assert accuracy[1] > 0.9 > accuracy[-1]


def test_samples_that_do_not_fit_the_model_are_refused(tmp_path):
    np.savez(tmp_path / "other.npz", other=np.zeros(4))
    arguments = ["--model", digits_mlp_path(), "--samples", "other.npz"]
    _, said = script("run_quantization_switching_cnn.py", *arguments, folder=tmp_path, code=40)
    assert "pixels" in said
