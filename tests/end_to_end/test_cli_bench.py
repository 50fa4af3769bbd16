"""`bapq bench`, `profile` and `doctor`: what they print can be read, and adds up."""

from __future__ import annotations

import csv
import itertools
import json
import os
import shutil
import signal
import subprocess
import time

import numpy as np
import onnx
import psutil
import pytest
from onnx import TensorProto, helper, numpy_helper

from bapq_edge import errors
from bapq_tools import build_bank
from benchmarks.zoo import make_model
from benchmarks.zoo.digits import calibration_npz, load_digits_split
from support.command_line import BAPQ, bapq


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the digits CNN, an input, and its bank."""
    folder = tmp_path_factory.mktemp("bench")
    make_model("digits_cnn", folder / "digits.onnx")
    calibration_npz(folder / "calibration.npz", "cnn")
    np.savez(folder / "input.npz", image=load_digits_split().x_test[:1])
    build_bank(
        folder / "digits.onnx",
        folder / "digits.bank",
        calibration=folder / "calibration.npz",
        levels=(32, 8, 4),
        progress=False,
    )
    return folder


def test_bench_measures_every_level_beside_the_models(place):
    out, err = bapq(
        *("bench", place / "digits.bank", "--against", place / "digits.onnx", "-r", 3),
        *("--input", place / "input.npz", "--threads", 1, "--format", "json"),
    )
    rows = json.loads(out)
    assert err == "" and [row["name"] for row in rows] == ["digits.onnx", "level 8", "level 4"]
    model, *levels = rows
    assert model["ratio"] == 1 and model["weight_bytes"] == os.path.getsize(place / "digits.onnx")
    assert model["streamed_bytes_per_run"] is model["bits_per_weight"] is None
    assert [row["bits_per_weight"] for row in levels] == [8, 4]
    rest = os.path.getsize(place / "digits.bank/graph/main.onnx")
    assert levels[0]["weight_bytes"] > levels[1]["weight_bytes"] > rest
    assert 0.99 < levels[1]["agreement"] < levels[0]["agreement"] < 1
    assert all(row["input_shapes"] == {"image": [1, 1, 8, 8]} and not row["zeros"] for row in rows)
    for row in levels:
        assert row["ratio"] == pytest.approx(row["run_ms"] / row["reference_ms"])
    for row in rows:
        assert row["error"] is None and row["peak_growth_bytes"] > 1 << 20
        assert row["load_ms"] > 0 and row["run_ms"] > 0 and row["run_sd_ms"] >= 0
    for row in levels:
        assert row["ratio"] > 0 and row["streamed_bytes_per_run"] == 0  # all of it is in memory


def test_the_ratio_says_what_it_is_over(place):
    bench = ("bench", place / "digits.bank", "-r", 2, "--levels", 8)
    table, _ = bapq(*bench, "--against", place / "digits.onnx")
    heads, _, model, level = (
        [c.strip() for c in line.split("|")] for line in table.splitlines()[:4]
    )
    run = heads.index("run ms")
    assert heads[run : run + 4] == ["run ms", "reference ms", "ratio", "agreement"]
    assert model[run + 2] == "1.00" and model[run + 3] == "" and float(level[run + 3]) > 0.99
    assert float(level[run + 2]) == pytest.approx(
        float(level[run].split()[0]) / float(level[run + 1]), abs=0.2
    )
    assert "input: image [1, 1, 8, 8], zeros" in table
    assert "ratio: run ms over reference ms, the runs of digits.onnx" in table
    alone, _ = bapq(*bench)
    assert "ratio" not in alone and "agreement" not in alone


def test_the_rows_warn_once_of_what_concerns_them_all(place, tmp_path):
    shutil.copytree(place / "digits.bank", tmp_path / "a.bank")
    (tmp_path / "a.bank/planes/r8.bin").unlink()
    bench = ("bench", tmp_path / "a.bank", "-r", 2, "--levels", "4,32,auto")
    _, err = bapq(*bench, "--format", "json")
    assert err.count("\n") == 1 and "without planes/r8.bin" in err


def test_zeros_that_a_model_cannot_take_point_to_the_input(tmp_path):
    """Two open axes that must fit each other: 1 and 3."""
    weight = np.ones((64, 64), np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "w"], ["p"]),
            helper.make_node("Concat", ["p", "three"], ["y"], axis=1),
        ],
        "open",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, None])],
        [
            numpy_helper.from_array(weight, "w"),
            numpy_helper.from_array(np.ones((3, 2), np.float32), "three"),
        ],
    )
    model = tmp_path / "open.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)]), model)
    with pytest.warns(errors.UncalibratedWarning):
        bank = build_bank(model, tmp_path / "a.bank", levels=(8,), progress=False).bank
    bench = ("bench", bank, "--against", model, "-r", 2)
    out, err = bapq(*bench, code=errors.ExecutionError.exit_code)
    assert "where x has an open axis: give --input, or the shape with --shape" in err
    assert err.count("\n") == 1 and "E:onnxruntime" not in err
    assert [line.split("|")[3].strip() for line in out.splitlines()[2:4]] == ["failed", "failed"]
    profile = ("profile", bank, "-o", tmp_path / "t.json", "--seconds", 0.1)
    assert "--shape" in bapq(*profile, code=errors.ExecutionError.exit_code)[1]
    bapq(*bench, "--shape", "x=3,64")


def test_an_image_of_no_size_is_not_guessed_and_external_weights_count(tmp_path):
    """Convolutions would run on one pixel, and give times that mean nothing."""
    weight = np.random.default_rng(0).standard_normal((64, 3, 3, 3)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("Conv", ["x", "w"], ["y"], pads=[1, 1, 1, 1])],
        "open",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, "h", "w"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 64, "h", "w"])],
        [numpy_helper.from_array(weight, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)])
    onnx.save(model, tmp_path / "a.onnx", save_as_external_data=True, location="a.data")
    with pytest.warns(errors.UncalibratedWarning):
        bank = build_bank(
            tmp_path / "a.onnx", tmp_path / "a.bank", levels=(8,), progress=False
        ).bank
    bench = ("bench", bank, "--against", tmp_path / "a.onnx", "-r", 2)
    _, err = bapq(*bench, code=errors.RunInputError.exit_code)
    assert "input x is (?, 3, ?, ?)" in err and "give --shape x=1,3,224,224, or --input" in err
    assert err.count("\n") == 1
    out, _ = bapq(*bench, "--shape", "x=1,3,16,8", "--json")
    float_model, level = json.loads(out)
    assert float_model["weight_bytes"] > weight.nbytes
    assert 0.99 < level["agreement"] <= 1 and level["zeros"]
    assert level["input_shapes"] == {"x": [1, 3, 16, 8]}


def test_an_interrupted_bench_says_one_line(place):
    # A background job of a shell without job control ignores SIGINT, and so do its children.
    command = ["env", "--default-signal=INT", BAPQ, "bench", place / "digits.bank", "-r", "100000"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    ) as bench:
        while not _is_row_starting(bench.pid):
            time.sleep(0.01)
        os.killpg(bench.pid, signal.SIGINT)
        _, err = bench.communicate()
    assert (bench.returncode, err) == (130, b"bapq: interrupted\n")


def _is_row_starting(pid: int) -> bool:
    rows = psutil.Process(pid).children()
    return any("spawn_main" in " ".join(row.cmdline()) for row in rows)


def test_bench_tables(place):
    bench = ("bench", place / "digits.bank", "-r", 2, "--levels", "32,auto", "--shape")
    markdown, _ = bapq(*bench, "image=2,1,8,8", "--format", "md")
    lines = markdown.splitlines()
    assert len({len(line) for line in lines[:4]}) == 1
    assert lines[4:] == ["", "input: image [2, 1, 8, 8], zeros"]
    assert "level 32" in lines[2] and "auto" in lines[3]
    table, _ = bapq(*bench, "image=2,1,8,8", "--format", "csv")
    assert [row["name"] for row in csv.DictReader(table.splitlines())] == ["level 32", "auto"]
    lines, _ = bapq(*bench, "image=2,1,8,8", "--format", "jsonl")
    assert [json.loads(line)["ratio"] for line in lines.splitlines()] == [None, None]


def test_a_row_that_fails_leaves_the_others_and_its_error(place):
    (place / "text.onnx").write_text("this is no model\n")
    out, err = bapq(
        *("bench", place / "digits.bank", "--against", place / "text.onnx", "-r", 2),
        *("--levels", "8", "--format", "json"),
        code=errors.ModelFormatError.exit_code,
    )
    broken, level = json.loads(out)
    assert "text.onnx" in broken["error"] and broken["run_ms"] is None
    assert level["error"] is None and level["ratio"] is None and level["run_ms"] > 0
    assert err.startswith("bapq: ") and err.count("\n") == 1
    out, err = bapq(
        *("bench", place / "digits.bank", "-r", 2, "--levels", "4", "--budget", "1MiB"),
        code=errors.BudgetTooSmallError.exit_code,
    )
    assert "failed" in out and "smallest that works" in err


def test_precisions_that_cannot_be_are_refused_in_a_line(place):
    bench = ("bench", place / "digits.bank")
    for arguments, error in [
        (("--levels", "2"), errors.UnknownLevelError),
        (("--shape", "image"), errors.RunInputError),
        (("--levels", "8", "--shape", "picture=1,2"), errors.RunInputError),
        (("--levels", "8", "--shape", "image=1,1,8,9999999999999"), errors.RunInputError),
        (("--levels", "8", "--shape", "image=9999999999999999999999"), errors.RunInputError),
        (("--runs", "0"), errors.RequestError),
        (("--input", place / "absent.npz", "--levels", "8"), errors.InputFileError),
    ]:
        _, err = bapq(*bench, *arguments, code=error.exit_code)
        assert err.startswith("bapq: ") and err.count("\n") == 1
    profile = ("profile", place / "digits.bank", "-o")
    bapq(*profile, place / "no" / "a.json", code=errors.StorageError.exit_code)
    bapq(*profile, place / "a.json", "--seconds", 0, code=errors.RequestError.exit_code)


def test_profile_writes_a_trace_and_its_summary(place, tmp_path):
    profile = ("profile", place / "digits.bank", "--seconds", 0.2, "--budget", "24MiB")
    out, err = bapq(*profile, "--level", 4, "-o", tmp_path / "a.json", "--json")
    summary = json.loads(out)
    entries = json.loads((tmp_path / "a.json").read_text())["traceEvents"]
    assert err == "" and summary["lost_events"] == 0 and summary["session"]["level"] == 4
    runs = [entry for entry in entries if entry["name"].startswith("run ")]
    assert len(runs) == summary["runs"] > 0
    for before, after in itertools.pairwise(runs):
        assert before["ts"] + before["dur"] <= after["ts"]
    read_bytes = sum(entry.get("args", {}).get("bytes", 0) for entry in entries)
    assert read_bytes == summary["read_bytes"]
    assert summary["session"]["peak_bytes"] <= 24 << 20
    out, _ = bapq(*profile, "-o", tmp_path / "b.json", "--input", place / "input.npz")
    assert "runs, median" in out and "perfetto" in out
    assert "read nothing: all weights stayed in memory" in out


def test_a_controller_s_decision_is_in_the_trace_with_its_reading(place, tmp_path):
    (tmp_path / "hot.csv").write_text("time_s,temperature_c\n0,40\n0.5,95\n")
    bapq(
        *("profile", place / "digits.bank", "--seconds", 2, "--controller", "auto"),
        *("-o", tmp_path / "a.json"),
        BAPQ_SENSORS=f"mock:{tmp_path / 'hot.csv'}",
    )
    entries = json.loads((tmp_path / "a.json").read_text())["traceEvents"]
    told = {entry["args"]["C"] for entry in entries if entry["name"] == "temperature C"}
    assert told == {40, 95}
    assert any("95" in entry["args"]["reason"] for entry in entries if entry["ph"] == "i")


def test_doctor_tells_what_runs_and_fails_only_where_nothing_does(place):
    text, _ = bapq("doctor")
    assert "kernels" in text and "read speed" not in text
    found = json.loads(bapq("doctor", place / "digits.bank", "--json")[0])
    items = {finding["item"]: finding for finding in found}
    assert {"python", "onnxruntime", "kernels", "power", "bank", "read speed"} <= set(items)
    assert all(finding["state"] in ("OK", "note") for finding in found)
    assert all((finding["state"] == "OK") == (finding["fix"] == "") for finding in found)
    code = errors.PlatformError.exit_code
    out, err = bapq("doctor", place / "no.bank", code=code)
    assert "BAD   bank" in out and "bank" in err and err.count("\n") == 1
    assert out.endswith("no.bank: there is no bank -> check the name, or build it\n")
    out, _ = bapq("doctor", code=code, BAPQ_ISA="mmx")
    assert "unset BAPQ_ISA" in out
