"""What a build measures of plans: true on samples that it held out, kept in the bank, and used."""

from __future__ import annotations

import dataclasses
import json
import shutil
import warnings

import numpy as np
import onnx
import pytest
from onnx.helper import make_node as node

from bapq_edge import Session
from bapq_edge.bank.exchange import pack, unpack
from bapq_edge.bank.manifest import Expected, ExpectedPoint
from bapq_edge.bank.reader import Bank
from bapq_edge.cli import main
from bapq_edge.errors import BankFormatError, CalibrationWarning
from bapq_edge.planning.planner import Request, chunk_costs, plan
from bapq_tools import build_bank
from bapq_tools.calibration.samples import load_calibration
from support.hostile import sealed
from support.onnx_models import FLOAT, model

SAMPLES = 64
HELD_OUT = np.arange(4, 64, 8)


def weights(rng, *shape):
    return (rng.standard_normal(shape) / np.sqrt(shape[0])).astype(np.float32)


@pytest.fixture(scope="module")
def x():
    return np.random.default_rng(1).standard_normal((SAMPLES, 64)).astype(np.float32)


@pytest.fixture(scope="module")
def classifier():
    """64 values to the scores of 10 classes, and their Softmax."""
    rng = np.random.default_rng(0)
    nodes = [
        node("Gemm", ["x", "a", "b"], ["h"]),
        node("Relu", ["h"], ["r"]),
        node("Gemm", ["r", "c", "d"], ["scores"]),
        node("Softmax", ["scores"], ["y"]),
    ]
    tensors = {
        "a": weights(rng, 64, 512),
        "b": weights(rng, 512),
        "c": weights(rng, 512, 10),
        "d": weights(rng, 10),
    }
    return model(nodes, {"x": (FLOAT, ["n", 64])}, {"y": (FLOAT, ["n", 10])}, tensors)


@pytest.fixture(scope="module")
def bank(classifier, x, tmp_path_factory):
    path = tmp_path_factory.mktemp("expected") / "m.bank"
    return build_bank(
        classifier, path, calibration={"x": x}, levels=(32, 8, 4, 2, 1), progress=False
    ).bank


def test_what_is_stated_of_a_level_is_what_it_does_on_held_out_samples(bank, x):
    expected = Bank.open(bank).manifest.expected
    assert expected.samples == len(HELD_OUT) and expected.held_out
    assert expected.measure == "agreement"
    assert {point.level for point in expected.points} == {8, 4, 2, 1, 0}
    with Session(bank, level=32, threads=1) as session:
        wanted = session.run(None, {"x": x[HELD_OUT]})[0]

        def scores(y):
            logarithms = np.log(y.astype(np.float64))
            return logarithms - logarithms.mean(1, keepdims=True)

        for level in (8, 4, 2, 1):
            session.set_level(level)
            found = np.concatenate([session.run(None, {"x": x[[i]]})[0] for i in HELD_OUT])
            a, b = scores(found), scores(wanted)
            error = np.mean(np.square(a - b).sum(1) / np.square(b).sum(1))
            point = expected.level(level)
            assert point.error == pytest.approx(error, rel=1e-3)
            assert point.answers == pytest.approx(np.mean(a.argmax(1) == b.argmax(1)), rel=1e-5)


def test_the_planner_expects_what_was_measured(bank):
    costs = chunk_costs(Bank.open(bank))
    expected = costs.expected
    for level in (8, 4, 2, 1):
        found = plan(costs, Request(level=level))
        assert found.predicted_error == pytest.approx(expected.level(level).error, rel=1e-5)
    mixed = [point for point in expected.points if point.level == 0]
    assert len(mixed) >= 4
    for point in mixed:
        fitted = expected.of_mixture(point.table)
        assert fitted == pytest.approx(point.error, rel=0.5)
        found = plan(costs, Request(bits=point.bits * (1 + 1e-5)))
        assert found.predicted_error <= fitted * (1 + 1e-3)


