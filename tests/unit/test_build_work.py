"""What a build does for its time: work that grows with the model, and the fast build."""

from __future__ import annotations

import resource

import numpy as np
import pytest
from onnx import helper

import bapq_edge
from bapq_edge.bank.reader import Bank
from bapq_edge.errors import StorageError
from bapq_tools import build_bank
from bapq_tools.build_support.spill import Spill
from bapq_tools.calibration import input_statistics
from bapq_tools.quantize import sensitivity
from support import onnx_models as models
from support.onnx_models import FLOAT, weights

node = helper.make_node


def chain(layers, columns=32):
    """Products one behind the other, the input added each time."""
    nodes, constants, source = [], {}, "x"
    for number in range(layers):
        constants[f"w{number}"] = weights(columns, columns, seed=number) / np.float32(6)
        nodes += [
            node("MatMul", [source, f"w{number}"], [f"h{number}"], f"layer{number}"),
            node("Add", [f"h{number}", "x"], [f"y{number}"]),
        ]
        source = f"y{number}"
    shapes = {"x": (FLOAT, ["n", columns])}, {source: (FLOAT, None)}
    return models.model(nodes, *shapes, constants)


def built(model, x, path, **options):
    return build_bank(model, path, calibration={"x": x}, workers=1, progress=False, **options)


def test_correlations_of_few_rows_cost_no_more_than_they_give():
    def multiplications(rows, columns, inputs):
        blocks = input_statistics._blocks(columns, 384, rows, inputs)
        assert [block.start for block in blocks[1:]] == [block.stop for block in blocks[:-1]]
        assert blocks[0].start == 0 and blocks[-1].stop == columns
        return sum((block.stop - block.start) ** 2 for block in blocks) * inputs

    for rows, columns in ((16, 100_000), (1, 1 << 20), (4096, 25_088), (64, 4608), (2, 384)):
        limit = max(1 << 38, rows * columns << 17, 2 * 384 * columns * 8192)
        assert multiplications(rows, columns, 8192) <= limit
    assert len(input_statistics._blocks(4608, 384, 16, 8192)) == 1  # what networks have


def test_samples_times_layers_are_bounded():
    for layers in (1, 54, 64, 200, 1200, 10_000):
        measured = {sensitivity.measured_before(number, layers) for number in range(layers)}
        runs = len(measured) * sensitivity.samples_compared(512, layers, 10**6)
        assert runs <= 64 * 32 and len(measured) >= min(layers, 128)
    resnet50 = 4 * 10**9
    assert sensitivity.samples_compared(512, 54, resnet50) == 32
    detector = 20 * 10**9
    assert sensitivity.samples_compared(3, 37, detector) == 1
    assert sensitivity.measured_before(53, 54) == 53


def test_layers_that_are_not_measured_are_like_one_before_them(tmp_path, monkeypatch):
    model, x = chain(12), weights(40, 32)
    every = Bank.open(built(model, x, tmp_path / "every.bank")).sensitivity()
    monkeypatch.setattr(sensitivity, "_MOST_LAYERS", 4)
    some = Bank.open(built(model, x, tmp_path / "some.bank")).sensitivity()
    np.testing.assert_array_equal(some[::3], every[::3])
    assert (some != every).any()
    assert (np.abs(np.log(some[:, 1:] / every[:, 1:])) < np.log(6)).all()


def test_a_fast_build_rounds_to_nearest_and_heeds_the_samples(tmp_path):
    """Columns that the samples hardly use weigh little, and biases are corrected."""
    model = models.model(
        [node("MatMul", ["x", "w"], ["y"], "product")],
        {"x": (FLOAT, ["n", 64])},
        {"y": (FLOAT, None)},
        {"w": weights(64, 48)},
    )
    rng = np.random.default_rng(3)
    mixing = rng.standard_normal((8, 64)) * np.where(np.arange(64) % 2, 3, 0.05)
    both = rng.standard_normal((600, 8)) @ mixing + 0.1 * rng.standard_normal((600, 64)) + 1
    x, fresh = both[:400].astype(np.float32), both[400:].astype(np.float32)
    (wanted,) = models.run(model, {"x": fresh})

    def error(bank):
        with bapq_edge.Session(bank, level=2) as session:
            return float(np.linalg.norm(session.run(None, {"x": fresh})[0] - wanted))

    fast = built(model, x, tmp_path / "fast.bank", fast=True)
    full = built(model, x, tmp_path / "full.bank")
    with pytest.warns(UserWarning, match="without calibration"):
        blind = build_bank(model, tmp_path / "blind.bank", workers=1, progress=False)
    (layer,) = Bank.open(fast).manifest.layers
    assert set(layer.method.values()) == {"nearest"}
    assert error(full) < error(fast) < error(blind)
    (compensated,) = Bank.open(full).manifest.layers
    assert layer.relative_error[8] < 1.2 * compensated.relative_error[8]


def test_a_fast_build_takes_convolutions_with_groups_and_many_layers(tmp_path):
    model = models.model(
        [
            node("Conv", ["x", "w"], ["h"], "grouped", group=2, kernel_shape=[3, 3]),
            node("Relu", ["h"], ["r"]),
            node("Conv", ["r", "v"], ["y"], "pointwise", kernel_shape=[1, 1]),
        ],
        {"x": (FLOAT, ["n", 16, "h", "w"])},
        {"y": (FLOAT, None)},
        {"w": weights(32, 8, 3, 3), "v": weights(40, 32, 1, 1)},
    )
    x = weights(9, 16, 8, 8)
    bank = built(model, x, tmp_path / "m.bank", fast=True)
    again = build_bank(
        model, tmp_path / "n.bank", calibration={"x": x}, workers=2, progress=False, fast=True
    )
    for name in ("p4.bin", "r8.bin", "s1.bin", "m1.bin"):
        found = [(tmp_path / each / "planes" / name).read_bytes() for each in ("m.bank", "n.bank")]
        assert found[0] == found[1]
    assert again.layers == bank.layers == 2
    with bapq_edge.Session(bank, level=8) as session:
        (y,) = session.run(None, {"x": x})
    (wanted,) = models.run(model, {"x": x})
    assert np.linalg.norm(y - wanted) < 0.02 * np.linalg.norm(wanted)


def test_arrays_that_the_disk_has_no_room_for_are_an_error_and_no_crash(tmp_path):
    spill = Spill(tmp_path)
    kept = spill.put(np.ones((1024, 512), np.float32))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(StorageError, match="File too large"):
            spill.zeros((1024, 512))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert kept.sum() == 1024 * 512
