"""Sessions on banks whose layers differ in levels: the same numbers, resident and streamed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from bapq_edge import Session
from bapq_edge.bank.layout import LEVELS
from bapq_edge.bank.reader import Bank
from bapq_edge.engine.store import Store
from bapq_edge.errors import BankIntegrityError, DegradedWarning, UnknownLevelError
from bapq_edge.planning.planner import Request, chunk_costs, plan
from support.banks import graph_bytes, node, random_codes, write_bank
from support.internals import adopt, bank_of, costs_of, plan_of
from support.streaming import LINEAR, RELU, SCALE_COLUMNS

OWN = {"first": (8, 4), "second": LEVELS, "third": (32, 2)}
WIDTHS = (96, 200, 120, 64)


def _bank(path, own):
    """x (n, 96) through three products to y (n, 64); the codes do not depend on `own`."""
    layers = []
    for i, (name, levels) in enumerate(own.items()):
        shape = WIDTHS[i + 1], WIDTHS[i]
        codes = random_codes(np.random.default_rng(i), *shape, SCALE_COLUMNS, True)
        description = {
            "rows": shape[0],
            "columns": shape[1],
            "chunk_rows": 32,
            "residual_steps": 15,
            "scale_columns": {
                4: 32 if {8, 4} & set(levels) else 0,
                2: 64 if 2 in levels else 0,
                1: 128 if 1 in levels else 0,
            },
            "has_bias": True,
            "levels": levels,
        }
        scales = {level: size for level, size in description["scale_columns"].items() if size}
        layers.append((name, "Gemm", codes, {**description, "scale_columns": scales}))
    nodes = [
        node("Gemm", "x", "h", layer=0, **RELU),
        node("Gemm", "h", "i", layer=1, **RELU),
        node("Gemm", "i", "y", layer=2, **LINEAR),
    ]
    return write_bank(path, graph_bytes(nodes, ["n", 96], ["n", 64]), layers)


@pytest.fixture(scope="module")
def banks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("levels")
    return _bank(folder / "some.bank", OWN), _bank(folder / "all.bank", dict.fromkeys(OWN, LEVELS))


@pytest.fixture
def x():
    return np.random.default_rng(1).standard_normal((3, 96)).astype(np.float32)


def _run(path, levels_of_layers, x, threads=1):
    """The outputs of a plan that says the level of every layer."""
    with Session(path, threads=threads) as session:
        base = plan(chunk_costs(bank_of(session)), Request())
        levels = np.empty_like(base.levels)
        for layer, level in zip(bank_of(session).manifest.layers, levels_of_layers, strict=True):
            levels[layer.chunk_range] = level
        adopt(session, replace(base, levels=levels))
        return session.run(None, {"x": x})[0]


@pytest.mark.parametrize(
    ("level", "expected"),
    [(32, (8, 32, 32)), (8, (8, 8, 32)), (4, (4, 4, 32)), (2, (4, 2, 2)), (1, (4, 1, 2))],
)
@pytest.mark.parametrize("direct", [False, True])
def test_each_layer_runs_at_its_own_level_to_the_last_bit(banks, x, level, expected, direct):
    some, whole = banks
    reference = _run(whole, expected, x)
    for streamed in (False, True):
        with Session(some, level=level, threads=1, direct_io=direct) as session:
            if streamed:
                limit = plan_of(session).resident_bytes - 64
                request = Request(level=level, weight_bytes_limit=limit)
                adopt(session, plan(costs_of(session), request))
            np.testing.assert_array_equal(session.run(None, {"x": x})[0], reference)


def test_the_store_refuses_a_level_whose_planes_lack_the_layer(banks):
    bank = Bank.open(banks[0])
    good = plan(chunk_costs(bank), Request(level=2))
    store = Store(bank)
    try:
        levels = good.levels.copy()
        levels[0] = 2
        with pytest.raises(UnknownLevelError, match="chunk 0 cannot run at level 2"):
            store.publish(levels, good.pinned, good.ring_bytes, None, 1)
        store.publish(good.levels, good.pinned, good.ring_bytes, None, 1)
    finally:
        store.close()


@pytest.mark.parametrize(
    ("own", "plane", "stands_in"),
    [((8,), "r8", False), ((8, 4), "r8", True), ((2,), "m1", False), ((2, 1), "m1", True)],
)
def test_only_a_level_of_the_layer_stands_in_for_a_damaged_plane(
    tmp_path, x, own, plane, stands_in
):
    """At home p4 or s1 is there in any case, but not with what levels 4 and 1 need of it."""
    path = _bank(tmp_path / "m.bank", {**dict.fromkeys(OWN, LEVELS), "first": own})
    with open(path / f"planes/{plane}.bin", "r+b") as file:
        byte = file.read(1)[0]
        file.seek(0)
        file.write(bytes([byte ^ 16]))
    message = f"layer first: plane {plane}, chunk 0: CRC-32"
    with Session(path, level=own[0], threads=1) as session:
        for _ in range(2):
            if stands_in:
                with pytest.warns(DegradedWarning, match=message):
                    session.run(None, {"x": x})
            else:
                with pytest.raises(BankIntegrityError, match=message):
                    session.run(None, {"x": x})


@pytest.mark.parametrize(("own", "level"), [((8, 2), 4), ((8, 2), 1)])
def test_planes_alone_do_not_make_a_level(tmp_path, own, level):
    path = _bank(tmp_path / "m.bank", {**dict.fromkeys(OWN, LEVELS), "first": own})
    bank = Bank.open(path)
    good = plan(chunk_costs(bank), Request(level=8))
    store = Store(bank)
    try:
        levels = good.levels.copy()
        levels[0] = level
        with pytest.raises(UnknownLevelError, match=f"level {level}: its layer lacks it"):
            store.publish(levels, good.pinned, good.ring_bytes, None, 1)
    finally:
        store.close()
