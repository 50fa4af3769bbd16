"""Layers with some of the bank's levels: what is stored, what is refused, what is planned."""

from __future__ import annotations

import dataclasses
import hashlib
import json

import numpy as np
import pytest

from bapq_edge.bank.exchange import pack, unpack
from bapq_edge.bank.layout import level_within, planes_for
from bapq_edge.bank.reader import Bank
from bapq_edge.bank.verify import verify
from bapq_edge.bank.writer import BankWriter
from bapq_edge.errors import BankFormatError, MissingPlaneWarning, RequestError
from bapq_edge.planning.planner import Request, chunk_costs, plan
from support.bank_samples import (
    GRAPH,
    SOURCE,
    Shape,
    add,
    assert_same_codes,
    files_of,
    random_codes,
    write_bank,
)
from support.hostile import sealed

LOW = (8, 4, 2, 1)
SHAPES = (
    Shape(40, 70, own_levels=(8, 4)),
    Shape(100, 96, chunk_rows=48),
    Shape(20, 40, own_levels=(4, 1)),
    Shape(3, 5, has_bias=False, own_levels=(8, 2)),
)


@pytest.fixture
def bank(tmp_path):
    write_bank(tmp_path / "m.bank", SHAPES, LOW)
    return Bank.open(tmp_path / "m.bank")


@pytest.mark.parametrize(
    ("own", "level", "expected"),
    [
        ((8, 4), 2, 4),
        ((8, 4), 8, 8),
        ((4, 1), 8, 4),
        ((4, 1), 2, 4),
        ((32, 2), 4, 32),
        ((2,), 1, 2),
    ],
)
def test_the_next_higher_level_runs_or_else_the_highest(own, level, expected):
    assert level_within(own, level) == expected


def test_a_plane_holds_the_layers_that_need_it(bank):
    for shape, layer in zip(SHAPES, bank.manifest.layers, strict=True):
        own = shape.own_levels or LOW
        assert layer.levels == own
        assert_same_codes(bank.layer_codes(layer), random_codes(shape, LOW))
        for plane in bank.planes:
            stored = bank.chunks(plane)["bytes"][layer.chunk_range]
            assert (stored > 0).all() if plane in planes_for(own) else not stored.any()
    assert bank.levels == LOW
    assert verify(bank.path).ok
    # 8, 4 of layer 0 at every level; all of layer 1; 4 of layer 2; 2 of layer 3.
    wanted = [("p4", 0), ("s1", 1), ("m1", 1), ("p4", 2), ("s1", 3), ("m1", 3)]
    layers = bank.manifest.layers
    sizes = [bank.chunks(p)["bytes"][layers[i].chunk_range].sum() for p, i in wanted]
    assert bank.weight_bytes(2) == sum(sizes)


def test_the_exchange_form_has_files_for_these_planes_only(bank, tmp_path):
    folder = unpack(bank.path, tmp_path / "tree")
    assert {path.name for path in (folder / "layer0").iterdir()} == {
        f"chunk_{i}_q{bit}.npy" for i in range(3) for bit in (4, 8)
    }
    assert {path.name for path in (folder / "layer2").iterdir()} == {
        f"chunk_{i}_q{bit}.npy" for i in range(2) for bit in (1, 4)
    }
    pack(tmp_path / "tree", tmp_path / "again.bank")
    assert files_of(tmp_path / "again.bank") == files_of(bank.path)


def test_an_absent_plane_moves_a_layer_up_or_makes_the_bank_useless(bank):
    (bank.path / "planes/m1.bin").unlink()
    with pytest.warns(MissingPlaneWarning):
        fewer = Bank.open(bank.path)
    assert fewer.levels == (8, 4, 1)
    last = fewer.layer("layer3")
    assert (last.levels, fewer.level_of(last, 1)) == ((8, 2), 8)
    (bank.path / "planes/r8.bin").unlink()
    with pytest.raises(BankFormatError, match="layer layer3 cannot run"):
        Bank.open(bank.path)


def test_a_level_that_no_layer_has_is_no_level_of_the_bank(tmp_path):
    with (
        pytest.raises(BankFormatError, match=r"levels is \[8, 4\], must be \[4\]"),
        BankWriter(tmp_path / "m.bank", levels=(8, 4), source=SOURCE) as writer,
    ):
        shape = Shape(20, 40, own_levels=(4,))
        add(writer, "only", shape, random_codes(shape, (8, 4)), (8, 4))
        writer.finish(GRAPH)


def test_a_sensitivity_at_a_level_that_the_layer_lacks_is_refused(bank):
    file = bank.path / "tables/sensitivity.npy"
    data = bytearray(file.read_bytes())
    data[128 + 4 * 2 : 128 + 4 * 3] = np.float32(0.5).tobytes()  # chunk 0, of layer 0, at level 2
    file.write_bytes(data)
    manifest = bank.path / "manifest.json"
    document = json.loads(manifest.read_text())
    document["sensitivity"]["blake2b"] = hashlib.blake2b(data, digest_size=16).hexdigest()
    manifest.write_bytes(sealed(document))
    with pytest.raises(BankFormatError, match=r"sensitivity 0\.5 at level 2, must be 0"):
        Bank.open(bank.path)


def test_plans_count_what_really_runs(bank):
    costs = chunk_costs(bank)
    found = plan(costs, Request(level=2))
    layers = bank.manifest.layers
    for layer, expected in zip(layers, (4, 2, 4, 2), strict=True):
        assert (found.levels[layer.chunk_range] == expected).all()
    weights = np.array([layer.rows * layer.columns for layer in layers])
    assert found.bits_per_weight == pytest.approx((weights * (4, 2, 4, 2)).sum() / weights.sum())
    assert found.resident_bytes == bank.weight_bytes(2)
    table = bank.sensitivity()
    errors = [
        table[layer.chunk_range, LOW.index(level)].sum()
        for layer, level in zip(layers, (4, 2, 4, 2), strict=True)
    ]
    assert found.predicted_error == pytest.approx(sum(errors))
    capped = plan(costs, Request(level=8, highest_level=2))
    np.testing.assert_array_equal(capped.levels, found.levels)


def test_bits_cannot_go_below_what_the_layers_have(bank):
    costs = chunk_costs(bank)
    errors = (1 / costs.runs_at).astype(np.float32)
    costs = dataclasses.replace(costs, sensitivity=errors)
    weights = np.array([layer.rows * layer.columns for layer in bank.manifest.layers])
    lowest = (weights * (4, 1, 1, 2)).sum() / weights.sum()
    with pytest.raises(RequestError, match=r"1 bits .* lowest level takes") as caught:
        plan(costs, Request(bits=1))
    named = float(str(caught.value).rpartition("ask for ")[2].partition(" ")[0])
    assert lowest <= named <= lowest + 0.002
    for bits in (named, 3, 5, 8, 100):
        found = plan(costs, Request(bits=bits))
        assert found.bits_per_weight <= bits
    assert found.bits_per_weight == pytest.approx((weights * (8, 8, 4, 8)).sum() / weights.sum())
