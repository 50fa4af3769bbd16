"""Rows that are reordered, dropped or skipped: our operators inside ONNX Runtime against NumPy."""

from __future__ import annotations

import threading
from dataclasses import replace

import numpy as np
import pytest
from onnx import TensorProto, helper
from onnx.numpy_helper import from_array

from bapq_edge import Session
from bapq_edge.bank.layout import LEVELS, PLANES
from bapq_edge.errors import UnknownLevelError
from support.banks import NO_CLIP, graph_bytes, node, random_codes, write_bank
from support.internals import adopt, bank_of, plan_of, store_of
from support.operators import (
    SCALE_COLUMNS,
    Conv,
    assert_within,
    conv_attributes,
    conv_reference,
    describe,
    finish,
    matmul_reference,
)
from support.streaming import BANKS, run, settled, tied_bank


def pruned_layer(rng, name, operator, codes, description, dropped, reordered):
    """A layer as `write_bank` takes it, from the codes of all its rows; then its row order."""
    rows = description["rows"]
    order = rng.permutation(rows) if reordered else np.arange(rows)
    stored = rows - dropped
    order[stored:].sort()
    tables = {"stored_rows": stored, "row_order": order.astype(np.uint32)}
    if dropped and description["has_bias"]:
        tables["dropped_bias"] = rng.standard_normal(dropped).astype(np.float32)
    return (
        (name, operator, codes.of_rows(order[:stored]), {**description, **tables}),
        order,
        tables.get("dropped_bias"),
    )


def skip(session, skipped, values):
    """Skip these chunks from the next run on, the other ones as before; rows take these values."""
    region = store_of(session).add_region(values.astype(np.float32))
    levels = np.where(skipped, 0, plan_of(session).levels).astype(np.uint8)
    adopt(session, replace(plan_of(session), levels=levels, region=region))


