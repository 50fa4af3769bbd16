"""The exchange form: opens with NumPy, and goes back byte for byte."""

from __future__ import annotations

import os

import numpy as np
import pytest

from bapq_edge.bank.exchange import pack, unpack
from bapq_edge.bank.layout import PLANES
from bapq_edge.bank.reader import Bank
from bapq_edge.errors import (
    BankFormatError,
    BankIntegrityError,
    BankNotFoundError,
    BankTruncatedError,
    MissingPlaneWarning,
    StorageError,
)
from support.bank_samples import PRUNED, RAGGED, Shape, files_of, write_bank

SMALL = (Shape(20, 40), Shape(3, 5, has_bias=False))


@pytest.fixture
def tree(tmp_path):
    """An exchange form of two small layers; its bank is m.bank beside it."""
    write_bank(tmp_path / "m.bank", SMALL)
    unpack(tmp_path / "m.bank", tmp_path / "tree")
    return tmp_path / "tree"


@pytest.mark.parametrize("levels", [(32, 8, 4, 2, 1), (8, 4), (1,)], ids=str)
def test_pack_inverts_unpack(tmp_path, levels):
    write_bank(tmp_path / "m.bank", levels=levels)
    folder = unpack(tmp_path / "m.bank", tmp_path / "tree")
    assert folder == tmp_path / "tree/data/bank/sample"
    assert pack(tmp_path / "tree", tmp_path / "again.bank") == tmp_path / "again.bank"
    assert files_of(tmp_path / "again.bank") == files_of(tmp_path / "m.bank")
    assert sorted(os.listdir(tmp_path)) == ["again.bank", "m.bank", "tree"]


def test_pack_inverts_unpack_of_reordered_and_dropped_rows(tmp_path):
    write_bank(tmp_path / "m.bank", PRUNED)
    folder = unpack(tmp_path / "m.bank", tmp_path / "tree")
    bank = Bank.open(tmp_path / "m.bank")
    order = np.load(folder / "tables/row_order.npy", allow_pickle=False)
    np.testing.assert_array_equal(order[:40], bank.row_order(bank.layer("layer0")))
    # Chunks hold the stored rows, as they are stored.
    chunk = np.load(folder / "layer1/chunk_1_q4.npy", allow_pickle=False)
    np.testing.assert_array_equal(chunk["code"], bank.chunk_codes("p4", 4).codes["p4"])
    assert len(chunk) == 14
    pack(tmp_path / "tree", tmp_path / "again.bank")
    assert files_of(tmp_path / "again.bank") == files_of(tmp_path / "m.bank")


@pytest.mark.parametrize("table", ["row_order", "dropped_bias"])
def test_tables_of_rows_in_a_tree_are_checked(tmp_path, table):
    write_bank(tmp_path / "m.bank", PRUNED)
    file = unpack(tmp_path / "m.bank", tmp_path / "tree") / f"tables/{table}.npy"
    values = np.load(file)
    values[0], rest = (2**31, values[1:]) if table == "row_order" else (np.nan, values[1:])
    np.save(file, values)
    with pytest.raises(BankFormatError, match=rf"{table}\.npy: layer layer\d: .*unpack the bank"):
        pack(tmp_path / "tree", tmp_path / "again.bank")
    np.save(file, rest)
    with pytest.raises(BankFormatError, match=rf"{table}\.npy: has the \.npy header"):
        pack(tmp_path / "tree", tmp_path / "again.bank")
    file.unlink()
    with pytest.raises(BankFormatError, match=f"lacks 'tables/{table}.npy'"):
        pack(tmp_path / "tree", tmp_path / "again.bank")


def test_edited_tables_of_rows_give_a_valid_bank(tmp_path):
    write_bank(tmp_path / "m.bank", PRUNED)
    folder = unpack(tmp_path / "m.bank", tmp_path / "tree")
    order = np.load(folder / "tables/row_order.npy")
    order[:2] = order[1::-1]
    np.save(folder / "tables/row_order.npy", order)
    bank = Bank.open(pack(tmp_path / "tree", tmp_path / "again.bank"))
    np.testing.assert_array_equal(bank.row_order(bank.layer("layer0")), order[:40])


