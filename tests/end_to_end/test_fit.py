"""`bapq fit`: what it states of held-out samples is what the device then does with them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

import bapq_tools
from bapq_edge import Session, errors
from bapq_edge.adaptive.boundary_model import BoundaryModel
from bapq_edge.adaptive.policies import Escalate, Gate
from bapq_edge.bank.boundary import Precision
from bapq_edge.bank.manifest import Batched
from bapq_edge.bank.reader import Bank
from bapq_tools.boundary.agreement import Judge
from bapq_tools.boundary.fit import fit_models
from bapq_tools.boundary.folds import held_out
from bapq_tools.boundary.study import Study
from benchmarks.zoo import make_model
from benchmarks.zoo.digits import INPUT_NAMES, split_of

OUTPUTS = {"cnn": "logits", "mlp": "probabilities"}
IMAGES = {kind: split_of(kind).x_test for kind in OUTPUTS}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Digits models as <kind>.onnx and <kind>.bank, and the test images as <kind>.npz."""
    folder = tmp_path_factory.mktemp("fit")
    for kind in OUTPUTS:
        make_model(f"digits_{kind}", folder / f"{kind}.onnx")
        split = split_of(kind)
        bapq_tools.build_bank(
            folder / f"{kind}.onnx",
            folder / f"{kind}.bank",
            calibration={INPUT_NAMES[kind]: split.x_calibration},
            progress=False,
        )
        np.savez(folder / f"{kind}.npz", **{INPUT_NAMES[kind]: IMAGES[kind]})
    return folder


def fit(place, out, kind="mlp", model=True, **options):
    """The report of a fit of the digits model to the test images."""
    return bapq_tools.fit(
        place / f"{kind}.bank",
        options.pop("calibration", place / f"{kind}.npz"),
        place / f"{kind}.onnx" if model else None,
        out=out,
        progress=False,
        **options,
    )


def on_the_device(bank, kind, model, point, rows):
    """Mean bits of a session that runs the point, input by input, and its answers."""
    policy = Escalate if model.description.stage == "answer" else Gate
    with Session(bank, policy=policy(model, point), threads=1) as session:
        found = answers(session, kind, rows)
        return session.stats().mean_bits_per_weight, found


def answers(session, kind, rows):
    """Of a session of any kind, one array per input."""
    feeds = ({INPUT_NAMES[kind]: IMAGES[kind][row : row + 1]} for row in rows)
    return [session.run([OUTPUTS[kind]], feed)[0] for feed in feeds]


