"""The command line: every promise of a message, an exit code, and nothing left behind."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from bapq_edge import errors
from benchmarks.zoo import make_model
from benchmarks.zoo.digits import calibration_npz, load_digits_split
from support import command_line

BAPQ = command_line.BAPQ


def bapq(*arguments: object, code: int = 0, **environment: str) -> str:
    """Run the command; its stdout, or after a failure its stderr."""
    out, err = command_line.bapq(*arguments, code=code, **environment)
    return err if code else out


def refused(error: type[errors.BapqError], *arguments: object, **environment: str) -> str:
    """The one line that a refused command says."""
    message = bapq(*arguments, code=error.exit_code, **environment)
    assert message.startswith("bapq: ") and message.count("\n") == 1
    return message


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the digits CNN, its calibration data, an input, and its bank."""
    folder = tmp_path_factory.mktemp("cli")
    make_model("digits_cnn", folder / "digits.onnx")
    calibration_npz(folder / "calibration.npz", "cnn")
    np.savez(folder / "input.npz", image=load_digits_split().x_test[:5])
    bapq(
        *("build", folder / "digits.onnx", "-o", folder / "digits.bank"),
        *("--calibration", folder / "calibration.npz"),
    )
    return folder


def test_build_inspect_verify_run_unpack_pack(place, tmp_path):
    report = json.loads(
        bapq(
            *("build", place / "digits.onnx", "-o", tmp_path / "again.bank", "--json"),
            *("--calibration", place / "calibration.npz", "--levels", "8,4", "--workers", 1),
        )
    )
    assert report["calibration_samples"] == 200 and set(report["plane_bytes"]) == {"p4", "r8"}
    text = bapq("inspect", place / "digits.bank")
    for part in (
        "conv2",
        "64 x 288",
        "kept in float",
        "fewer than 1024 weights",
        "200 calibration",
    ):
        assert part in text
    manifest = json.loads(bapq("inspect", place / "digits.bank", "--json"))
    assert manifest["levels"] == [8, 4, 2, 1]
    for layer in manifest["layers"]:
        (row,) = (line for line in text.splitlines() if line.startswith(layer["name"] + " "))
        error, method = layer["relative_error"], layer["method"]
        assert row.endswith("  ".join(f"{error[i]:.4f} {method[i][0]}" for i in "8421"))
    assert {layer["method"]["4"] for layer in manifest["layers"]} == {"compensated"}
    bapq("verify", place / "digits.bank")
    bapq("unpack", place / "digits.bank", tmp_path / "tree")
    bapq("pack", tmp_path / "tree", tmp_path / "packed.bank")
    bapq("verify", tmp_path / "packed.bank")
    run = ("run", tmp_path / "packed.bank", "--input", place / "input.npz")
    stats = json.loads(bapq(*run, "--output", tmp_path / "out.npz", "--level", 4, "--json"))
    assert stats["level"] == 4 and stats["bits_per_weight"] == 4
    assert np.load(tmp_path / "out.npz")["logits"].shape == (5, 10)
    assert "bits per weight" in bapq(*run, "--bits", 3, "--budget", "64MiB")
    assert "--level" in bapq("run", "--help")


def test_install(place, tmp_path):
    new, bank = place / "digits.bank", tmp_path / "m.bank"
    line = bapq("install", new, bank, "--levels", "2,1")
    assert line.startswith(f"{bank}: digits.onnx, levels 2, 1: ") and line.endswith(" 0 B reused\n")
    report = json.loads(bapq("install", new, bank, "--json"))
    assert report.keys() == {"path", "model", "levels", "bytes_copied", "bytes_reused"}
    assert report["levels"] == [8, 4, 2, 1] and report["bytes_reused"] > 10_000
    bapq("verify", bank)
    assert "--levels 'two'" in refused(
        errors.UnknownLevelError, "install", new, bank, "--levels", "two"
    )
    refused(errors.UnknownLevelError, "install", new, bank, "--levels", "32")
    refused(errors.BankNotFoundError, "install", tmp_path / "none", bank)
    refused(errors.StorageError, "install", new, tmp_path / "none/m.bank")


def test_an_install_shows_its_progress_on_a_terminal(place, tmp_path):
    terminal, other_end = os.openpty()
    command = [BAPQ, "install", place / "digits.bank", tmp_path / "m.bank"]
    subprocess.run(command, stdout=subprocess.DEVNULL, stderr=other_end, check=True)
    os.close(other_end)
    shown = os.read(terminal, 1 << 16).decode()
    os.close(terminal)
    assert "\rinstalling: 100 % of " in shown and shown.endswith("\r\x1b[K")


def test_build_without_calibration_warns(place, tmp_path):
    result = subprocess.run(
        [BAPQ, "build", place / "digits.onnx", "-o", tmp_path / "a.bank", "--quiet"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "calibration" in result.stderr and result.stdout == ""


@pytest.fixture
def untouched(place, tmp_path):
    """A target that holds a bank; afterwards it must be the same, and nothing beside it."""
    target = tmp_path / "target.bank"
    shutil.copytree(place / "digits.bank", target)
    before = {path: path.read_bytes() for path in target.rglob("*") if path.is_file()}
    inputs = tmp_path / "inputs"
    inputs.mkdir()
    yield target, inputs
    assert {path: path.read_bytes() for path in target.rglob("*") if path.is_file()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["inputs", "target.bank"]


def light_model(path: Path) -> Path:
    weight = np.ones((8, 8), np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], name="tiny")],
        "light",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 8])],
        [onnx.numpy_helper.from_array(weight, "w")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)]), path)
    return path