def test_every_file_opens_with_numpy(tree):
    folder = tree / "data/bank/sample"
    bank = Bank.open(tree.parent / "m.bank")
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.npy"))
    bits = (1, 2, 32, 4, 8)
    assert files == [
        *(f"layer0/chunk_{i}_q{bit}.npy" for i in (0, 1) for bit in bits),
        *(f"layer1/chunk_0_q{bit}.npy" for bit in bits),
        "tables/sensitivity.npy",
    ]
    codes = bank.layer_codes(bank.layer("layer0"))
    for plane, bit in PLANES.items():
        array = np.load(folder / f"layer0/chunk_1_q{bit}.npy", allow_pickle=False)
        assert array.shape == (4,)
        if plane == "f32":
            np.testing.assert_array_equal(array["weight"], codes.weight[16:])
        else:
            np.testing.assert_array_equal(array["code"], codes.codes[plane][16:])
        np.testing.assert_array_equal(array["bias"], codes.bias[bit][16:])
        if bit in codes.scales:
            np.testing.assert_array_equal(array["scale"], codes.scales[bit][16:])
        else:
            assert "scale" not in array.dtype.names
    assert np.load(folder / "layer1/chunk_0_q8.npy").dtype.names == ("code",)


def test_files_that_numpy_saved_are_packed(tree):
    """An edited weight ends up in the bank, whatever header padding NumPy chooses."""
    file = tree / "data/bank/sample/layer0/chunk_0_q4.npy"
    array = np.load(file)
    array["code"][3, 7] ^= 5
    np.save(file, array)
    pack(tree, tree.parent / "edited.bank")
    bank = Bank.open(tree.parent / "edited.bank")
    np.testing.assert_array_equal(
        bank.layer_codes(bank.layer("layer0")).codes["p4"][:16], array["code"]
    )


def test_an_edited_sensitivity_is_packed(tree):
    file = tree / "data/bank/sample/tables/sensitivity.npy"
    table = np.load(file)
    table[1, 2] = 7
    np.save(file, table)
    pack(tree, tree.parent / "edited.bank")
    np.testing.assert_array_equal(Bank.open(tree.parent / "edited.bank").sensitivity(), table)


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda a: a * np.float32(np.nan), "chunk 0 has the sensitivity nan at level"),
        (lambda a: a.astype(np.float64), "has the .npy header"),
        (lambda a: a[:, :3], "has the .npy header"),
    ],
)
def test_a_damaged_sensitivity_is_refused(tree, tmp_path, edit, words):
    file = tree / "data/bank/sample/tables/sensitivity.npy"
    np.save(file, edit(np.load(file)))
    with pytest.raises(BankFormatError) as caught:
        pack(tree, tmp_path / "again.bank")
    assert words in str(caught.value)
    assert str(file) in str(caught.value)
    assert sorted(os.listdir(tmp_path)) == ["m.bank", "tree"]


def test_the_model_folder_can_be_named_instead(tree, tmp_path):
    pack(tree / "data/bank/sample", tmp_path / "again.bank")
    assert files_of(tmp_path / "again.bank") == files_of(tmp_path / "m.bank")


def test_unpacking_again_replaces_only_an_exchange_form(tree, tmp_path):
    write_bank(tmp_path / "m.bank", RAGGED)
    folder = unpack(tmp_path / "m.bank", tree)
    assert (folder / "layer4").is_dir()
    (folder / "thesis.txt").write_bytes(b"precious")
    before = files_of(tree)
    with pytest.raises(BankFormatError, match="is not an unpacked bank: move it away") as caught:
        unpack(tmp_path / "m.bank", tree)
    assert "thesis.txt" in str(caught.value)
    assert files_of(tree) == before


def test_a_failed_unpack_leaves_nothing(tmp_path):
    write_bank(tmp_path / "m.bank", SMALL)
    plane = tmp_path / "m.bank/planes/s1.bin"
    plane.write_bytes(b"\xff" + plane.read_bytes()[1:])
    with pytest.raises(BankIntegrityError):
        unpack(tmp_path / "m.bank", tmp_path / "tree")
    with pytest.raises(StorageError, match="/a is no directory: create it first"):
        unpack(tmp_path / "m.bank", tmp_path / "a/tree")
    assert os.listdir(tmp_path) == ["m.bank"]