@pytest.mark.parametrize(
    ("kind", "options", "judge", "stages"),
    [
        (
            "mlp",
            {"escalate": ["1:8", "1.5b:4"]},
            {"kind": "argmax"},
            ["start", "answer", "answer"],
        ),
        (
            "cnn",
            {"tap": ["pool"], "escalate": ["1:2"]},
            {"kind": "argmax"},
            ["gate", "answer"],
        ),
        (
            "cnn",
            {"agreement": "cosine", "tap": ["pool"], "escalate": ["1:8"]},
            {"kind": "cosine"},
            ["gate", "answer"],
        ),
        (
            "mlp",
            {"agreement": "tolerance:0.05", "tap": ["pixels"], "escalate": ["2:8"]},
            {"kind": "tolerance", "tolerance": 0.05},
            ["start", "answer"],
        ),
    ],
    ids=["start and answers", "split graph", "cosine", "tolerance"],
)
def test_the_device_does_with_held_out_samples_what_the_fit_states(
    place, tmp_path, kind, options, judge, stages
):
    report = fit(place, tmp_path / "m.bank", kind, seed=1, **options)
    bank = Bank.open(tmp_path / "m.bank")
    assert [model.stage for model in report.models] == stages
    reference = Judge(OUTPUTS[kind], **judge)
    rows = np.flatnonzero(held_out(np.arange(600), 1))
    assert report.held_out == len(rows)
    wanted = answers(onnxruntime.InferenceSession(place / f"{kind}.onnx"), kind, rows)
    for entry, stated in zip(bank.manifest.boundary, report.models, strict=True):
        model = BoundaryModel.of(bank, entry.model)
        points = model.points
        point = points[len(points) // 2]
        bits, found = on_the_device(bank.path, kind, model, point, rows)
        assert bits == pytest.approx(point.bits, rel=1e-5)
        agreement = reference.agreement(found, wanted).mean()
        assert agreement == pytest.approx(point.agreement, abs=1e-6)
        assert stated.points[len(points) // 2].bits == point.bits
        assert all(p.agreement_bound <= p.agreement for p in points)


def test_escalation_saves_most_of_the_bits_and_keeps_the_agreement(place, tmp_path):
    report = fit(place, tmp_path / "m.bank", escalate=["1:8"], target_agreement=0.97)
    static = {each.precision: each.agreement for each in report.static}
    assert static["level 1"] < 0.985
    (answer,) = (model for model in report.models if model.stage == "answer")
    chosen = answer.points[answer.chosen]
    assert chosen.agreement_bound >= 0.97 and chosen.bits < 4
    with Session(tmp_path / "m.bank", policy="escalate", target_agreement=0.97) as session:
        session.run(None, {"pixels": IMAGES["mlp"][:1]})
        assert session.stats().bits_per_weight in (1.0, 9.0)
    assert report.batched and Bank.open(tmp_path / "m.bank").manifest.batched == Batched(
        ("pixels",), ("label", "probabilities")
    )
    text = str(report)
    assert "of a batch only its samples in doubt are answered again" in text
    assert "keeps 0.97" in text and "answer-1-8" in text and "static level 1: 1.00 bits" in text


def files_of(bank):
    return {str(p.relative_to(bank)): p.read_bytes() for p in bank.rglob("*") if p.is_file()}


def test_a_fit_can_be_repeated_and_replaces_the_one_before(place, tmp_path):
    before = files_of(place / "mlp.bank")
    fit(place, tmp_path / "a.bank", escalate=["1:8", "2:8"])
    fit(place, tmp_path / "b.bank", escalate=["1:8", "2:8"])
    assert files_of(place / "mlp.bank") == before
    assert files_of(tmp_path / "a.bank") == files_of(tmp_path / "b.bank")
    found = files_of(tmp_path / "a.bank")
    same = [name for name in before if name != "manifest.json"]
    assert {name: found[name] for name in same} == {name: before[name] for name in same}
    os.rename(tmp_path / "b.bank", tmp_path / "mlp.bank")
    for name in ("mlp.onnx", "mlp.npz"):
        os.symlink(place / name, tmp_path / name)
    fit(tmp_path, None, escalate=["4:8"])  # in place
    names = [each.model.name for each in Bank.open(tmp_path / "mlp.bank").manifest.boundary]
    assert "answer-4-8" in names and "answer-1-8" not in names


def test_a_target_that_is_not_met_is_refused_with_what_can_be(place, tmp_path):
    with pytest.raises(errors.TargetNotMetError, match=r"agreement 0\.9999 is not shown by 300 "):
        fit(place, tmp_path / "m.bank", target_agreement=0.9999)
    assert not (tmp_path / "m.bank").exists()
    with pytest.raises(errors.TargetNotMetError, match=r"at most 0\.9\d+ .*give more samples"):
        fit(place, tmp_path / "m.bank", target_agreement=0.999, escalate=["1:8"])


def test_the_reference_may_be_level_32_of_the_bank(place, tmp_path):
    images = {"pixels": IMAGES["mlp"]}
    bapq_tools.build_bank(
        place / "mlp.onnx",
        tmp_path / "mlp.bank",
        calibration={"pixels": split_of("mlp").x_calibration},
        levels=(32, 4, 1),
        progress=False,
    )
    report = fit(tmp_path, tmp_path / "m.bank", model=False, calibration=images)
    assert [model.name for model in report.models] == ["gate", "answer-4-32", "answer-1-4"]
    assert [each.precision for each in report.static] == ["level 1", "2.5 bits", "level 4"]


def test_one_study_serves_many_fits_of_some_samples(place):
    name = INPUT_NAMES["mlp"]
    x = IMAGES["mlp"]
    groups = np.arange(600) // 3
    with Study(
        place / "mlp.bank", {name: x}, place / "mlp.onnx", groups=groups, progress=False
    ) as study:
        rows = np.flatnonzero(groups % 2 == 0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", errors.BoundaryWarning)
            report = fit_models(study, rows=rows, escalate=["1:8"]).report
        assert (report.samples, report.held_out, report.groups) == (300, 150, 50)
        for rows in ([0, 0], [600], [0.5], [[1]]):
            with pytest.raises(errors.RequestError, match="from 0 to 599, each once"):
                fit_models(study, rows=rows)


def test_taps_that_tell_nothing_leave_a_bank_without_a_gate(place, tmp_path):
    with pytest.warns(errors.BoundaryWarning, match="no gate: no tap tells inputs apart better"):
        report = fit(place, tmp_path / "m.bank", agreement="tolerance:1e9")  # all agree
    assert {model.stage for model in report.models} == {"answer"}


def test_doubtful_samples_and_references_are_told(place, tmp_path):
    seen = {"pixels": split_of("mlp").x_calibration}
    with pytest.warns(errors.BoundaryWarning, match="built with these very samples"):
        fit(place, tmp_path / "m.bank", calibration=seen, tap=["pixels"])
    other = tmp_path / "mlp.onnx"
    model = onnx.load_model(place / "mlp.onnx")
    model.doc_string = "another file"
    onnx.save_model(model, other)
    os.symlink(place / "mlp.bank", tmp_path / "mlp.bank")
    with pytest.warns(errors.BoundaryWarning, match="is not the file that .* was built from"):
        fit(tmp_path, tmp_path / "o.bank", calibration=place / "mlp.npz", tap=["pixels"])


def images(count=600, **changes):
    return {"pixels": IMAGES["mlp"][:count], **changes}


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"calibration": images(60)}, errors.TooFewSamplesError, "60 samples are too few.*80"),
        (
            {"groups": np.arange(600) // 60},
            errors.TooFewSamplesError,
            "10 groups are too few to split: give 16 or more",
        ),
        (
            {"calibration": {"pixels": np.repeat(images()["pixels"][:1], 100, 0)}},
            errors.SingleClassError,
            "class 5 to all 100 samples",
        ),
        ({"tap": ["nothing"]}, errors.NoTapError, "tap 'nothing' is no tensor"),
        ({"tap": ["probabilities"]}, errors.NoTapError, "does not cut the graph"),
        ({"model": False}, errors.RequestError, "levels 8, 4, 2, 1 and not 32.*--model"),
        ({"agreement": "same"}, errors.RequestError, "'same' is unknown"),
        ({"judge": "label"}, errors.RequestError, "holds int64"),
        ({"escalate": ["8:2"]}, errors.RequestError, "from 8 bits to 2: choose a higher"),
        ({"escalate": ["2-8"]}, errors.RequestError, "'2-8' is unknown: write 2:8"),
        ({"escalate": ["0.5b:8"]}, errors.RequestError, "unknown: write 2:8"),
        ({"escalate": ["8:32"]}, errors.UnknownLevelError, "level 32 is not in the bank"),
        ({"target_agreement": 1.5}, errors.RequestError, "1.5, must be above 0"),
        ({"confidence": 1.0}, errors.RequestError, "confidence is 1.0"),
        ({"confidence": "high"}, errors.RequestError, "confidence is 'high'"),
        ({"seed": -5}, errors.RequestError, "seed is -5, must be a whole number from 0 on"),
        ({"seed": 0.5}, errors.RequestError, "seed is 0.5"),
        ({"tap": "pixels"}, errors.RequestError, r"give a list, such as \['pixels'\]"),
        ({"escalate": "2:8"}, errors.RequestError, r"give a list, such as \['2:8'\]"),
        ({"calibration": 5}, errors.CalibrationError, "of type int"),
        ({"groups": [1, 2]}, errors.RequestError, r"shape \(2,\), expected integers \(600,\)"),
        (
            {"calibration": {"pixels": np.zeros((100, 63), np.float32)}},
            errors.CalibrationShapeError,
            r"\(100, 63\)",
        ),
        ({"calibration": {"image": images()["pixels"]}}, errors.CalibrationArrayError, "pixels"),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else None,
)
def test_what_cannot_be_fitted_is_refused_in_one_line(place, tmp_path, options, error, words):
    with pytest.raises(error, match=words) as caught:
        fit(place, tmp_path / "m.bank", **options)
    assert "\n" not in str(caught.value)
    assert not os.listdir(tmp_path)


def test_a_tap_of_constant_values_is_refused(place, tmp_path):
    """One pixel's worth of light in every image: the probe has nothing to go by."""
    images = IMAGES["mlp"].copy()
    with Study(place / "mlp.bank", {"pixels": images}, place / "mlp.onnx", progress=False) as study:
        for feed in study.feeds:
            feed["pixels"][:] = 1  # after the reference was run
        with pytest.raises(errors.NoTapError, match="tap 'pixels': all 300 samples have the same"):
            fit_models(study, tap=["pixels"])


def test_a_bank_of_one_level_leaves_nothing_to_choose(place, tmp_path):
    bapq_tools.build_bank(
        place / "mlp.onnx",
        tmp_path / "mlp.bank",
        calibration={"pixels": split_of("mlp").x_calibration},
        levels=(4,),
        progress=False,
    )
    os.symlink(place / "mlp.onnx", tmp_path / "mlp.onnx")
    with pytest.raises(errors.BoundaryError, match=r"holds level 4 alone.*with more levels"):
        fit(tmp_path, tmp_path / "m.bank", calibration=images())


def test_a_model_of_another_interface_is_refused(place, tmp_path):
    with pytest.raises(errors.RequestError, match="has the inputs image, the bank pixels"):
        bapq_tools.fit(place / "mlp.bank", images(), place / "cnn.onnx", progress=False)
    (tmp_path / "bad.onnx").write_bytes(b"no model")
    with pytest.raises(errors.ModelFormatError, match=r"bad\.onnx: ONNX Runtime refuses it"):
        bapq_tools.fit(place / "mlp.bank", images(), tmp_path / "bad.onnx", progress=False)
    with pytest.raises(errors.InputFileError, match=r"none\.onnx cannot be read: No such file"):
        bapq_tools.fit(place / "mlp.bank", images(), tmp_path / "none.onnx", progress=False)


def test_the_command_fits_reports_and_refuses(place, tmp_path):
    command = [Path(sys.executable).with_name("bapq"), "fit", place / "mlp.bank"]
    command += ["--calibration", place / "mlp.npz", "--model", place / "mlp.onnx"]
    command += ["-o", tmp_path / "m.bank", "--escalate", "1:8", "2:8"]
    done = subprocess.run(
        [*command, "--json", "--target-agreement", "0.97"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["bank"], report["samples"]) == (str(tmp_path / "m.bank"), 600)
    assert [model["name"] for model in report["models"]] == ["gate", "answer-1-8", "answer-2-8"]
    assert "reference: " in done.stderr and "at level 1: " in done.stderr  # its progress
    entry = Bank.open(tmp_path / "m.bank").manifest.boundary[1].model
    assert (entry.base, entry.precisions) == (Precision(1), (Precision(1), Precision(8)))
    done = subprocess.run(
        [*command, "--quiet", "--target-agreement", "0.9999"], capture_output=True, text=True
    )
    assert done.returncode == errors.TargetNotMetError.exit_code
    assert done.stderr.startswith("bapq: agreement 0.9999 is not shown")
    assert done.stderr.count("\n") == 1


def test_models_that_a_plan_for_all_inputs_makes_needless_are_left_out(place, tmp_path):
    # At 0.9 level 2 answers all images well enough, in fewer bits than an escalation from it.
    options = {"kind": "cnn", "escalate": ["2:8"], "target_agreement": 0.9}
    report = fit(place, tmp_path / "m.bank", **options)
    assert "answer-2-8" in report.left_out
    manifest = Bank.open(tmp_path / "m.bank").manifest
    assert [each.model.name for each in manifest.boundary] == [
        each.name for each in report.models if each.name not in report.left_out
    ]
    best = min(manifest.static, key=lambda point: point.bits)
    kept = [point for point in manifest.static if point.agreement_bound >= 0.9]
    assert kept and len(manifest.static) - len(kept) <= 1  # it stops at the first that is too low
    bounds = [point.agreement_bound for point in manifest.static]
    assert bounds == sorted(bounds, reverse=True) and best.bits <= 2
    assert "answer-2-8 left out: " in str(report).replace("gate, ", "")
    cheapest = min(kept, key=lambda point: point.bits)
    assert report.static_plan.precision == str(cheapest.precision)
    assert f"{cheapest.precision} for all inputs keeps 0.9" in str(report)
    with Session(tmp_path / "m.bank", target_agreement=0.9, threads=1) as session:
        session.run(None, {"image": IMAGES["cnn"][:1]})
        chosen = min(kept, key=lambda point: point.bits)
        assert session.stats().bits_per_weight == pytest.approx(chosen.bits, rel=1e-3)
        assert session.stats().region is None
    kept_all = fit(place, tmp_path / "all.bank", **options, keep_all=True)
    assert kept_all.left_out == []
    names = [each.model.name for each in Bank.open(tmp_path / "all.bank").manifest.boundary]
    assert "answer-2-8" in names
