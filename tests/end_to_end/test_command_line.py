"""The command line as a front door: names, suggestions, formats, and refusals before any work."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from bapq_edge import errors
from bapq_edge.bank.reader import Bank
from bapq_tools import build_bank
from support.boundaries import model as boundary_model
from support.boundaries import with_boundary

COMMANDS = [
    *(
        "build",
        "eval",
        "fit",
        "keygen",
        "monitor",
        "report",
        "sign",
        "run",
        "bench",
        "profile",
        "doctor",
    ),
    *("inspect", "verify", "install", "unpack", "pack"),
]


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
        (
            ["xyz"],
            "there is no command 'xyz'; there are build, eval, fit, keygen, monitor, report, sign",
        ),
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
    model = shutil.copyfile(made / "one.onnx", tmp_path / "my.model.onnx")
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
    (line,) = [line for line in err.splitlines() if "boundary" in line]
    assert line.startswith("bapq: warning: ")
    assert "boundary models model" in line and "discarded" in line
    assert not Bank.open(fitted).manifest.boundary
    assert "boundary" not in bapq(*build, "--calibration", made / "one.npz")[1]
    with_boundary(made / "one.bank", fitted, boundary_model(made / "one.bank"))
    with pytest.warns(errors.BoundaryDroppedWarning):
        build_bank(
            made / "one.onnx", fitted, calibration=made / "one.npz", workers=1, progress=False
        )


# ---- run ----


def test_repeated_runs_tell_cold_from_warm(made, bapq, refused):
    run = ("run", made / "one.bank", "--input", made / "x.npy", "--repeat")
    text, _ = bapq(*run, 5)
    assert "first run " in text and "(median of 4)" in text
    report = json.loads(bapq(*run, 5, "--json")[0])
    assert report["runs"] == 5 and report["run_ms"] > 0 and report["warm_run_ms"] > 0
    assert "--repeat is 0" in refused(errors.RequestError, *run, 0)


def test_doctor_calibrates_the_board(bapq, refused, made, tmp_path):
    arguments = ("doctor", made / "one.bank", "--calibrate", "--load-seconds", 0.1)
    out, err = bapq(*arguments, "-o", "board.yaml")
    assert "memory_copy_mb_s" in out and "all cores" in err
    bapq("run", made / "one.bank", "--input", made / "one.npz", "--profile", "board.yaml")
    assert "BOARD.yaml" in refused(errors.RequestError, *arguments)
    assert "--calibrate" in refused(errors.RequestError, "doctor", "-o", "x.yaml")
