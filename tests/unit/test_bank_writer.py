"""Building a bank: it is read back as written, and replaces only banks, whole or not at all."""

from __future__ import annotations

import dataclasses
import os
import shutil

import numpy as np
import pytest

from bapq_edge.bank import staging
from bapq_edge.bank.layout import planes_for
from bapq_edge.bank.manifest import KeptNode
from bapq_edge.bank.reader import Bank
from bapq_edge.bank.verify import verify
from bapq_edge.bank.writer import BankWriter
from bapq_edge.errors import BankFormatError, StorageError
from support import bank_samples
from support.bank_samples import (
    GRAPH,
    PRUNED,
    SOURCE,
    Shape,
    add,
    assert_same_codes,
    files_of,
    random_codes,
    random_rows,
    write_bank,
)

SMALL = (Shape(3, 5),)


@pytest.fixture(params=["exchange", "two renames"])
def rename(request, monkeypatch):
    """Both ways of replacing a directory."""
    if request.param == "two renames":
        monkeypatch.setattr(staging, "_exchange", lambda first, second: False)


@pytest.mark.parametrize(
    "levels", [(32, 8, 4, 2, 1), (8, 4, 2, 1), (8,), (4,), (2,), (1,), (32,), (32, 2)], ids=str
)
def test_round_trip_of_every_set_of_levels(tmp_path, levels):
    layers = write_bank(tmp_path / "m.bank", levels=levels)
    bank = Bank.open(tmp_path / "m.bank")
    assert bank.levels == levels
    assert bank.planes == planes_for(levels)
    assert bank.graph_bytes() == GRAPH
    for layer, codes in zip(bank.manifest.layers, layers, strict=True):
        assert_same_codes(bank.layer_codes(layer), codes)
    assert verify(bank.path).ok
    assert sorted(os.listdir(tmp_path)) == ["m.bank"]


def test_round_trip_of_reordered_and_dropped_rows(tmp_path):
    layers = write_bank(tmp_path / "m.bank", PRUNED)
    bank = Bank.open(tmp_path / "m.bank")
    for layer, shape, codes in zip(bank.manifest.layers, PRUNED, layers, strict=True):
        assert (layer.rows, layer.stored_rows) == (shape.rows, shape.stored_rows)
        assert_same_codes(bank.layer_codes(layer), codes)
        expected = random_rows(shape)
        np.testing.assert_equal(bank.row_order(layer), expected.get("row_order"))
        np.testing.assert_equal(bank.dropped_bias(layer), expected.get("dropped_bias"))
    assert bank.weights == sum(shape.stored_rows * shape.columns for shape in PRUNED)
    report = verify(bank.path)
    assert report.ok
    files = {str(p.relative_to(bank.path)) for p in bank.path.rglob("*.*") if p.is_file()}
    assert {file.file for file in report.files} == files - {"manifest.json"}


def test_rows_in_order_need_no_table(tmp_path):
    shape = Shape(20, 5)
    for name, rows in (("a", {}), ("b", {"row_order": np.arange(20, dtype=np.uint32)})):
        with BankWriter(tmp_path / name, levels=(4,), source=SOURCE) as writer:
            add(writer, "l", shape, random_codes(shape, (4,)), (4,), **rows)
            writer.finish(b"")
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    assert not (tmp_path / "a/tables/row_order.npy").exists()


ORDER = np.array([3, 0, 2, 1, 4], np.uint32)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"stored_rows": 0}, "layer l: 0 of 5 rows are stored, must be 1 to 5"),
        ({"stored_rows": 6}, "layer l: 6 of 5 rows are stored, must be 1 to 5"),
        ({"row_order": ORDER[:4]}, r"layer l: the row order is uint32 \(4,\), expected .* \(5,\)"),
        ({"row_order": ORDER.astype(np.int64)}, "the row order is int64"),
        ({"row_order": np.minimum(ORDER, 3)}, "the row order lacks row 4, another stands twice"),
        ({"row_order": ORDER + np.uint32(1)}, "the row order holds row 5, the last is 4"),
        ({"row_order": ORDER[[0, 1, 2, 4, 3]]}, "the dropped rows are not in ascending order"),
        ({"dropped_bias": None}, "layer l: dropped_bias is absent, expected 2 values"),
        ({"dropped_bias": np.zeros(3, np.float32)}, r"float32 \(3,\), expected float32 \(2,\)"),
        ({"dropped_bias": np.zeros(2)}, r"bias of dropped rows is float64 \(2,\)"),
        ({"dropped_bias": np.float32([1, np.inf])}, "dropped row 1 has a bias that is no number"),
        ({"has_bias": False}, "dropped_bias is 2 values, expected 0 values"),
    ],
    ids=str,
)
def test_rows_that_cannot_be_are_refused(tmp_path, rows, message):
    shape = Shape(5, 8, dropped=2)
    with BankWriter(tmp_path / "m.bank", levels=(4,), source=SOURCE) as writer:
        with pytest.raises(ValueError, match=message):
            add(writer, "l", shape, random_codes(shape, (4,)), (4,), **rows)
        add(writer, "l", shape, random_codes(shape, (4,)), (4,), row_order=ORDER)
        writer.finish(b"")
    assert verify(tmp_path / "m.bank").ok


