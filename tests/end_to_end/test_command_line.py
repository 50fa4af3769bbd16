"""The command line as a front door: names, suggestions, formats, and refusals before any work."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from bapq_edge import errors
from bapq_edge.bank.reader import Bank
from bapq_edge.cli import main
from bapq_tools import build_bank
from support.boundaries import model as boundary_model
from support.boundaries import with_boundary

ONE, TWO = ("x",), ("a", "b")
COMMANDS = [
    *("build", "fit", "run", "bench", "profile", "doctor"),
    *("inspect", "verify", "install", "unpack", "pack"),
]


def save_model(path: Path, inputs: tuple[str, ...]) -> Path:
    """A layer and an output for each input."""
    weight = np.random.default_rng(0).standard_normal((64, 32)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", [name, f"w_{name}"], [f"y_{name}"]) for name in inputs],
        "model",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 64]) for name in inputs],
        [
            helper.make_tensor_value_info(f"y_{name}", TensorProto.FLOAT, ["n", 32])
            for name in inputs
        ],
        [numpy_helper.from_array(weight, f"w_{name}") for name in inputs],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)]), path)
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a model of one input and output, one of two, their banks, and inputs."""
    folder = tmp_path_factory.mktemp("made")
    x = np.ones((3, 64), np.float32)
    for name, inputs in (("one", ONE), ("two", TWO)):
        np.savez(folder / f"{name}.npz", **dict.fromkeys(inputs, x))
        save_model(folder / f"{name}.onnx", inputs)
        build_bank(
            folder / f"{name}.onnx",
            folder / f"{name}.bank",
            calibration=folder / f"{name}.npz",
            workers=1,
            progress=False,
        )
    np.save(folder / "x.npy", x)
    return folder


