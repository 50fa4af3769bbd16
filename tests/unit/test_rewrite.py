"""A bank written again, its rows in another order and in other chunks."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

from bapq_edge.bank.boundary import Boundary, Precision
from bapq_edge.bank.layout import LEVELS
from bapq_edge.bank.reader import Bank
from bapq_edge.bank.verify import verify
from bapq_edge.bank.writer import BankWriter
from bapq_edge.errors import (
    BankNotFoundError,
    BoundaryDroppedWarning,
    MissingPlaneWarning,
    RequestError,
)
from bapq_tools.boundary.rewrite import output_rows, rewrite
from support.bank_samples import (
    GRAPH,
    PRUNED,
    RAGGED,
    SOURCE,
    Shape,
    add,
    files_of,
    random_codes,
    write_bank,
)

SHAPES = (*RAGGED, *PRUNED)


def by_output_row(bank, layer):
    """Everything the bank says of a layer's rows, by the number of the output row."""
    codes, rows = bank.layer_codes(layer), output_rows(bank, layer)
    fields = {"f32": codes.weight, **codes.codes, **codes.scales}
    fields |= {("bias", level): values for level, values in codes.bias.items()}
    return {
        name: [values[i].tobytes() for i in np.argsort(rows)]
        for name, values in fields.items()
        if values is not None
    }


def random_request(bank, seed=0):
    rng = np.random.default_rng(seed)
    layers = bank.manifest.layers
    orders = {layer.name: rng.permutation(output_rows(bank, layer)) for layer in layers}
    return orders, {layer.name: 16 * int(rng.integers(1, 4)) for layer in layers}


def test_a_bank_rewritten_as_it_is_is_the_same_bank(tmp_path):
    write_bank(tmp_path / "m.bank", SHAPES)
    assert rewrite(tmp_path / "m.bank", tmp_path / "again.bank") == tmp_path / "again.bank"
    assert files_of(tmp_path / "again.bank") == files_of(tmp_path / "m.bank")


def test_every_row_keeps_what_belongs_to_it(tmp_path):
    write_bank(tmp_path / "m.bank", SHAPES)
    old = Bank.open(tmp_path / "m.bank")
    orders, sizes = random_request(old)
    new = Bank.open(rewrite(old.path, tmp_path / "new.bank", row_order=orders, chunk_rows=sizes))
    verify(new.path)
    for before, after in zip(old.manifest.layers, new.manifest.layers, strict=True):
        np.testing.assert_array_equal(output_rows(new, after), orders[before.name])
        assert after.chunk_rows == sizes[before.name]
        assert by_output_row(new, after) == by_output_row(old, before)
        bias = old.dropped_bias(before)
        assert (bias is None) == (new.dropped_bias(after) is None)
        if bias is not None:
            np.testing.assert_array_equal(new.dropped_bias(after), bias)
            lost = [
                (range(each.rows) if order is None else order)[each.stored_rows :]
                for each, order in ((before, old.row_order(before)), (after, new.row_order(after)))
            ]
            assert list(lost[0]) == list(lost[1])
        for name in ("relative_error", "method", "residual_steps", "operators", "weights"):
            assert getattr(after, name) == getattr(before, name)
    assert new.manifest.model == old.manifest.model
    assert new.bits_per_weight(32) == old.bits_per_weight(32)


def test_and_back_gives_the_same_bytes_but_for_the_shares_of_sensitivity(tmp_path):
    write_bank(tmp_path / "m.bank", SHAPES)
    old = Bank.open(tmp_path / "m.bank")
    orders, sizes = random_request(old)
    rewrite(old.path, tmp_path / "new.bank", row_order=orders, chunk_rows=sizes)
    back = {layer.name: output_rows(old, layer) for layer in old.manifest.layers}
    was = {layer.name: layer.chunk_rows for layer in old.manifest.layers}
    path = tmp_path / "new.bank"  # written over itself
    assert rewrite(path, path, row_order=back, chunk_rows=was) == path
    changed = {"tables/sensitivity.npy", "manifest.json"}
    old_files, new_files = files_of(old.path), files_of(path)
    assert {f for f in old_files if old_files[f] != new_files.get(f)} == changed
    assert old_files.keys() == new_files.keys()


