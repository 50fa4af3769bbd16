"""The aarch64 wheel on the CPUs of a Raspberry Pi Zero 2 W, 4 and 5, each emulated.

qemu-user runs an arm64 Debian with our wheel (make_arm64.sh), on a named CPU: an instruction that
the board does not have is an illegal one there too. Times and memory are qemu's own: neither is
looked at here.
"""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
ARM64 = ROOT / ".cache" / "arm64"
PYTHON = Path(__file__).with_name("arm_python.sh")
FAMILIES = {"cortex-a53": "neon", "cortex-a72": "neon", "cortex-a76": "neondot"}

SUITE = (
    "kernels",
    "golden",
    "end_to_end/test_session.py",
    "end_to_end/test_operators.py",
    "end_to_end/test_depthwise.py",
    "end_to_end/test_rows.py",
    "end_to_end/test_streaming.py",
    "end_to_end/test_memory.py",
    "end_to_end/test_controller_session.py",
)
"""the project's own tests that need no host package"""
MEMORY = (
    "closing_gives or grows_by_no_more or leave_no_memory or takes_no_memory or earlier_peak "
    "or digits"
)
"""but those that look at the process's memory, which is qemu's here; digits need scikit-learn"""

pytestmark = pytest.mark.arm


@pytest.fixture(params=FAMILIES)
def cpu(request, monkeypatch):
    monkeypatch.setenv("BAPQ_ARM_CPU", request.param)
    return request.param


@pytest.fixture(params=["newest", "oldest"])
def onnxruntime(request, monkeypatch):
    folders = [ARM64 / name for name in ("bapq", f"ort-{request.param}", "test")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, folders)))
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    return request.param


def sh(*command, cwd):
    """What it prints. An own working directory keeps the project's sources out of sys.path."""
    result = subprocess.run(command, capture_output=True, text=True, timeout=900, cwd=cwd)
    assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]
    return result.stdout


def test_the_kernels_give_the_same_bits_on_every_cpu(tmp_path):
    output = sh(Path(__file__).with_name("run_kernels.sh"), cwd=tmp_path)
    assert output.count(" passed, 0 failed") >= 3


def test_the_store_stays_sound_under_load(cpu, tmp_path):
    output = sh(Path(__file__).with_name("run_store.sh"), cpu, "8", cwd=tmp_path)
    assert " passed, 0 failed" in output


@pytest.mark.parametrize("onnxruntime", ["newest"], indirect=True)
def test_a_dot_product_is_illegal_where_the_board_has_none(cpu, onnxruntime, tmp_path):
    """The net under all tests here: had one slipped through on a Pi 4, it would have ended them."""
    script = """
import ctypes, mmap
page = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
page.write(bytes.fromhex("2094824e" "c0035fd6"))  # sdot v0.4s, v1.16b, v2.16b; ret
ctypes.CFUNCTYPE(None)(ctypes.addressof(ctypes.c_char.from_buffer(page)))()
"""
    result = subprocess.run([PYTHON, "-c", script], cwd=tmp_path, capture_output=True)
    expected = 0 if FAMILIES[cpu] == "neondot" else -signal.SIGILL
    assert result.returncode == expected, result.stderr


@pytest.mark.parametrize("onnxruntime", ["newest"], indirect=True)
def test_kernels_that_the_cpu_cannot_run_are_refused(cpu, onnxruntime, tmp_path, monkeypatch):
    script = "from bapq_edge.engine.library import kernels_name; print(kernels_name())"
    assert sh(PYTHON, "-c", script, cwd=tmp_path).strip() == FAMILIES[cpu]
    monkeypatch.setenv("BAPQ_ISA", "neondot")
    result = subprocess.run([PYTHON, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert (result.returncode == 0) == (FAMILIES[cpu] == "neondot"), result.stderr
    assert result.returncode == 0 or "this CPU has no such kernels" in result.stderr


def test_models_answer_as_on_this_machine(cpu, onnxruntime, cases, tmp_path):
    for case in cases:
        (version, family), there = case.run([PYTHON], tmp_path / f"{case.model}.npz")
        assert family == FAMILIES[cpu]
        assert version.startswith("1.17.") == (onnxruntime == "oldest")
        assert set(there) == set(case.outputs)
        for name, value in there.items():
            resident = name.replace("streamed", "resident")
            np.testing.assert_array_equal(value, there[resident])
            # The layers are ours and give the same bits; pooling and adds are ONNX Runtime's.
            np.testing.assert_allclose(value, case.outputs[name], rtol=1e-5, atol=1e-5)


def run_suite(names, deselected, tmp_path):
    """The project's tests, under the emulated Python."""
    output = sh(
        PYTHON, "-m", "pytest", "-c", ROOT / "pyproject.toml", "--rootdir", ROOT,
        "-o", f"cache_dir={tmp_path / 'cache'}", "--basetemp", tmp_path / "base",
        "-m", "not slow", "-k", f"not ({deselected})",
        *(ROOT / "tests" / name for name in names), cwd=tmp_path,
    )  # fmt: skip
    assert " passed" in output, output[-4000:]


@pytest.mark.parametrize("onnxruntime", ["newest"], indirect=True)
def test_the_projects_tests_pass(cpu, onnxruntime, tmp_path):
    run_suite(SUITE, f"{MEMORY} or thousand", tmp_path)


@pytest.mark.slow
def test_the_projects_long_tests_pass(cpu, onnxruntime, tmp_path):
    run_suite([*SUITE, "end_to_end/test_mixed_levels.py"], MEMORY, tmp_path)