def check_every_level(session, rng, x, layer, order, dropped_values, reference, clip):
    """`reference(level)` is what the layer with all its rows gives and the bound, rows last; here
    outputs of dropped rows are constants, and those of skipped ones too.
    """
    _, _, _, description = layer
    stored, chunk_rows = description["stored_rows"], description["chunk_rows"]
    chunks = -(-stored // chunk_rows)
    for level in LEVELS:
        expected, bound = reference(level)
        for skipped in (np.zeros(chunks, bool), np.arange(chunks) % 2 == 0, np.ones(chunks, bool)):
            session.set_level(level)
            values = rng.standard_normal(stored).astype(np.float32)
            if skipped.any():
                skip(session, skipped, values)
            in_skipped = np.repeat(skipped, chunk_rows)[:stored]
            constant = np.full(len(order), np.nan)
            constant[order[:stored][in_skipped]] = values[in_skipped]
            constant[order[stored:]] = dropped_values
            (y,) = session.run(None, {"x": x})
            y = np.moveaxis(y, 1, -1) if y.ndim == 4 else y
            computed = np.isnan(constant)
            assert_within(y[..., computed], expected[..., computed], bound[..., computed])
            same = np.broadcast_to(np.clip(constant[~computed], *clip), y[..., ~computed].shape)
            np.testing.assert_array_equal(y[..., ~computed], same.astype(np.float32))


MATMULS = [  # m, columns, rows, chunk_rows, bias, clip, dropped, reordered
    (1, 32, 16, 16, False, (-NO_CLIP, NO_CLIP), 0, True),
    (3, 33, 17, 16, True, (0.0, NO_CLIP), 16, True),
    (7, 100, 50, 32, True, (0.0, 6.0), 3, False),
    (17, 129, 70, 48, False, (-1.0, 1.0), 5, True),
    (65, 96, 90, 16, True, (-NO_CLIP, NO_CLIP), 40, True),
    (130, 64, 200, 64, True, (-NO_CLIP, NO_CLIP), 1, True),
]


@pytest.mark.parametrize("case", MATMULS, ids=str)
def test_matmul_of_reordered_dropped_and_skipped_rows(use_isa, tmp_path, case):
    m, columns, rows, chunk_rows, has_bias, clip, dropped, reordered = case
    rng = np.random.default_rng([columns, rows])
    codes = random_codes(rng, rows, columns, SCALE_COLUMNS, has_bias)
    description = describe(rows, columns, chunk_rows, has_bias)
    layer, order, bias = pruned_layer(rng, "fc", "MatMul", codes, description, dropped, reordered)
    epilogue = {"use_bias": int(has_bias), "clip_low": clip[0], "clip_high": clip[1]}
    product = node("MatMul", "x", "y", layer=0, **epilogue)
    graph = graph_bytes([product], ["n", columns], ["n", rows])
    x = rng.standard_normal((m, columns)).astype(np.float32)

    def reference(level):
        expected, bound = matmul_reference(x, codes, level)
        return finish(expected, codes.bias.get(level), *clip), bound

    with Session(write_bank(tmp_path / "b.bank", graph, [layer]), threads=2) as session:
        dropped_values = 0 if bias is None else bias
        check_every_level(session, rng, x, layer, order, dropped_values, reference, clip)


CONVS = [  # the case, dropped, reordered
    (Conv(3, 20, (9, 9), (3, 3), pads=(1, 1, 1, 1), chunk_rows=16), 3, True),
    (Conv(8, 40, (14, 13), (5, 3), strides=(2, 3), pads=(2, 1, 0, 3), dilations=(2, 1)), 0, True),
    (Conv(32, 40, (6, 7), (1, 1), clip=(0.0, NO_CLIP)), 7, False),
    (Conv(64, 70, (5, 5), (1, 1), batch=3, positive=True), 20, True),
    (Conv(12, 90, (7, 7), (3, 3), group=3, pads=(1, 1, 1, 1), chunk_rows=16), 11, True),
    (Conv(40, 40, (6, 6), (3, 3), group=40, batch=2, clip=(0.0, 6.0), chunk_rows=16), 9, True),
    (Conv(40, 40, (6, 6), (3, 3), group=40, chunk_rows=16), 9, False),
    (Conv(64, 96, (6, 6), (1, 1), group=4), 50, True),
    (Conv(6, 19, (7, 8), (4, 3), strides=(2, 2), auto_pad=1, chunk_rows=16), 2, True),
]


@pytest.mark.parametrize("case", CONVS, ids=str)
def test_conv_of_reordered_dropped_and_skipped_rows(use_isa, tmp_path, case):
    case, dropped, reordered = case
    rng = np.random.default_rng([case.channels, case.rows])
    columns = case.channels // case.group * case.kernel[0] * case.kernel[1]
    codes = random_codes(rng, case.rows, columns, SCALE_COLUMNS, True)
    description = describe(case.rows, columns, case.chunk_rows, True)
    layer, order, bias = pruned_layer(rng, "c", "Conv", codes, description, dropped, reordered)
    graph = graph_bytes(
        [node("Conv", "x", "y", **conv_attributes(case))],
        ["n", case.channels, "h", "w"],
        ["n", case.rows, "oh", "ow"],
    )
    x = rng.standard_normal((case.batch, case.channels, *case.size)).astype(np.float32)
    x = np.abs(x) if case.positive else x

    def reference(level):
        expected, bound = conv_reference(case, x, codes, level)
        expected = finish(expected, codes.bias[level].reshape(-1, 1, 1), *case.clip)
        return np.moveaxis(expected, 1, -1), np.moveaxis(bound, 1, -1)

    with Session(write_bank(tmp_path / "b.bank", graph, [layer]), threads=2) as session:
        dropped_values = bias if dropped else 0
        check_every_level(session, rng, x, layer, order, dropped_values, reference, case.clip)


@pytest.mark.parametrize("operator", ["MatMul", "Conv"])
def test_constants_of_a_layer_with_a_function_and_a_residual(use_isa, tmp_path, operator):
    """Those of a plan stand for what the function gives; a dropped row's bias goes through it."""
    rng = np.random.default_rng(3)
    case = Conv(32, 40, (5, 5), (1, 1), chunk_rows=16, batch=2)
    codes = random_codes(rng, 40, 32, SCALE_COLUMNS, True)
    layer, order, bias = pruned_layer(
        rng, "l", operator, codes, describe(40, 32, 16, True), 5, True
    )
    attributes = conv_attributes(case)
    if operator == "MatMul":
        attributes = {key: attributes[key] for key in ("layer", "use_bias")}
    attributes |= {"function": 2, "clip_low": -0.25, "clip_high": 2.0}
    nodes = [
        helper.make_node("ReduceMean", ["x"], ["mean"], axes=[-1 if operator == "MatMul" else 1]),
        helper.make_node("Expand", ["mean", "shape"], ["r"]),
        node(operator, "x", "y", "r", **attributes),
    ]
    x = rng.standard_normal((2, 32, 5, 5) if operator == "Conv" else (7, 32)).astype(np.float32)
    shape = np.array([2, 40, 5, 5] if operator == "Conv" else [7, 40])
    nodes.insert(0, helper.make_node("Constant", [], ["shape"], value=from_array(shape)))
    graph = graph_bytes(nodes, list(x.shape), shape.tolist())
    values = rng.standard_normal(35).astype(np.float32)
    axis = 1 if operator == "Conv" else -1
    with Session(write_bank(tmp_path / "b.bank", graph, [layer]), threads=2) as session:
        session.set_level(4)
        skip(session, np.ones(3, bool), values)
        (y,) = session.run(None, {"x": x})
    constant = np.empty(40)
    constant[order[:35]] = values
    constant[order[35:]] = bias / (1 + np.exp(-bias.astype(np.float64)))
    constant = constant.reshape(-1, 1, 1) if operator == "Conv" else constant
    expected = np.clip(constant + x.mean(axis, keepdims=True), -0.25, 2.0)
    np.testing.assert_allclose(y, np.broadcast_to(expected, y.shape), rtol=1e-5, atol=1e-6)


def test_a_product_without_the_bias_leaves_it_out_of_dropped_rows_too(tmp_path):
    rng = np.random.default_rng(1)
    codes, description = random_codes(rng, 40, 32, SCALE_COLUMNS, True), describe(40, 32, 16, True)
    layer, order, bias = pruned_layer(rng, "fc", "MatMul", codes, description, 10, True)
    product = node("MatMul", "x", "y", layer=0, use_bias=0, clip_low=-NO_CLIP, clip_high=NO_CLIP)
    graph = graph_bytes([product], ["n", 32], ["n", 40])
    with Session(write_bank(tmp_path / "b.bank", graph, [layer]), level=8) as session:
        y = run(session, rng.standard_normal((2, 32)).astype(np.float32))
    assert bias.all()
    assert not y[:, order[30:]].any()
    assert y[:, order[:30]].all()


def chunks_of(session, name):
    layer = bank_of(session).layer(name)
    chunks = np.zeros(bank_of(session).manifest.chunk_count, bool)
    chunks[layer.first_chunk : layer.first_chunk + layer.chunk_count] = True
    return chunks


def stored_rows(session):
    return sum(layer.stored_rows for layer in bank_of(session).manifest.layers)


def test_what_cannot_be_skipped_is_refused_and_changes_nothing(tmp_path):
    x = np.array([[1, 2], [3, 0]])
    with Session(tied_bank(tmp_path / "m.bank"), level=8) as session:
        before = run(session, x)
        none = np.zeros(len(plan_of(session).levels), bool)
        values = np.zeros(stored_rows(session))
        for name in ("tied", "positions"):
            with pytest.raises(UnknownLevelError, match="cannot run at level 0: Gather reads it"):
                skip(session, chunks_of(session, name), values)
        levels = np.where(chunks_of(session, "fc"), 0, 8).astype(np.uint8)
        with pytest.raises(UnknownLevelError, match="the plan names none"):
            adopt(session, replace(plan_of(session), levels=levels))
        with pytest.raises(UnknownLevelError, match="region 7 is unknown, 2 are registered"):
            adopt(session, replace(plan_of(session), levels=levels, region=7))
        with pytest.raises(ValueError, match=r"a region's values are \(3,\), expected \(254,\)"):
            store_of(session).add_region(values[:3])
        np.testing.assert_array_equal(run(session, x), before)
        skip(session, none, values)
        np.testing.assert_array_equal(run(session, x), before)
        skip(session, chunks_of(session, "fc"), values)
        assert not np.array_equal(run(session, x), before)


def test_a_skipped_chunk_is_not_read(tmp_path):
    """Not from a plane that is not there any more either, streamed or pinned."""
    x = np.random.default_rng(0).standard_normal((3, 96)).astype(np.float32)
    bank = BANKS["chain"](tmp_path / "m.bank")
    for pinned in (False, True):
        with Session(bank, level=8) as session:
            sizes = bank_of(session).chunks("p4")["bytes"] + bank_of(session).chunks("r8")["bytes"]
            skipped = np.arange(len(sizes)) % 3 == 1
            pins = np.full(len(sizes), pinned)
            adopt(session, replace(plan_of(session), pinned=pins, ring_bytes=1 << 16))
            skip(session, skipped, np.zeros(stored_rows(session)))
            run(session, x)
            run(session, x)
            stats = store_of(session).stats()
            if pinned:  # one that was read ahead as streamed may stay in the ring
                in_ring = int(sizes[~skipped].sum()) - stats.home_bytes
                assert in_ring in (0, *sizes[~skipped]) and in_ring <= stats.ring_bytes
            else:
                assert stats.home_bytes == 0
            before = store_of(session).stats().read_bytes
            for _ in range(4):
                run(session, x)
            runs = 0 if pinned else 4
            read = store_of(session).stats().read_bytes - before
            # The reader is up to a ring ahead, and in the middle of a chunk; a pinned one that was
            # in the ring is read once more to come home.
            ahead = (1 << 16) + int(sizes.max())
            assert abs(int(read) - runs * int(sizes[~skipped].sum())) <= ahead
            wholly = np.ones(len(sizes), bool)
            skip(session, wholly, np.ones(stored_rows(session)))
            np.testing.assert_array_equal(run(session, x), np.ones((3, 64)))


def test_kept_planes_are_neither_dropped_nor_read_again(tmp_path):
    """From level 4 up to 8 and back: only the missing plane is read."""
    x = np.random.default_rng(0).standard_normal((3, 96)).astype(np.float32)
    bank = BANKS["chain"](tmp_path / "m.bank")
    with Session(bank, level=4) as session:
        low, plan4 = run(session, x), plan_of(session)
        r8 = int(bank_of(session).chunks("r8")["bytes"].sum())
        p4 = int(bank_of(session).chunks("p4")["bytes"].sum())
        for streamed in (True, False):
            plan8 = replace(
                plan4,
                levels=np.full_like(plan4.levels, 8),
                pinned=np.full_like(plan4.pinned, not streamed),
                ring_bytes=1 << 20,
                resident_bytes=1 << 22,
                kept=np.full(len(plan4.levels), 1 << list(PLANES).index("p4"), np.uint8),
            )
            before = store_of(session).stats().read_bytes
            adopt(session, plan8)
            high = run(session, x)
            read = store_of(session).stats().read_bytes - before
            assert r8 <= read <= 3 * r8 if streamed else read == r8  # it reads ahead, too
            assert store_of(session).stats().home_bytes == p4 + (0 if streamed else r8)
            before = store_of(session).stats().read_bytes
            adopt(session, plan4)
            np.testing.assert_array_equal(run(session, x), low)
            assert settled(session).home_bytes == p4
            after = store_of(session).stats().read_bytes
            assert after - before <= (2 * r8 if streamed else 0)  # read ahead before the switch
    with Session(bank, level=8) as session:
        np.testing.assert_array_equal(run(session, x), high)


def test_every_run_sees_one_region(tmp_path):
    """While regions are switched under them, runs answer wholly by one of their plans."""
    x = np.random.default_rng(0).standard_normal((3, 96)).astype(np.float32)
    with Session(BANKS["chain"](tmp_path / "m.bank"), level=4, threads=1) as session:
        plans, legal = [], []
        rng = np.random.default_rng(1)
        for _ in range(4):
            chunks = len(plan_of(session).levels)
            session.set_level(int(rng.choice(LEVELS)))
            skip(session, rng.random(chunks) < 0.4, rng.standard_normal(stored_rows(session)))
            plans.append(plan_of(session))
            legal.append(run(session, x).tobytes())
        assert len(set(legal)) == 4
        seen, stop = [], threading.Event()

        def work():
            while not stop.is_set():
                seen.append(run(session, x).tobytes())

        workers = [threading.Thread(target=work) for _ in range(2)]
        for worker in workers:
            worker.start()
        for i in range(200):
            adopt(session, plans[i % 4])
        stop.set()
        for worker in workers:
            worker.join()
        assert seen and set(seen) <= set(legal)


def test_a_gather_beside_skipped_rows_still_reads_its_own(tmp_path):
    """Values of a region count the rows of every layer, those that Gather reads too."""
    rng = np.random.default_rng(2)
    table = random_codes(rng, 30, 32, SCALE_COLUMNS, False)
    codes = random_codes(rng, 20, 32, SCALE_COLUMNS, True)
    nodes = [
        node("Gather", "x", "h", layer=0),
        node("MatMul", "h", "y", layer=1, use_bias=1, clip_low=-NO_CLIP, clip_high=NO_CLIP),
    ]
    bank = write_bank(
        tmp_path / "b.bank",
        graph_bytes(nodes, ["n"], ["n", 20], TensorProto.INT64),
        [
            ("table", "Gather", table, describe(30, 32, 16, False)),
            ("fc", "MatMul", codes, describe(20, 32, 16, True)),
        ],
    )
    with Session(bank, level=8) as session:
        whole = run(session, np.array([4, 29]))
        skip(session, np.array([False, False, False, True]), np.arange(50))
        y = run(session, np.array([4, 29]))
    np.testing.assert_array_equal(y[:, :16], whole[:, :16])
    np.testing.assert_array_equal(y[:, 16:], np.tile(np.arange(46, 50), (2, 1)))