def test_a_mixture_is_expected_to_do_as_its_measured_neighbours():
    def told(*measured):
        points = [
            ExpectedPoint(level=0, bits=3.0, table=table, error=error, answers=1.0)
            for table, error in measured
        ]
        return Expected(8, True, "agreement", 1.0, 0.5, tuple(points))

    curve = told((0.01, 0.02), (0.04, 0.08), (0.16, 0.08))
    assert curve.of_mixture(0.02) == pytest.approx(0.04)  # halfway on both logarithmic axes
    assert curve.of_mixture(0.08) == pytest.approx(0.08)
    assert curve.of_mixture(0.01 / 4) == pytest.approx(0.01)  # beyond: by the exponent
    assert curve.of_mixture(0.64) == pytest.approx(0.16)
    falls = told((0.01, 0.02), (0.04, 0.16), (0.16, 0.04))
    assert falls.of_mixture(0.04) == pytest.approx(0.08)  # noise: more error never helps
    assert falls.of_mixture(0.16) == pytest.approx(0.08)
    assert told().of_mixture(0.25) == pytest.approx(0.5)
    assert dataclasses.replace(told(), factor=0.0).of_mixture(0.25) == 0
    for expected in (told(), curve):  # as a forged manifest may have it
        assert np.isfinite(dataclasses.replace(expected, exponent=1e300).of_mixture(2.0))
    same = told((0.01, 0.02), (0.01, 0.02))
    assert same.of_mixture(0.01) == pytest.approx(0.02)


def test_a_level_that_does_better_than_its_errors_add_up_to_is_chosen(bank):
    costs = chunk_costs(Bank.open(bank))
    total = float(costs.sensitivity[:, costs.levels.index(2)].sum(dtype=np.float64))
    for error, chosen in ((total / 1000, True), (total * 1000, False)):
        point = ExpectedPoint(level=2, bits=2.0, table=total, error=error, answers=1.0)
        told = Expected(8, True, "agreement", 1.0, 1.0, (point,))
        found = plan(dataclasses.replace(costs, expected=told), Request(bits=2.0))
        assert (found.uniform_level == 2) == chosen


def test_the_bank_does_not_depend_on_the_number_of_workers(classifier, x, bank, tmp_path):
    again = build_bank(
        classifier,
        tmp_path / "m.bank",
        calibration={"x": x},
        levels=(32, 8, 4, 2, 1),
        workers=1,
        progress=False,
    ).bank
    assert Bank.open(again).manifest == Bank.open(bank).manifest


def test_an_embedding_is_judged_by_its_direction(x, tmp_path):
    rng = np.random.default_rng(3)
    nodes = [
        node("MatMul", ["x", "w"], ["e"]),
        node("LpNormalization", ["e"], ["y"], axis=1),
    ]
    embedding = model(
        nodes, {"x": (FLOAT, ["n", 64])}, {"y": (FLOAT, ["n", 128])}, {"w": weights(rng, 64, 128)}
    )
    path = build_bank(embedding, tmp_path / "e.bank", calibration={"x": x}, progress=False).bank
    expected = Bank.open(path).manifest.expected
    assert expected.measure == "cosine"
    assert expected.level(8).answers > expected.level(2).answers > expected.level(1).answers > 0


def test_it_stays_through_the_exchange_form(bank, tmp_path):
    packed = pack(unpack(bank, tmp_path / "folder"), tmp_path / "again.bank")
    assert Bank.open(packed).manifest.expected == Bank.open(bank).manifest.expected


def test_inspect_shows_and_draws_it(bank, classifier, tmp_path, capsys):
    assert main(["inspect", bank, "--plot"]) == 0
    lines = capsys.readouterr().out.splitlines()
    drawn = [line for line in lines if line.endswith("#")]
    bars = [len(line.rpartition(" ")[2]) for line in drawn]
    assert bars[0] > 3 * bars[-1] and "level 8" in drawn[-1]
    assert any("8 held-out samples" in line for line in lines)
    with pytest.warns(match="without calibration"):
        bare = build_bank(classifier, tmp_path / "bare.bank", progress=False).bank
    assert main(["inspect", bare, "--plot"]) != 0
    assert "build it with calibration data" in capsys.readouterr().err


# ---- samples ----


