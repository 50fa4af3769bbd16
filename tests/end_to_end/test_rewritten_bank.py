"""A bank in another row order and other chunks answers bit for bit the same."""

from __future__ import annotations

import numpy as np
import pytest

from bapq_edge import Session
from bapq_edge.bank.layout import LEVELS
from bapq_edge.bank.reader import Bank
from bapq_tools.boundary.rewrite import output_rows, rewrite
from support.banks import NO_CLIP, graph_bytes, node, random_codes, write_bank
from support.operators import SCALE_COLUMNS, Conv, conv_attributes, describe


def assert_same_answers(path, x):
    """At every level, whatever the order and the chunks."""
    with Session(path, threads=1) as session:
        expected = {}
        for level in LEVELS:
            session.set_level(level)
            expected[level] = session.run(None, {"x": x})[0]
    rng = np.random.default_rng(0)
    for size in (16, 48):
        bank = Bank.open(path)
        orders = {
            layer.name: rng.permutation(output_rows(bank, layer)) for layer in bank.manifest.layers
        }
        # The second time in place, from an order that is random already.
        rewrite(path, path, row_order=orders, chunk_rows=dict.fromkeys(orders, size))
        with Session(path, threads=2) as session:
            for level in LEVELS:
                session.set_level(level)
                y = session.run(None, {"x": x})[0]
                assert y.tobytes() == expected[level].tobytes()


def with_dropped_rows(rng, codes, description, dropped):
    """Codes of the stored rows only, and the description of their layer."""
    rows = description["rows"]
    if not dropped:
        return codes, description
    order = np.concatenate([np.arange(dropped, rows), np.arange(dropped)]).astype(np.uint32)
    for arrays in (codes.codes, codes.scales, codes.bias):
        arrays.update({key: values[dropped:] for key, values in arrays.items()})
    codes.weight = codes.weight[dropped:]
    tables = {"stored_rows": rows - dropped, "row_order": order}
    if description["has_bias"]:
        tables["dropped_bias"] = rng.standard_normal(dropped).astype(np.float32)
    return codes, {**description, **tables}


@pytest.mark.parametrize(
    ("m", "columns", "rows", "has_bias", "dropped"),
    [(1, 33, 17, True, 0), (7, 100, 90, False, 5), (65, 64, 200, True, 37)],
)
def test_products(tmp_path, m, columns, rows, has_bias, dropped):
    rng = np.random.default_rng(rows)
    codes = random_codes(rng, rows, columns, SCALE_COLUMNS, has_bias)
    codes, description = with_dropped_rows(
        rng, codes, describe(rows, columns, 64, has_bias), dropped
    )
    epilogue = {"use_bias": int(has_bias), "clip_low": 0.0, "clip_high": NO_CLIP}
    graph = graph_bytes(
        [node("MatMul", "x", "y", layer=0, **epilogue)], ["n", columns], ["n", rows]
    )
    path = write_bank(tmp_path / "b.bank", graph, [("fc", "MatMul", codes, description)])
    assert_same_answers(path, rng.standard_normal((m, columns)).astype(np.float32))


@pytest.mark.parametrize(
    ("case", "dropped"),
    [
        (Conv(3, 20, (9, 9), (3, 3), pads=(1, 1, 1, 1)), 3),
        (Conv(12, 90, (7, 7), (3, 3), group=3, pads=(1, 1, 1, 1)), 11),
        (Conv(40, 40, (6, 6), (3, 3), group=40, batch=2, clip=(0.0, 6.0)), 0),
        (Conv(64, 70, (5, 5), (1, 1), batch=3), 0),
    ],
    ids=str,
)
def test_convolutions(tmp_path, case, dropped):
    rng = np.random.default_rng(case.rows)
    columns = case.channels // case.group * case.kernel[0] * case.kernel[1]
    codes = random_codes(rng, case.rows, columns, SCALE_COLUMNS, True)
    codes, description = with_dropped_rows(
        rng, codes, describe(case.rows, columns, 32, True), dropped
    )
    graph = graph_bytes(
        [node("Conv", "x", "y", **conv_attributes(case))],
        ["n", case.channels, "h", "w"],
        ["n", case.rows, "oh", "ow"],
    )
    path = write_bank(tmp_path / "b.bank", graph, [("c", "Conv", codes, description)])
    assert_same_answers(
        path, rng.standard_normal((case.batch, case.channels, *case.size)).astype(np.float32)
    )