def test_the_same_build_gives_the_same_bytes(tmp_path):
    write_bank(tmp_path / "a.bank")
    write_bank(tmp_path / "b.bank")
    assert files_of(tmp_path / "a.bank") == files_of(tmp_path / "b.bank")


def test_tables_open_with_numpy(tmp_path):
    write_bank(tmp_path / "m.bank")
    bank = Bank.open(tmp_path / "m.bank")
    table = np.load(tmp_path / "m.bank/tables/p4_chunks.npy", allow_pickle=False)
    np.testing.assert_array_equal(table, bank.chunks("p4"))
    sensitivity = np.load(tmp_path / "m.bank/tables/sensitivity.npy", allow_pickle=False)
    np.testing.assert_array_equal(sensitivity, bank.sensitivity())
    digests = np.load(tmp_path / "m.bank/tables/p4_digests.npy", allow_pickle=False)
    np.testing.assert_array_equal(digests, bank.chunk_digests("p4"))


def test_a_model_name_becomes_safe(tmp_path):
    source = dataclasses.replace(SOURCE, name="../my model")
    with BankWriter(tmp_path / "m.bank", levels=(4,), source=source) as writer:
        add(writer, "l", SMALL[0], random_codes(SMALL[0], (4,)), (4,))
        writer.finish(b"", [KeptNode("a\nb", "Conv", 3, "small")])
    manifest = Bank.open(tmp_path / "m.bank").manifest
    assert manifest.model.name == ".._my_model"
    assert manifest.kept_in_float[0].name == "a?b"


def test_an_existing_bank_is_replaced(tmp_path, rename):
    write_bank(tmp_path / "m.bank", seed=1, graph=b"\x12\x03old")
    write_bank(tmp_path / "m.bank", SMALL, graph=b"\x12\x03new")
    assert Bank.open(tmp_path / "m.bank").graph_bytes() == b"\x12\x03new"
    assert os.listdir(tmp_path) == ["m.bank"]


def test_a_damaged_bank_is_replaced(tmp_path):
    write_bank(tmp_path / "m.bank")
    manifest = tmp_path / "m.bank/manifest.json"
    manifest.write_bytes(manifest.read_bytes()[:3000])
    shutil.rmtree(tmp_path / "m.bank/planes")
    write_bank(tmp_path / "m.bank", SMALL)
    assert verify(tmp_path / "m.bank").ok


def test_a_symbolic_link_to_a_bank_stays_one(tmp_path):
    (tmp_path / "disk").mkdir()
    write_bank(tmp_path / "disk/m.bank", seed=1)
    (tmp_path / "m.bank").symlink_to("disk/m.bank")
    write_bank(tmp_path / "m.bank", SMALL)
    assert (tmp_path / "m.bank").is_symlink()
    assert len(Bank.open(tmp_path / "disk/m.bank").manifest.layers) == 1


def something_else(path, kind):
    if kind == "file":
        path.write_bytes(b"precious")
        return
    path.mkdir()
    if kind == "directory of files":
        (path / "thesis.txt").write_bytes(b"precious")
    if kind == "another manifest":
        (path / "manifest.json").write_bytes(b'{"format": "web extension"}\n')
    if kind == "bank with a stranger's file":
        path.rmdir()
        write_bank(path, SMALL)
        (path / "thesis.txt").write_bytes(b"precious")


