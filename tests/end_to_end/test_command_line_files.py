"""The files of the command line: what is missing, what is in the way, and what is never touched."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from bapq_edge import errors


@pytest.fixture
def ordinary_user():
    """A folder that everybody may enter, unlike those of pytest."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@contextlib.contextmanager
def as_ordinary_user() -> Iterator[None]:
    """Give up the rights of root, whom no permissions stop."""
    if os.getuid() == 0:
        os.setresuid(65534, 65534, 0)
    try:
        yield
    finally:
        if os.getresuid()[2] == 0:
            os.setresuid(0, 0, 0)


# ---- missing and unreadable ----


def test_a_file_that_is_missing_ends_every_command_alike_and_before_the_work(made, refused):
    bank, data = made / "one.bank", made / "one.npz"
    model, new = made / "one.onnx", ("-o", "new.bank")
    for command in (
        ("build", "absent", *new),
        ("build", model, *new, "--calibration", "absent"),
        ("build", model, *new, "--recipe", "absent"),
        ("fit", bank, *new, "--calibration", "absent"),
        ("fit", bank, *new, "--calibration", data, "--model", "absent"),
        ("run", bank, "--input", "absent"),
        ("run", bank, "--input", "."),
        ("run", bank, "--input", data, "--profile", "absent.yaml"),
        ("bench", bank, "--input", "absent"),
        ("bench", bank, "--against", model, "absent"),
        ("profile", bank, "-o", "t.json", "--input", "absent"),
    ):
        assert " cannot be read: " in refused(errors.InputFileError, *command)


def test_a_directory_that_is_missing_is_named(made, refused):
    bank, data = made / "one.bank", made / "one.npz"
    for command in (
        ("unpack", bank, "usb/tree"),
        ("build", made / "one.onnx", "-o", "usb/one.bank"),
        ("fit", bank, "--calibration", data, "-o", "usb/one.bank"),
        ("run", bank, "--input", data, "-o", "usb/y.npz"),
        ("profile", bank, "-o", "usb/t.json"),
    ):
        assert "/usb is no directory" in refused(errors.StorageError, *command)
    message = refused(errors.StorageError, "install", bank, "usb/one.bank")
    assert message.endswith("/usb\n") and "create the directory /" in message


@pytest.mark.parametrize(("broken", "told"), [("planes/p4.bin", "p4.bin"), ("", "manifest.json")])
def test_what_may_not_be_read_is_not_called_absent(made, bapq, ordinary_user, broken, told):
    bapq("install", made / "one.bank", ordinary_user / "a.bank")
    (ordinary_user / "a.bank" / broken).chmod(0)
    with as_ordinary_user():
        for command in ("inspect", "verify"):
            _, err = bapq(command, ordinary_user / "a.bank", code=errors.StorageError.exit_code)
            assert f"{told} cannot be read: Permission denied: check the permissions" in err


def test_a_full_disk_behind_stdout_is_told_in_a_line(made):
    bapq = Path(sys.executable).with_name("bapq")
    buffered = {**os.environ, "PYTHONUNBUFFERED": ""}
    for arguments in (["inspect", made / "one.bank"], ["--help"]):
        command = [bapq, *arguments]
        with open("/dev/full", "w") as full:
            ended = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, env=buffered)
        assert ended.returncode == errors.StorageError.exit_code
        assert ended.stderr == b"bapq: the output cannot be written: No space left on device\n"


# ---- nothing is written onto or into what is read ----


def test_an_output_is_never_what_is_read(made, bapq, refused):
    bapq("install", made / "one.bank", "a.bank")
    Path("in.npz").write_bytes((made / "one.npz").read_bytes())
    Path("model.json").write_bytes((made / "one.onnx").read_bytes())
    os.link("in.npz", "hard.npz")
    os.symlink("in.npz", "soft.npz")
    run = ("run", "a.bank", "--input", "in.npz", "-o")
    bench, profile = ("bench", "a.bank", "-o"), ("profile", "a.bank", "-o")
    for command in (
        *((*run, name) for name in ("in.npz", "hard.npz", "soft.npz", "a.bank/o.npz")),
        (*bench, "model.json", "--against", "model.json"),
        (*bench, "a.bank/manifest.json"),
        (*bench, "in.npz", "--format", "md", "--input", "in.npz"),
        (*profile, "a.bank/planes/t.json"),
        (*profile, "a.bank/planes/p4.bin"),
    ):
        refused(errors.RequestError, *command)
    assert Path("in.npz").read_bytes() == (made / "one.npz").read_bytes()
    bapq("verify", "a.bank")


def test_an_output_is_named_after_what_it_holds(made, refused):
    bench, profile = ("bench", made / "one.bank", "-o"), ("profile", made / "one.bank", "-o")
    assert "md, csv, json, jsonl" in refused(errors.RequestError, *bench, "t.xlsx")
    assert "must end in .json" in refused(errors.RequestError, *profile, "t.txt")


