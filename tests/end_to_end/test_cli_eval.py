"""`bapq eval`: what it counts is what sessions answer, and slips are told in a line."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from bapq_edge import Session, errors
from bapq_tools import build_bank
from benchmarks.zoo import make_model
from benchmarks.zoo.digits import calibration_npz, load_digits_split
from support.boundaries import model as boundary_model
from support.boundaries import with_boundary
from support.command_line import bapq

SAMPLES = 60


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The digits CNN, two banks of it, and images with their digits, as a file and in a folder."""
    folder = tmp_path_factory.mktemp("eval")
    make_model("digits_cnn", folder / "digits.onnx")
    calibration_npz(folder / "calibration.npz", "cnn")
    split = load_digits_split()
    image, digit = split.x_test[:SAMPLES], split.y_test[:SAMPLES]
    np.savez(folder / "test.npz", image=image, digit=digit)
    np.savez(folder / "images.npz", image=image)
    np.save(folder / "digits.npy", digit)
    (folder / "parts").mkdir()
    for number, rows in enumerate((slice(0, 7), slice(7, 40), slice(40, None))):
        np.savez(folder / f"parts/{number}.npz", image=image[rows], digit=digit[rows])
    for name, levels in (("whole", (32, 8, 4, 2, 1)), ("small", (8, 1))):
        build_bank(
            folder / "digits.onnx",
            folder / f"{name}.bank",
            calibration=folder / "calibration.npz",
            levels=levels,
            progress=False,
        )
    return folder


def evaluate(place, *arguments, bank="whole.bank", data="test.npz"):
    """The result of a command as a dictionary, its rows by name."""
    command = ("eval", place / bank, "--data", place / data, "--threads", 1, "--quiet", "--json")
    out, err = bapq(*command, *arguments)
    assert err == ""
    found = json.loads(out)
    return {**found, "rows": {row["name"]: row for row in found["rows"]}}


def classes(place, bank="whole.bank", **options):
    images = np.load(place / "images.npz")["image"]
    with Session(place / bank, **options) as session:
        return np.array([session.run(None, {"image": each[None]})[0].argmax() for each in images])


def test_shares_are_those_of_the_sessions_answers(place):
    found = evaluate(place, "--labels", "digit", "--bits", 3)
    assert found["samples"] == SAMPLES and found["metric"] == "top1"
    assert found["columns"] == ["float model", "labels"]
    names = ["float32", "level 8", "level 4", "level 2", "level 1", "3 bits"]
    assert list(found["rows"]) == names
    digits, wanted = np.load(place / "digits.npy"), classes(place, level=32)
    assert found["rows"]["float32"]["scores"]["labels"]["mean"] == np.mean(wanted == digits)
    assert "float model" not in found["rows"]["float32"]["scores"]
    for name, options in (("level 1", {"level": 1}), ("3 bits", {"bits": 3.0})):
        row, answers = found["rows"][name], classes(place, **options)
        assert row["scores"]["float model"]["mean"] == np.mean(answers == wanted)
        assert row["scores"]["labels"]["mean"] == np.mean(answers == digits)
        assert row["degraded"] == 0
    assert [found["rows"][f"level {n}"]["bits_per_weight"] for n in (8, 1)] == [8, 1]
    for row in found["rows"].values():
        for score in row["scores"].values():
            assert 0 <= score["low"] < score["mean"] <= score["high"] <= 1
            assert score["interval"] == "wilson"


def test_files_and_folders_say_the_same(place):
    one = evaluate(place, "--labels", "digit")
    assert evaluate(place, "--labels", "digit", data="parts") == one
    beside = evaluate(place, "--labels", place / "digits.npy", data="images.npz")
    assert beside == one
    more = evaluate(place, "--data", place / "images.npz", data="images.npz", bank="whole.bank")
    assert more["samples"] == 2 * SAMPLES


def test_the_float_model_may_be_a_file(place):
    model = ("--model", place / "digits.onnx")
    found = evaluate(place, *model, data="images.npz")
    assert found["reference"].endswith("digits.onnx") and found["columns"] == ["float model"]
    own = evaluate(place, data="images.npz")
    assert own["reference"] == "level 32 of the bank" and found["rows"] == own["rows"]
    assert "float32" in evaluate(place, *model, bank="small.bank", data="images.npz")["rows"]


def test_a_cosine_and_a_function_of_one_s_own(place, tmp_path):
    cosine = evaluate(place, "--metric", "cosine", "--levels", "8,1", data="images.npz")
    eight, one = (cosine["rows"][f"level {n}"]["scores"]["float model"] for n in (8, 1))
    assert one["mean"] < eight["mean"] < 1 and one["interval"] == "bootstrap"
    assert one["low"] < one["mean"] < one["high"]
    (tmp_path / "own.py").write_text(
        "def top2(outputs, wanted, label):\n"
        "    return label in outputs['logits'][0].argsort()[-2:]\n"
    )
    own = ("--labels", "digit", "--metric", f"{tmp_path / 'own.py'}:top2")
    found = evaluate(place, *own, bank="small.bank")
    right = evaluate(place, "--labels", "digit", bank="small.bank")
    assert found["columns"] == ["top2"] and found["reference"] is None
    for name, row in found["rows"].items():
        assert row["scores"]["top2"]["mean"] >= right["rows"][name]["scores"]["labels"]["mean"]


def test_a_policy_has_a_row(place, tmp_path):
    answer = boundary_model(
        place / "whole.bank", stage="answer", tap="logits", pool=(10,), scores="logits"
    )
    bank = with_boundary(place / "whole.bank", tmp_path / "m.bank", answer)
    found = evaluate(place, "--policy", "escalate", "--levels", "2", bank=bank, data="images.npz")
    low, policy = found["rows"]["level 2"], found["rows"]["escalate"]
    assert low["bits_per_weight"] == 2 < policy["bits_per_weight"]