def test_sensitivity_is_shared_out_by_rows(tmp_path):
    """An even share per row: two chunks of 48 and 4 rows into chunks of 16, the last one of 4."""
    with BankWriter(tmp_path / "m.bank", levels=LEVELS, source=SOURCE) as writer:
        shape = Shape(52, 8, chunk_rows=48)
        table = np.array([[0, 3, 6, 9, 12], [0, 4, 8, 16, 32]], np.float32)
        add(writer, "fc", shape, random_codes(shape), sensitivity=table)
        writer.finish(GRAPH)
    order = np.concatenate([np.arange(48, 52), np.arange(48)])
    new = rewrite(
        tmp_path / "m.bank", tmp_path / "n.bank", row_order={"fc": order}, chunk_rows={"fc": 16}
    )
    found = Bank.open(new).sensitivity()
    rest = table[0] / 48
    expected = np.stack([table[1] + 12 * rest, 16 * rest, 16 * rest, 4 * rest])
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    np.testing.assert_allclose(found.sum(0), table.sum(0), rtol=1e-6)


def model_of(name):
    return Boundary(
        name=name,
        stage="start",
        tap="x",
        base=Precision(level=8),
        pool=(2,),
        scores="none",
        features=1,
        kind="kmeans",
        regions=1,
        nodes=0,
        precisions=(Precision(level=8),),
        points=1,
        samples=10,
        confidence=0.95,
    )


def arrays_of(model, manifest):
    shapes = model.shapes(manifest.layers)
    arrays = {name: np.zeros(shape, dtype) for name, (dtype, shape) in shapes.items()}
    arrays["mix"][:] = 1
    return arrays


def test_boundary_models_and_split_are_those_given_and_others_dropped_loudly(tmp_path):
    write_bank(tmp_path / "m.bank", SHAPES)
    manifest = Bank.open(tmp_path / "m.bank").manifest
    models = [(model, arrays_of(model, manifest)) for model in map(model_of, ("one", "two"))]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rewrite(
            tmp_path / "m.bank", tmp_path / "b.bank", boundary=models, split=(b"head", b"body", 1)
        )
        found = Bank.open(
            rewrite(  # replaced, not dropped
                tmp_path / "b.bank", tmp_path / "c.bank", boundary=models, split=(b"h", b"b", 2)
            )
        )
    assert [entry.model.name for entry in found.manifest.boundary] == ["one", "two"]
    assert found.file_bytes(found.manifest.split.head) == b"h"
    with pytest.warns(BoundaryDroppedWarning, match="boundary model two, the split graph will not"):
        last = rewrite(tmp_path / "c.bank", tmp_path / "d.bank", boundary=models[:1])
    manifest = Bank.open(last).manifest
    assert manifest.split is None and len(manifest.boundary) == 1


@pytest.mark.parametrize(
    ("precision", "words"),
    [
        ({"row_order": {"fc": np.arange(4)}}, "no layer 'fc'; it has layer0, layer1"),
        ({"chunk_rows": {"fc": 16}}, "no layer 'fc'; it has layer0, layer1"),
        ({"row_order": {"layer1": np.arange(15)}}, r"layer layer1 is \(15,\) and must .* its 16"),
        ({"row_order": {"layer1": np.zeros(16, int)}}, "each of its 16 stored rows once"),
        ({"row_order": {"layer1": np.arange(16) + 1}}, "each of its 16 stored rows once"),
        ({"chunk_rows": {"layer1": 24}}, "chunks of 24 rows: choose a multiple of 16"),
        ({"chunk_rows": {"layer1": 0}}, "chunks of 0 rows: choose a multiple of 16"),
    ],
)
def test_what_a_bank_cannot_have_is_refused_and_changes_nothing(tmp_path, precision, words):
    write_bank(tmp_path / "m.bank")
    before = files_of(tmp_path)
    with pytest.raises(RequestError, match=words):
        rewrite(tmp_path / "m.bank", tmp_path / "m.bank", **precision)
    assert files_of(tmp_path) == before


def test_a_gathered_layer_keeps_its_order(tmp_path):
    shape = Shape(40, 8)
    with BankWriter(tmp_path / "m.bank", levels=LEVELS, source=SOURCE) as writer:
        add(writer, "table", shape, random_codes(shape), operators=("Gather",))
        writer.finish(GRAPH)
    same = rewrite(tmp_path / "m.bank", tmp_path / "n.bank", row_order={"table": np.arange(40)})
    assert files_of(same) == files_of(tmp_path / "m.bank")
    with pytest.raises(RequestError, match="layer table is gathered"):
        rewrite(tmp_path / "m.bank", same, row_order={"table": np.arange(40)[::-1]})


def test_a_bank_without_one_of_its_planes_is_refused(tmp_path):
    write_bank(tmp_path / "m.bank")
    (tmp_path / "m.bank/planes/r8.bin").unlink()
    with (
        pytest.warns(MissingPlaneWarning),
        pytest.raises(BankNotFoundError, match=r"r8\.bin is absent: put it back, then rewrite"),
    ):
        rewrite(tmp_path / "m.bank", tmp_path / "n.bank")
    assert not (tmp_path / "n.bank").exists()