def test_a_bank_is_not_copied_onto_or_into_itself(made, bapq, refused):
    bapq("install", made / "one.bank", "a.bank")
    bapq("unpack", "a.bank", ".")  # beside the bank is no harm
    os.symlink("a.bank", "link")
    for target in ("a.bank", "a.bank/b", "./x/../a.bank/", "link"):
        refused(errors.RequestError, "unpack", "a.bank", target)
        refused(errors.RequestError, "install", "a.bank", target)
    refused(errors.RequestError, "unpack", made / "one.bank", "a.bank")
    refused(errors.RequestError, "pack", "data/bank/one.onnx", "data/bank/one.onnx")
    refused(errors.RequestError, "pack", "data/bank/one.onnx", "data/bank/one.onnx/layer")
    refused(errors.RequestError, "pack", ".", "data/bank/one.onnx/b.bank")
    refused(errors.RequestError, "fit", "a.bank", "--calibration", "x.npz", "-o", "a.bank/b")
    bapq("pack", ".", "b.bank")
    for bank in ("a.bank", "b.bank"):
        bapq("verify", bank)
    bapq("install", "a.bank", "a.bank", "--levels", 4)  # in its own place a bank gives up planes
    assert {path.name for path in Path("a.bank/planes").iterdir()} == {"p4.bin"}


def test_a_folder_that_is_no_bank_is_left_alone(made, bapq, refused):
    bapq("unpack", made / "one.bank", "tree")
    Path("photos").mkdir()
    Path("photos/cat.jpg").touch()
    refused(errors.BankFormatError, "install", made / "one.bank", "photos")
    refused(errors.BankFormatError, "pack", "tree", "photos")
    refused(errors.BankFormatError, "build", made / "one.onnx", "-o", "photos")
    refused(errors.BankFormatError, "pack", "tree", "tree")


# ---- inputs and outputs ----


def test_an_npy_is_the_input_of_a_model_that_has_one(made, bapq, refused):
    run = ("run", made / "one.bank", "--input", made / "x.npy")
    bapq(*run, "-o", "y.npy")
    bapq("run", made / "one.bank", "--input", made / "one.npz", "-o", "y.npz")
    np.testing.assert_array_equal(np.load("y.npy"), np.load("y.npz")["y_x"])
    bapq("bench", made / "one.bank", "-r", 2, "--levels", 8, "--input", made / "x.npy")
    bapq("profile", made / "one.bank", "--seconds", 0.05, "-o", "t.json", "--input", made / "x.npy")
    two = ("run", made / "two.bank", "--input")
    assert "2 inputs, a, b" in refused(errors.RunInputError, *two, made / "x.npy")
    build = ("build", made / "two.onnx", "-o", "two.bank", "--quiet", "--calibration")
    assert "2 inputs, a, b" in refused(errors.CalibrationArrayError, *build, made / "x.npy")
    bapq(*two, made / "two.npz", "-o", "out.npz")
    assert set(np.load("out.npz")) == {"y_a", "y_b"}
    message = refused(errors.RequestError, *two, made / "two.npz", "-o", "out.npy")
    assert "2 outputs, y_a, y_b" in message


def test_an_output_is_written_under_the_name_given_or_not_at_all(made, bapq, refused):
    run = ("run", made / "one.bank", "--input", made / "x.npy", "--output")
    for name in ("answer", "answer.txt", "answer.npz.gz"):
        assert "must end in .npz" in refused(errors.RequestError, *run, name)
    assert "is no directory" in refused(errors.StorageError, *run, "none/y.npz")
    bapq(*run, "y.npz")
    assert Path("y.npz").exists() and not Path("y.npz.npz").exists()


def test_files_that_hold_no_plain_arrays_are_refused_in_a_line(made, refused):
    whole = (made / "one.npz").read_bytes()
    damaged = bytearray(whole)
    damaged[len(whole) // 3] ^= 0xFF
    for name, data in {
        "empty.npz": b"",
        "half.npz": whole[: len(whole) // 2],
        "damaged.npz": bytes(damaged),
        "text.npy": b"hello",
        "half.npy": (made / "x.npy").read_bytes()[:200],
    }.items():
        Path(name).write_bytes(data)
        message = refused(errors.RunInputError, "run", made / "one.bank", "--input", name)
        assert name in message and "numpy.savez" in message
        build = ("build", made / "one.onnx", "-o", "a.bank", "--quiet", "--calibration", name)
        refused(errors.CalibrationError, *build)
    np.savez("objects.npz", x=np.array([{}], object))
    refused(errors.RunInputError, "run", made / "one.bank", "--input", "objects.npz")


def test_a_pipe_is_refused_where_arrays_are_read_in_any_order(made, bapq, refused, tmp_path):
    os.mkfifo(tmp_path / "pipe.npz")  # nobody writes: to open it would wait for ever
    message = refused(
        errors.InputFileError, "run", made / "one.bank", "--input", tmp_path / "pipe.npz"
    )
    assert "is a pipe or a device" in message and "write it to a file first" in message
