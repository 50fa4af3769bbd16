"""Rows that inputs of a class can do without, from the samples to the session that skips them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper, parser

from bapq_edge import Session
from bapq_edge.bank.boundary import Precision
from bapq_edge.bank.codes import dequantize
from bapq_edge.bank.reader import Bank
from bapq_edge.cli import main
from bapq_edge.errors import BoundaryWarning, RequestError
from bapq_tools import build_bank
from bapq_tools.boundary.rewrite import output_rows, rewrite
from bapq_tools.boundary.study import Study
from bapq_tools.row_skipping.pruning import Samples, prune_rows
from bapq_tools.row_skipping.row_gate import fit_row_gate

CLASSES, OWN_ROWS, INPUTS = 4, 32, 48

GRAPH = """g (float[n, 48] x) => (float[n, 4] scores) {
    product = MatMul(x, w)
    shifted = Add(product, bias)
    hidden = Relu(shifted)
    scores = MatMul(hidden, v)
}"""


@pytest.fixture(scope="module")
def model():
    """Each class has 32 hidden rows of its own, which any other class hardly moves."""
    rng = np.random.default_rng(0)
    of_row = np.random.default_rng(1).permutation(np.repeat(np.arange(CLASSES), OWN_ROWS))
    weight = rng.normal(0, 0.02, (INPUTS, len(of_row)))
    weight[of_row, np.arange(len(of_row))] += 1
    read = np.eye(CLASSES)[of_row] * rng.uniform(0.5, 1, (len(of_row), 1))
    graph = parser.parse_graph(GRAPH)
    values = {"w": weight, "bias": np.full(len(of_row), 0.1), "v": read}
    graph.initializer.extend(
        numpy_helper.from_array(array.astype(np.float32), name) for name, array in values.items()
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.fixture(scope="module")
def inputs():
    """(600, 48): of one class each, and some between two."""
    rng = np.random.default_rng(2)
    x = rng.normal(0, 0.2, (600, INPUTS))
    x[np.arange(600), np.arange(600) // 2 % CLASSES] += rng.uniform(1, 3, 600)
    x[:60, :CLASSES] = rng.uniform(1, 1.2, (60, CLASSES))
    return x.astype(np.float32)


@pytest.fixture(scope="module")
def bank(model, inputs, tmp_path_factory):
    path = tmp_path_factory.mktemp("bank") / "m.bank"
    return Path(
        build_bank(model, path, calibration={"x": inputs[::3]}, levels=(8, 2), progress=False)
    )


def agreement(found, wanted):
    return np.array([float(a.argmax() == b.argmax()) for a, b in zip(found, wanted, strict=True)])


def request(bank, inputs, groups, **changes):
    """Arguments of `prune_rows`: even inputs are fitted to, the others are held out."""
    with Session(bank, level=8, threads=1) as session:
        answers = [session.run(None, {"x": x[None]})[0] for x in inputs[1::2]]
    feeds = [{"x": x[None]} for x in inputs]
    return {
        "bank": bank,
        "precision": Precision(level=8),
        "fitted": Samples(feeds[::2], groups[::2]),
        "held_out": Samples(feeds[1::2], groups[1::2]),
        "reference": answers,
        "output": "scores",
        "agreement": agreement,
        "regions": int(groups.max()) + 1,
        "tolerance": 0.05,
        **changes,
    }


def regions_of(inputs):
    """The class, and a region of its own for inputs between classes."""
    regions = inputs[:, :CLASSES].argmax(1)
    regions[:60] = CLASSES
    return regions


def test_each_region_skips_rows_of_other_classes_and_loses_nothing(bank, inputs, tmp_path):
    regions = regions_of(inputs)
    found = prune_rows(**request(bank, inputs, regions))
    (name,) = found.row_order
    new = Bank.open(
        rewrite(bank, tmp_path / "n.bank", row_order=found.row_order, chunk_rows=found.chunk_rows)
    )
    layer = new.layer(name)
    assert layer.chunk_rows == 16
    assert found.skipped.shape == (5, new.manifest.chunk_count)
    # Half of the layer, the most that is allowed, in the regions of one class.
    np.testing.assert_array_equal(found.skipped_rows[name][:CLASSES], 64)
    np.testing.assert_array_equal(
        found.skipped[:, layer.chunk_range].sum(1) * 16, found.skipped_rows[name]
    )
    assert not found.losses[regions[1::2] < CLASSES].any()
    assert (found.threshold[:CLASSES] > 0).all()
    # What stands in for a row is its mean over those inputs of the region that were fitted to.
    order = output_rows(new, layer)
    weight = dequantize(new.layer_codes(layer), 8, layer.residual_steps, layer.scale_columns)
    own = weight[:, :CLASSES].argmax(1)
    assert sorted(order) == list(range(CLASSES * OWN_ROWS))
    before = new.manifest.layers[: new.manifest.layers.index(layer)]
    start = sum(each.stored_rows for each in before)
    for region in range(CLASSES):
        skipped = np.repeat(found.skipped[region, layer.chunk_range] > 0, 16)
        # One that its mean may replace without loss fills a chunk.
        assert (own[skipped] == region).sum() <= 1
        mine = inputs[::2][regions[::2] == region]
        expected = np.maximum(mine @ weight.T + 0.1, 0).mean(0)
        values = found.row_values[region, start : start + len(order)]
        np.testing.assert_allclose(values, expected, atol=0.02)


def test_regions_with_too_few_samples_skip_nothing_and_say_so(bank, inputs):
    regions = regions_of(inputs)
    with pytest.warns(
        BoundaryWarning, match=r"region 4 has 30 samples and 30 held out, 49 are needed"
    ):
        found = prune_rows(**request(bank, inputs, regions, tolerance=0.02))
    assert not found.skipped[4].any()
    assert found.skipped[:4].any(1).all()


def test_where_rows_cannot_be_spared_none_is(bank, inputs):
    """One region of everything: any half of the rows is what some class needs."""
    regions = np.zeros(len(inputs), int)
    found = prune_rows(**request(bank, inputs, regions, tolerance=0.01))
    assert not found.skipped.any() and not found.row_order and not found.row_values.any()
    whole = prune_rows(
        **request(bank, inputs, regions, tolerance=0.01, reference=[np.zeros((1, 4))] * 300)
    )
    assert whole.losses.mean() > 0.5  # nothing was lost by skipping: it disagreed before


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tolerance": 0.0}, "the tolerance is 0.0: choose one between 0 and 1"),
        ({"reference": []}, "0 reference answers for 300 held-out samples"),
        ({"regions": 4}, "fitted samples have regions 0 to 4, of 4"),
        ({"fitted": Samples([], np.arange(0))}, "0 fitted samples and 0 regions of them"),
        ({"held_out": Samples([], np.arange(3))}, "0 held-out samples and 3 regions of them"),
    ],
)
def test_samples_that_do_not_fit_are_refused(bank, inputs, changes, words):
    with pytest.raises(RequestError, match=words):
        prune_rows(**request(bank, inputs, regions_of(inputs), **changes))


def test_a_session_skips_the_rows_by_the_gate_that_was_fitted(model, bank, inputs, tmp_path):
    with Study(bank, {"x": inputs}, model, progress=False) as study:
        gate = fit_row_gate(study, np.arange(len(inputs)), 8, tolerance=0.05, doubt=0.2)
        wanted = study.classes
    pruning = gate.pruning
    path = rewrite(
        bank,
        tmp_path / "n.bank",
        row_order=pruning.row_order,
        chunk_rows=pruning.chunk_rows,
        boundary=[(gate.model, gate.arrays)],
        split=gate.split,
    )
    rng = np.random.default_rng(3)
    x = rng.normal(0, 0.2, (80, INPUTS)).astype(np.float32)
    x[np.arange(80), np.arange(80) % CLASSES] += 3
    bits = float(gate.arrays["outlook"][0, 0])
    assert bits < 6  # of 8
    seen = []
    with Session(path, policy="gate", bits=bits, threads=1) as session:
        for i, row in enumerate(x):
            (scores,) = session.run(None, {"x": row[None]})
            stats = session.stats()
            assert scores.argmax() == i % CLASSES
            assert stats.region == 1 + i % CLASSES
            seen.append(stats.bits_per_weight)
        session.run(None, {"x": inputs[:1]})
        assert session.stats().region == 0
    assert np.mean(seen) == pytest.approx(bits, abs=1.5)
    assert max(seen) < 8
    with Session(path, level=8, threads=1) as session, Session(bank, level=8) as other:
        for row in inputs[:20]:
            (one,), (two,) = (s.run(None, {"x": row[None]}) for s in (session, other))
            np.testing.assert_array_equal(one, two)
    assert len(np.unique(wanted)) == CLASSES


def test_a_gate_of_rows_is_for_classifiers(model, bank, inputs):
    with (
        Study(bank, {"x": inputs[:100]}, model, agreement="cosine", progress=False) as study,
        pytest.raises(RequestError, match="a gate of rows is for classifiers"),
    ):
        fit_row_gate(study, np.arange(100), 8, tolerance=0.05)


def test_the_command_fits_a_gate_of_rows(bank, model, inputs, tmp_path, capsys):
    onnx.save(model, tmp_path / "m.onnx")
    np.savez(tmp_path / "x.npz", x=inputs)
    command = ["fit", str(bank), "--calibration", str(tmp_path / "x.npz"), "--quiet", "--json"]
    command += ["--model", str(tmp_path / "m.onnx"), "-o", str(tmp_path / "rows.bank")]
    assert main([*command, "--skip-rows", "8", "--tolerance", "0.05"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["bits"] < report["bits_whole"] and report["agreement"] > 0.9
    assert 0.1 < max(report["skipped"].values()) < 1
    with Session(tmp_path / "rows.bank", policy="gate", threads=1) as session:
        session.run(None, {"x": inputs[-1:]})
        assert session.stats().bits_per_weight < report["bits_whole"]
    for more, told in (
        (("--skip-rows", "8", "--tolerance", "1e-6"), "no region can spare rows at a tolerance of"),
        (("--skip-rows", "4"), "level 4 is not in the bank, it has 8, 2"),
        (("--skip-rows", "8", "--tolerance", "2"), "tolerance is 2, must be above 0 and below 1"),
        (("--tolerance", "0.1"), "--tolerance is for --skip-rows"),
        (("--skip-rows", "8", "--escalate", "2:8"), "--escalate is for precisions"),
    ):
        assert main([*command, *more]) != 0
        assert told in capsys.readouterr().err