@pytest.mark.parametrize("samples", [1, 2, 9, 64, 1000])
def test_an_eighth_is_held_out_and_the_same_every_time(classifier, samples):
    values = np.arange(samples * 64, dtype=np.float32).reshape(samples, 64)
    data = load_calibration({"x": values}, classifier.graph.input)
    learnt, held_out = data.split()
    again = data.split()[1]
    assert held_out.numbers == again.numbers
    assert held_out.samples == min(max(samples // 8, 1), 64)
    seen = [
        {part.feed(sample)["x"][0, 0].item() for sample in range(part.samples)}
        for part in (learnt, held_out)
    ]
    assert len(seen[0] | seen[1]) == samples
    assert samples == 1 or not seen[0] & seen[1]


def doubts(classifier, path, x):
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        build_bank(classifier, path, calibration={"x": x}, progress=False)
    assert all(warning.category is CalibrationWarning for warning in heard)
    assert all(warning.filename == __file__ for warning in heard)
    return [str(warning.message) for warning in heard]


def test_samples_that_cannot_do_are_told_with_the_number_that_would(classifier, x, tmp_path):
    path = tmp_path / "m.bank"
    assert doubts(classifier, path, x) == []
    (few,) = doubts(classifier, path, x[:3])
    assert "3 samples, too few" in few and "128 would do" in few
    (copies,) = doubts(classifier, path, np.tile(x[:9], (8, 1)))
    assert "of the 72 calibration samples 9 differ" in copies and "128" in copies
    noise = np.random.default_rng(5).standard_normal(x.shape).astype(np.float32)
    (alike,) = doubts(classifier, path, x[:1] + 1e-4 * noise)
    assert "too much alike" in alike and "128" in alike
    (one,) = doubts(classifier, path, x[:1] + 0.1 * noise)
    assert "of class" in one and "of 10 that it knows" in one and "128" in one


def test_the_build_ends_with_what_to_expect(classifier, x, tmp_path, capsys):
    onnx.save(classifier, tmp_path / "m.onnx")
    np.savez(tmp_path / "x.npz", x=x)
    command = ["build", str(tmp_path / "m.onnx"), "--calibration", str(tmp_path / "x.npz")]
    assert main([*command, "--quiet", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    plans = {row["plan"]: row for row in report["expected"]}
    assert list(plans) == ["level 8", "level 4", "3 bits", "level 2", "level 1"]
    assert report["relative_error"] == {} and report["coverage"] == 1.0
    bank = Bank.open(tmp_path / "m.bank")
    for level in (8, 4, 2, 1):
        assert plans[f"level {level}"]["weight_bytes"] == bank.weight_bytes(level)
    assert 2.25 <= plans["3 bits"]["bits"] <= 3
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "what you can expect, measured on 8 held-out samples" in printed
    assert "coverage: 100.0% of the weights" in printed and "mean relative error" not in printed
    assert len([line for line in printed.splitlines() if line.startswith("level ")]) == 4


# ---- the format ----


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("measure", "luck", "must be one of agreement, cosine"),
        ("factor", -1, "finite number, 0 or more"),
        ("points", [], "must be 1 to 256"),
        ("samples", None, "samples"),
    ],
)
def test_what_is_wrong_is_refused(bank, tmp_path, key, value, message):
    copy = shutil.copytree(bank, tmp_path / "m.bank")
    document = json.loads((copy / "manifest.json").read_text())
    document["expected"][key] = value
    (copy / "manifest.json").write_bytes(sealed(document))
    with pytest.raises(BankFormatError, match=message):
        Bank.open(copy)


def test_points_stand_in_order_and_a_level_once(bank, tmp_path):
    copy = shutil.copytree(bank, tmp_path / "m.bank")
    document = json.loads((copy / "manifest.json").read_text())
    points = document["expected"]["points"]
    for wrong in (points[::-1], [*points, points[-1]], [{**points[0], "level": 3}]):
        document["expected"]["points"] = wrong
        (copy / "manifest.json").write_bytes(sealed(document))
        with pytest.raises(BankFormatError, match="expected"):
            Bank.open(copy)