@pytest.fixture
def bapq(capsys, made, tmp_path, monkeypatch):
    """Runs a command in a folder of its own; returns what it printed on stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object, code: int = 0) -> tuple[str, str]:
        try:
            found = main([str(argument) for argument in arguments])
        except SystemExit as end:  # argparse
            found = end.code
        printed = capsys.readouterr()
        assert found == code, printed.err
        return printed.out, printed.err

    return run


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


@pytest.fixture
def refused(bapq, tmp_path):
    """Runs a command that must fail in one line and leave the folder as it was."""

    def run(code: int | type[errors.BapqError], *arguments: object) -> str:
        before = sorted(tmp_path.rglob("*"))
        out, err = bapq(*arguments, code=code if isinstance(code, int) else code.exit_code)
        assert out == "" and err.startswith("bapq: ") and err.count("\n") == 1
        assert sorted(tmp_path.rglob("*")) == before
        return err

    return run


# ---- finding one's way ----


def test_bare_bapq_lists_its_commands(bapq):
    out, err = bapq()
    listed = [line.split()[0] for line in out.splitlines() if line.startswith("    ")]
    assert listed == COMMANDS and err == ""
    assert bapq("--help")[0] == out


def test_help_is_a_command_too(bapq):
    assert bapq("help") == bapq("--help")
    assert bapq("help", "run") == bapq("run", "--help")


def test_every_argument_is_explained_in_words_of_its_own(bapq):
    for command in COMMANDS:
        text, _ = bapq(command, "--help")
        arguments = re.findall(r"^  (\S.*?)(?:\n {10,}| {2,}|\n)(\S*)", text, re.MULTILINE)
        assert len(arguments) >= 3
        for name, first_word in arguments:
            assert first_word not in ("", "of", "to", "there", "default:"), (command, name)


def test_python_m_bapq_edge_is_the_command():
    command = [sys.executable, "-m", "bapq_edge", "--version"]
    assert subprocess.run(command, capture_output=True, check=True, text=True).stdout == (
        "bapq 0.1.0\n"
    )


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        (["isntall", "a", "b"], "there is no command 'isntall'; did you mean install?"),
        (["xyz"], "there is no command 'xyz'; there are build, fit, run, bench, profile"),
        (["run", "a.bank", "--inptu", "a"], "there is no option --inptu; did you mean --input?"),
        (["run", "a.bank", "--memory-bugdet=1GiB"], "did you mean --memory-budget?"),
        (["bench", "a.bank", "--frmat", "md"], "did you mean --format?"),
        (["fit", "a.bank", "--calibratoin", "a.npz"], "did you mean --calibration?"),
        (["inspect", "a.bank", "--levle"], "there is no option --levle; see"),
        (["help", "rnu"], "there is no command 'rnu'; did you mean run?"),
        (["inspect", "a.bank", "--zebra"], "there is no option --zebra; see 'bapq inspect --help'"),
        (["--versoin"], "did you mean --version?"),
        (["run", "a.bank"], "the following arguments are required: --input"),
        (["run", "a.bank", "--input", "a", "--policy", "x"], "argument --policy: invalid choice"),
        (["profile", "a.bank", "-o", "a", "--controller"], "expected one argument"),
        (["build", "a.onnx", "--workers", "none"], "'none' is not a number from 1 on"),
    ],
)
def test_a_usage_error_is_one_line_that_helps(refused, arguments, answer):
    message = refused(2, *arguments)
    assert answer in message and "--help'" in message


def test_what_looks_like_an_option_may_follow_two_dashes(refused):
    assert "--odd" in refused(errors.BankNotFoundError, "inspect", "--", "--odd")


def test_options_may_be_cut_short(made, bapq):
    bapq("run", made / "one.bank", "--inp", made / "x.npy", "--js")


@pytest.mark.parametrize(("typed", "offered"), [("ins", "inspect install"), ("run --memo", "--m")])
def test_a_shell_completes(typed, offered, tmp_path):
    line = f"bapq {typed}"
    environment = {
        "_ARGCOMPLETE": "1",
        "_ARGCOMPLETE_STDOUT_FILENAME": str(tmp_path / "offered"),
        "COMP_LINE": line,
        "COMP_POINT": str(len(line)),
        "_ARGCOMPLETE_IFS": " ",
    }
    command = Path(sys.executable).with_name("bapq")
    subprocess.run([command], env={**os.environ, **environment}, check=True)
    assert (tmp_path / "offered").read_text().strip().startswith(offered)


def test_without_argcomplete_the_command_still_runs(bapq, monkeypatch):
    monkeypatch.setitem(sys.modules, "argcomplete", None)
    monkeypatch.setenv("_ARGCOMPLETE", "1")
    assert bapq()[0].startswith("usage: bapq")


# ---- the same thing has the same name ----


@pytest.mark.parametrize("command", ["run", "bench", "profile"])
def test_what_a_session_takes_has_its_name_from_python(bapq, command):
    text, _ = bapq(command, "--help")
    for name in (
        *("memory-budget", "weight-budget", "policy", "target-agreement", "latency-ms", "threads"),
        *("controller", "profile", "direct-io", "level", "bits", "json", "output"),
    ):
        assert f"--{name}" in text
    assert "--budget" in text and "--direct" in text


def test_session_options_reach_the_session(made, bapq, refused, tmp_path):
    run = ("run", made / "one.bank", "--input", made / "one.npz")
    options = ("--memory-budget", "64MiB", "--weight-budget", "1MiB", "--latency-ms", 50)
    more = ("--threads", 1, "--profile", "raspberry_pi_4", "--direct-io", "--policy", "static")
    stats = json.loads(bapq(*run, *options, *more, "--json")[0])
    assert stats["runs"] == 1 and stats["warm_run_ms"] is None
    refused(errors.ProfileError, *run, "--profile", "raspberry_pie")
    assert "bapq fit" in refused(errors.RequestError, *run, "--policy", "gate")
    assert "bapq fit" in refused(errors.RequestError, *run, "--target-agreement", 0.9)


def test_a_number_that_lacks_its_unit_is_answered_with_it(made, refused):
    run = ("run", made / "one.bank", "--input", made / "one.npz")
    for option in ("--budget", "--memory-budget", "--weight-budget"):
        message = refused(errors.SizeError, *run, option, "64")
        assert "64 what?" in message and "64MiB" in message and "64B" in message
    bench = ("bench", made / "one.bank", "-r", 2)
    assert "1.5 what?" in refused(errors.SizeError, *bench, "--budget", "1.5")


# ---- one JSON document, one line for a warning ----


def test_json_is_one_document_and_nothing_else(made, bapq, tmp_path):
    bank = made / "one.bank"
    build = ("build", made / "one.onnx", "-o", "b.bank", "--workers", 1)
    for command in (
        ("inspect", bank),
        ("verify", bank),
        ("doctor", bank),
        ("run", bank, "--input", made / "one.npz"),
        ("profile", bank, "--seconds", 0.05, "-o", "t.json"),
        ("bench", bank, "-r", 2, "--levels", 8),
        ("install", bank, "i.bank"),
        ("unpack", bank, "tree"),
        ("pack", "tree", "p.bank"),
        build,  # not calibrated: there is a warning, too
        (*build, "--analyze"),
    ):
        out, _ = bapq(*command, "--json")
        assert json.loads(out), command
    assert json.loads((tmp_path / "t.json").read_text())
    assert json.loads(bapq("verify", bank, "--json")[0])["ok"] is True


def test_verify_as_json_tells_what_is_broken_and_fails(made, bapq):
    bapq("install", made / "one.bank", "a.bank")
    plane = Path("a.bank/planes/p4.bin")
    data = bytearray(plane.read_bytes())
    data[100] ^= 1
    plane.write_bytes(data)
    out, err = bapq("verify", "a.bank", "--json", code=errors.BankIntegrityError.exit_code)
    found = json.loads(out)
    assert found["ok"] is False and err.count("\n") == 1
    assert [file["file"] for file in found["files"] if file["problems"]] == ["planes/p4.bin"]


def test_a_warning_is_one_line_without_a_place_in_the_code(made, bapq):
    bapq("install", made / "one.bank", "a.bank")
    Path("a.bank/planes/m1.bin").unlink()
    before = warnings.showwarning
    for _ in range(2):  # and the second time, too
        out, err = bapq("inspect", "a.bank", "--json")
        assert err.startswith("bapq: warning: a.bank: without planes/m1.bin ")
        assert ".py" not in err and err.count("\n") == 1 and json.loads(out)
    assert "are intact; absent: planes/m1.bin" in bapq("verify", "a.bank")[0]
    assert warnings.showwarning is before


# ---- bench ----


def test_bench_writes_its_table_to_a_file_in_the_format_asked_for(made, bapq, refused):
    bench = ("bench", made / "one.bank", "-r", 2, "--level", 8)
    assert bapq(*bench, "-o", "a.csv", "--bits", 3.5)[0] == ""
    with open("a.csv") as file:
        assert [row["name"] for row in csv.DictReader(file)] == ["level 8", "3.5 bits"]
    bapq(*bench, "-o", "table", "--format", "jsonl", "--budget", "64MiB")
    assert json.loads(Path("table").read_text())["name"] == "level 8 in 64MiB"
    Path("folder").mkdir()
    assert "a directory" in refused(errors.StorageError, *bench, "-o", "folder")
    message = refused(errors.RequestError, *bench, "--policy", "gate")
    assert "--levels and a policy" in message


# ---- build ----


def test_a_bank_is_named_after_its_model(made, bapq, refused, tmp_path):
    model = save_model(tmp_path / "my.model.onnx", ONE)
    bapq("build", model, "--calibration", made / "x.npy", "--quiet", "--workers", 1)
    assert Bank.open(tmp_path / "my.model.bank").manifest.calibration.samples == 3


def test_a_missing_model_is_told_before_missing_calibration(refused):
    assert "none.onnx cannot be read" in refused(errors.InputFileError, "build", "none.onnx")


def test_a_rebuild_says_which_boundary_models_are_discarded(made, bapq, tmp_path):
    fitted = with_boundary(
        made / "one.bank", tmp_path / "one.bank", boundary_model(made / "one.bank")
    )
    build = ("build", made / "one.onnx", "-o", fitted, "--workers", 1, "--quiet")
    _, err = bapq(*build, "--calibration", made / "one.npz")
    assert err.startswith("bapq: warning: ") and err.count("\n") == 1
    assert "boundary models model" in err and "discarded" in err
    assert not Bank.open(fitted).manifest.boundary
    assert bapq(*build, "--calibration", made / "one.npz")[1] == ""
    with_boundary(made / "one.bank", fitted, boundary_model(made / "one.bank"))
    with pytest.warns(errors.BoundaryDroppedWarning):
        build_bank(
            made / "one.onnx", fitted, calibration=made / "one.npz", workers=1, progress=False
        )


# ---- files ----


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


def test_repeated_runs_tell_cold_from_warm(made, bapq, refused):
    run = ("run", made / "one.bank", "--input", made / "x.npy", "--repeat")
    text, _ = bapq(*run, 5)
    assert "first run " in text and "(median of 4)" in text
    report = json.loads(bapq(*run, 5, "--json")[0])
    assert report["runs"] == 5 and report["run_ms"] > 0 and report["warm_run_ms"] > 0
    assert "--repeat is 0" in refused(errors.RequestError, *run, 0)