def test_models_that_cannot_be_built_are_refused(place, untouched):
    target, inputs = untouched
    build = ("-o", target, "--quiet", "--calibration", place / "calibration.npz")
    (inputs / "text.onnx").write_text("this is no model\n")
    (inputs / "half.onnx").write_bytes((place / "digits.onnx").read_bytes()[:5000])
    (inputs / "empty.onnx").write_bytes(b"")
    for name in ("text.onnx", "half.onnx", "empty.onnx"):
        assert "onnx" in refused(errors.ModelFormatError, "build", inputs / name, *build).lower()
    for name in ("absent.onnx", "."):
        assert "cannot be read" in refused(errors.InputFileError, "build", inputs / name, *build)
    np.savez(inputs / "x.npz", x=np.ones((2, 8), np.float32))
    light = ("build", light_model(inputs / "light.onnx"), *build[:-1], inputs / "x.npz")
    message = refused(errors.NoHeavyLayerError, *light)
    assert "64 weights" in message and "1024" in message


def test_calibration_that_does_not_fit_is_refused(place, untouched):
    target, inputs = untouched
    image = np.load(place / "calibration.npz")["image"]
    broken = image.copy()
    broken[3, 0, 1, 2] = np.nan
    cases = [
        ({"picture": image}, errors.CalibrationArrayError, "image"),
        ({"image": image[:, :, :7]}, errors.CalibrationShapeError, "7"),
        ({"image": image.astype("U4")}, errors.CalibrationShapeError, "float"),
        ({"image": broken}, errors.CalibrationValueError, "sample 3"),
        ({"image": image[:0]}, errors.CalibrationError, "0 samples"),
    ]
    for arrays, error, part in cases:
        np.savez(inputs / "data.npz", **arrays)
        command = ("build", place / "digits.onnx", "-o", target, "--quiet")
        assert part in refused(error, *command, "--calibration", inputs / "data.npz")


def test_levels_that_do_not_exist_are_refused(place, untouched):
    target, _ = untouched
    for levels in ("16", "8,3", "", "eight"):
        command = ("build", place / "digits.onnx", "-o", target, "--levels", levels)
        refused(errors.UnknownLevelError, *command)
    run = ("run", target, "--input", place / "input.npz", "--level")
    assert "8, 4, 2, 1" in refused(errors.UnknownLevelError, *run, "32")
    refused(errors.UnknownLevelError, *run, "high")


def test_runs_that_cannot_be_are_refused(place, untouched):
    target, inputs = untouched
    run = ("run", target, "--input")
    assert "bytes" in refused(
        errors.BudgetTooSmallError, *run, place / "input.npz", "--budget", "1KiB"
    )
    refused(errors.SizeError, *run, place / "input.npz", "--budget", "much")
    refused(errors.InputFileError, *run, inputs / "absent.npz")
    (inputs / "text.npz").write_text("no arrays\n")
    refused(errors.RunInputError, *run, inputs / "text.npz")
    np.savez(inputs / "other.npz", picture=np.zeros(3))
    assert "image" in refused(errors.RunInputError, *run, inputs / "other.npz")
    np.savez(inputs / "shape.npz", image=np.zeros((1, 1, 9), np.float32))
    refused(errors.RunInputError, *run, inputs / "shape.npz")
    refused(errors.BankNotFoundError, "run", inputs / "no.bank", "--input", place / "input.npz")
    refused(errors.PlatformError, *run, place / "input.npz", BAPQ_ISA="mmx")


def test_a_directory_that_is_no_bank_is_never_overwritten(place, tmp_path):
    precious = tmp_path / "photos"
    precious.mkdir()
    (precious / "cat.jpg").write_bytes(b"meow")
    refused(errors.BankFormatError, "build", place / "digits.onnx", "-o", precious)
    assert (precious / "cat.jpg").read_bytes() == b"meow"
    assert list(tmp_path.iterdir()) == [precious]


def test_a_32_bit_python_is_refused_before_anything_else(monkeypatch, capsys):
    import struct

    from bapq_edge.cli import main

    real = struct.calcsize
    monkeypatch.setattr(struct, "calcsize", lambda f: 4 if f == "P" else real(f))
    assert main(["inspect", "any.bank"]) == errors.PlatformError.exit_code
    assert "32-bit" in capsys.readouterr().err


def test_a_traceback_only_on_request(place, tmp_path):
    refused(errors.BankNotFoundError, "verify", tmp_path / "no.bank")
    message = bapq(
        "verify", tmp_path / "no.bank", code=errors.BankNotFoundError.exit_code, BAPQ_DEBUG="1"
    )
    assert "Traceback" in message


def test_a_missing_host_package_names_the_extra(place, tmp_path):
    (tmp_path / "onnx.py").write_text("raise ModuleNotFoundError(name='onnx')\n")
    message = refused(
        errors.MissingExtraError,
        *("build", place / "digits.onnx", "-o", tmp_path / "a.bank", "--quiet"),
        PYTHONPATH=str(tmp_path),
    )
    assert "bapq-edge[host]" in message
