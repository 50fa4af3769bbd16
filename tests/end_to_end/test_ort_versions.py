"""The wheel on the oldest ONNX Runtime that pyproject.toml admits, as a device has it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

import bapq_tools
from benchmarks.zoo.digits import calibration_npz, digits_cnn_path, load_digits_split


def oldest_python() -> str:
    python = os.environ.get("BAPQ_OLDEST_PYTHON")
    if not python:
        pytest.fail("BAPQ_OLDEST_PYTHON is not set: run the tests with `make test`")
    return str(Path(python).absolute())


def test_oldest_and_newest_onnxruntime_give_the_same_outputs(tmp_path):
    calibration_npz(tmp_path / "calibration.npz", "cnn")
    bank = bapq_tools.build_bank(
        digits_cnn_path(),
        tmp_path / "digits.bank",
        calibration=tmp_path / "calibration.npz",
        levels=(32, 8, 4, 2, 1),
        progress=False,
    )
    np.savez(tmp_path / "input.npz", image=load_digits_split().x_test[:64])
    versions, outputs = [], []
    for python in (sys.executable, oldest_python()):
        target = tmp_path / f"output{len(versions)}.npz"
        command = [python, "-I", Path(__file__).with_name("run_bank.py")]
        result = subprocess.run(
            [*command, bank, tmp_path / "input.npz", target],
            check=True,
            stdout=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
        )
        versions.append(result.stdout.split()[0])
        with np.load(target) as arrays:
            outputs.append({name: arrays[name] for name in arrays.files})
    assert versions[0] == onnxruntime.__version__
    assert versions[1] != versions[0]
    for name, value in outputs[0].items():
        # The layers are ours and give the same bits; pooling and adds are each version's own.
        np.testing.assert_allclose(value, outputs[1][name], rtol=1e-4, atol=1e-4)