def test_table_page_and_progress(place, tmp_path):
    command = ("eval", place / "whole.bank", "--data", place / "test.npz", "--labels", "digit")
    out, err = bapq(*command, "--levels", "8,auto", "--plot", tmp_path / "a.html")
    lines = out.splitlines()
    assert len({len(line) for line in lines[:5]}) == 1
    assert [line.split("|")[1].strip() for line in lines[2:5]] == ["float32", "level 8", "auto"]
    assert lines[6].startswith(f"top1 on {SAMPLES} samples; in brackets 95 % intervals, Wilson's")
    assert err.startswith("evaluate: ") and err.count("\n") == 1
    page = (tmp_path / "a.html").read_text()
    assert page.count("<svg") == 2 and "1 - top1, labels" in page
    bapq(*command, "-o", tmp_path / "a.json")
    assert json.loads((tmp_path / "a.json").read_text())["samples"] == SAMPLES


def test_samples_that_the_bank_knows_are_warned_of(place):
    command = ("eval", place / "small.bank", "--data", place / "calibration.npz", "--quiet")
    _, err = bapq(*command, "--model", place / "digits.onnx", "--levels", 1)
    assert "was built with these very samples" in err and err.count("\n") == 1


def test_an_absent_plane_is_told_once(place, tmp_path):
    bank = shutil.copytree(place / "whole.bank", tmp_path / "a.bank")
    (bank / "planes/r8.bin").unlink()
    command = ("eval", bank, "--data", place / "images.npz", "--levels", "4,1", "--quiet")
    _, err = bapq(*command)
    assert "without planes/r8.bin" in err and err.count("\n") == 1


def test_slips_are_one_line_each(place, tmp_path):
    np.save(tmp_path / "few.npy", np.zeros(SAMPLES - 1, np.int64))
    np.save(tmp_path / "many.npy", np.zeros(SAMPLES + 1, np.int64))
    np.save(tmp_path / "high.npy", np.full(SAMPLES, 10))
    np.savez(tmp_path / "other.npz", picture=np.zeros((2, 1, 8, 8), np.float32))
    make_model("digits_mlp", tmp_path / "mlp.onnx")
    images, parts = place / "images.npz", place / "parts"
    few = f"{SAMPLES - 1} labels for {SAMPLES} samples"
    for bank, data, arguments, error, words in [
        ("small", images, (), errors.NoReferenceError, "--model MODEL.onnx, or --labels"),
        ("small", images, ("--model", tmp_path / "no.onnx"), errors.InputFileError, "no.onnx"),
        ("whole", images, ("--model", tmp_path / "mlp.onnx"), errors.RequestError, "the bank"),
        ("whole", images, ("--metric", "top5"), errors.MetricError, "top1, cosine, iou"),
        ("whole", images, ("--metric", "iou"), errors.MetricError, "iou needs"),
        ("whole", images, ("--judge", "z"), errors.MetricError, "the model has logits"),
        ("whole", images, ("--labels", "y"), errors.LabelError, "no labels 'y'"),
        ("whole", images, ("--labels", tmp_path / "few.npy"), errors.LabelError, few),
        ("whole", images, ("--labels", tmp_path / "many.npy"), errors.LabelError, "labels for"),
        ("whole", parts, ("--labels", "image"), errors.CalibrationArrayError, "digit"),
        ("whole", images, ("--labels", tmp_path / "high.npy"), errors.LabelError, "0 to 9"),
        ("whole", tmp_path / "other.npz", (), errors.CalibrationArrayError, "needs image"),
        ("whole", tmp_path / "no.npz", (), errors.InputFileError, "cannot be read"),
        ("small", images, ("--labels", "y", "--levels", 4), errors.UnknownLevelError, "4"),
        ("whole", images, ("--policy", "gate"), errors.RequestError, "bapq fit"),
        ("whole", images, ("-o", tmp_path / "a.xml"), errors.RequestError, "md, json"),
        ("whole", images, ("--plot", tmp_path / "a.png"), errors.RequestError, ".html"),
    ]:
        command = ("eval", place / f"{bank}.bank", "--data", data, "--quiet")
        out, err = bapq(*command, *arguments, code=error.exit_code)
        assert out == "" and err.startswith("bapq: ") and err.count("\n") == 1
        assert words in err, err


def test_a_report_draws_the_answers_of_its_own_bank_and_of_no_other(place, tmp_path):
    bapq_eval = ("eval", place / "whole.bank", "--data", place / "test.npz", "--quiet", "--json")
    result, page = tmp_path / "eval.json", tmp_path / "report.html"
    out, _ = bapq(*bapq_eval, "--labels", "digit")
    result.write_text(out)
    bapq("report", place / "whole.bank", "--eval", result, "-o", page)
    text = page.read_text()
    assert "<h2>Answers</h2>" in text and "top1 on 60 samples" in text
    for row in json.loads(out)["rows"]:
        for score in row["scores"].values():
            assert f"{score['mean']:.4f} ({score['low']:.4f} to {score['high']:.4f})" in text
    code = errors.RequestError.exit_code
    _, err = bapq("report", place / "small.bank", "--eval", result, "-o", page, code=code)
    assert "is of a bank with digest" in err
    for wrong in ("{}", "[1]", "not JSON", out.replace('"mean": ', '"mean": "x", "no": ')):
        result.write_text(wrong)
        _, err = bapq("report", place / "whole.bank", "--eval", result, "-o", page, code=code)
        assert "is no result of bapq eval" in err
    assert page.read_text() == text