@pytest.mark.parametrize(
    "kind",
    [
        "file",
        "empty directory",
        "directory of files",
        "another manifest",
        "bank with a stranger's file",
    ],
)
def test_nothing_but_a_bank_is_replaced(tmp_path, kind):
    target = tmp_path / "m.bank"
    something_else(target, kind)
    before = files_of(tmp_path)
    with pytest.raises(BankFormatError, match=r"choose another name, or move it away$"):
        write_bank(target, SMALL)
    assert files_of(tmp_path) == before
    assert os.listdir(tmp_path) == ["m.bank"]


def test_what_appears_during_the_build_is_not_replaced(tmp_path):
    target = tmp_path / "m.bank"
    with (
        pytest.raises(BankFormatError),
        BankWriter(target, levels=(4,), source=SOURCE) as writer,
    ):
        add(writer, "l", SMALL[0], random_codes(SMALL[0], (4,)), (4,))
        something_else(target, "directory of files")
        writer.finish(b"")
    assert files_of(tmp_path) == {"m.bank/thesis.txt": b"precious"}
    assert os.listdir(tmp_path) == ["m.bank"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_build_changes_nothing(tmp_path, error):
    write_bank(tmp_path / "m.bank", SMALL)
    before = files_of(tmp_path)
    with (
        pytest.raises(error),
        BankWriter(tmp_path / "m.bank", levels=(4,), source=SOURCE) as writer,
    ):
        add(writer, "l", SMALL[0], random_codes(SMALL[0], (4,)), (4,))
        raise error
    assert files_of(tmp_path) == before
    assert os.listdir(tmp_path) == ["m.bank"]


@pytest.mark.parametrize("step", ["_exchange", "sync_directory"])
def test_an_interrupt_while_committing_leaves_one_whole_bank(tmp_path, monkeypatch, step):
    write_bank(tmp_path / "m.bank", SMALL, seed=1)
    real = getattr(staging, step)

    def interrupted(*arguments):
        real(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(staging, step, interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_bank(tmp_path / "m.bank", SMALL, seed=2)
    assert verify(tmp_path / "m.bank").ok
    assert os.listdir(tmp_path) == ["m.bank"]


def test_a_build_that_does_not_finish_leaves_nothing(tmp_path):
    with BankWriter(tmp_path / "m.bank", levels=(4,), source=SOURCE):
        pass
    assert os.listdir(tmp_path) == []


def test_codes_that_do_not_fit_are_refused(tmp_path):
    shape = SMALL[0]
    with BankWriter(tmp_path / "m.bank", levels=(4,), source=SOURCE) as writer:
        with pytest.raises(ValueError, match="plane p4 is of 3 rows, expected 4"):
            add(writer, "l", Shape(4, 5), random_codes(shape, (4,)), (4,))
        with pytest.raises(ValueError, match="plane p4 is absent"):
            add(writer, "l", shape, random_codes(shape, (1,)), (4,))
        with pytest.raises(BankFormatError, match="layer l: residual_steps is 7"):
            add(writer, "l", Shape(3, 5, residual_steps=7), random_codes(shape, (4,)), (4,))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.full((1, 2), 0.5), "sensitivity 0.5 at level 32, must be 0"),
        (np.array([[0, np.nan]]), "sensitivity nan at level 4, must be finite, 0 or more"),
        (np.array([[0, -1]]), r"sensitivity -1.0 at level 4, must be finite, 0 or more"),
        (np.zeros((2, 2)), r"layer0: sensitivity is \(2, 2\), expected \(1, 2\)"),
    ],
    ids=["of float", "not a number", "negative", "wrong shape"],
)
def test_a_sensitivity_that_cannot_be_is_refused(tmp_path, monkeypatch, value, message):
    monkeypatch.setattr(bank_samples, "random_sensitivity", lambda shape, levels: value)
    with pytest.raises(ValueError, match=message):
        write_bank(tmp_path / "m.bank", SMALL, levels=(32, 4))
    assert os.listdir(tmp_path) == []


def test_two_builds_of_one_bank_do_not_meet(tmp_path):
    with BankWriter(tmp_path / "m.bank", levels=(4,), source=SOURCE) as writer:
        with pytest.raises(StorageError, match="another program is building there"):
            write_bank(tmp_path / "m.bank", SMALL)
        add(writer, "l", SMALL[0], random_codes(SMALL[0], (4,)), (4,))
        writer.finish(b"")
    assert verify(tmp_path / "m.bank").ok


def test_a_missing_directory_is_named(tmp_path):
    with pytest.raises(StorageError, match=r"m\.bank: No such file or directory: create the dir"):
        write_bank(tmp_path / "absent/m.bank", SMALL)