def test_a_bank_without_all_planes_is_not_unpacked(tmp_path):
    write_bank(tmp_path / "m.bank", SMALL)
    (tmp_path / "m.bank/planes/r8.bin").unlink()
    with (
        pytest.warns(MissingPlaneWarning),
        pytest.raises(BankNotFoundError, match=r"r8\.bin is absent: put it back"),
    ):
        unpack(tmp_path / "m.bank", tmp_path / "tree")
    assert os.listdir(tmp_path) == ["m.bank"]


def test_what_to_pack_must_be_clear(tree, tmp_path):
    with pytest.raises(BankNotFoundError, match=r"holds no data/bank/<model>/manifest\.json"):
        pack(tmp_path / "m.bank/planes", tmp_path / "again.bank")
    (tree / "data/bank/second").mkdir()
    (tree / "data/bank/second/manifest.json").write_bytes(b"")
    with pytest.raises(BankFormatError, match="holds 2 models: name one of them"):
        pack(tree, tmp_path / "again.bank")


def saved(array):
    return lambda file: np.save(file, array(np.load(file)), allow_pickle=True)


def edited(name, value):
    def edit(array):
        array[name][0] = value
        return array

    return saved(edit)


@pytest.mark.parametrize(
    ("damage", "error", "words"),
    [
        (edited("code", 16), BankFormatError, "holds the code 16, allowed is 0..15"),
        (edited("scale", 1.001), BankFormatError, "which bf16 cannot represent"),
        (edited("scale", np.inf), BankFormatError, "a scale that is not finite"),
        (saved(lambda a: a[:5]), BankFormatError, "'shape': (5,), }"),
        (saved(lambda a: a["code"]), BankFormatError, "has the .npy header"),
        (saved(lambda a: np.array([a], object)), BankFormatError, "'descr': '|O'"),
        (lambda f: f.write_bytes(b""), BankFormatError, "begins with b''"),
        (lambda f: f.write_bytes(f.read_bytes()[:-1]), BankFormatError, "bytes of values"),
        (lambda f: f.write_bytes(f.read_bytes() + b"0"), BankFormatError, "bytes of values"),
        (lambda f: f.write_bytes(bytes(1 << 20)), BankFormatError, "has 1048576 bytes, allowed"),
        (lambda f: f.unlink(), BankFormatError, "lacks 'layer0/chunk_0_q4.npy'"),
        (lambda f: os.mkfifo(f.with_name("x")), BankFormatError, "unknown file 'layer0/x'"),
    ],
)
def test_damaged_files_are_refused_by_name(tree, tmp_path, damage, error, words):
    damage(tree / "data/bank/sample/layer0/chunk_0_q4.npy")
    before = files_of(tmp_path)
    with pytest.raises(error) as caught:
        pack(tree, tmp_path / "m.bank")
    assert words in str(caught.value)
    assert "layer0" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert files_of(tmp_path) == before
    assert sorted(os.listdir(tmp_path)) == ["m.bank", "tree"]


def test_a_damaged_graph_is_refused(tree, tmp_path):
    graph = tree / "data/bank/sample/graph/main.onnx"
    graph.write_bytes(b"grapf")
    with pytest.raises(BankIntegrityError, match=r"main\.onnx has BLAKE2b"):
        pack(tree, tmp_path / "again.bank")
    assert sorted(os.listdir(tmp_path)) == ["m.bank", "tree"]


def test_a_damaged_manifest_is_refused(tree, tmp_path):
    manifest = tree / "data/bank/sample/manifest.json"
    manifest.write_bytes(manifest.read_bytes()[:-1])
    with pytest.raises(BankFormatError, match="breaks off"):
        pack(tree, tmp_path / "again.bank")


def test_truncated_errors_are_bank_errors_not_storage_errors(tmp_path):
    """BankTruncatedError is an OSError too, and must not be taken for a full disk."""
    write_bank(tmp_path / "m.bank", SMALL)
    graph = tmp_path / "m.bank/graph/main.onnx"
    graph.write_bytes(b"")
    with pytest.raises(BankTruncatedError):
        unpack(tmp_path / "m.bank", tmp_path / "tree")
