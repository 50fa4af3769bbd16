"""Opening a bank that is as it should be, also when some of its planes were left out."""

from __future__ import annotations

import dataclasses
import warnings

import numpy as np
import pytest

from bapq_edge.bank.codes import LayerCodes
from bapq_edge.bank.layout import PLANES
from bapq_edge.bank.reader import Bank
from bapq_edge.bank.verify import verify
from bapq_edge.errors import BankFormatError, BankNotFoundError, MissingPlaneWarning
from support.bank_samples import RAGGED, assert_same_codes, files_of, random_sensitivity, write_bank


@pytest.fixture
def path(tmp_path):
    write_bank(tmp_path / "m.bank")
    return tmp_path / "m.bank"


@pytest.mark.parametrize(
    ("absent", "levels"),
    [
        (("r8",), (32, 4, 2, 1)),
        (("p4",), (32, 2, 1)),
        (("m1", "f32"), (8, 4, 1)),
        (("s1", "r8", "f32"), (4,)),
    ],
    ids=str,
)
def test_absent_planes_leave_fewer_levels(path, absent, levels):
    for plane in absent:
        (path / f"planes/{plane}.bin").unlink()
    with pytest.warns(MissingPlaneWarning) as caught:
        bank = Bank.open(path)
    assert bank.levels == levels
    assert set(bank.planes) == set(PLANES) - set(absent)
    assert not set(bank.planes) & set(absent)
    assert len(caught) == 1
    assert all(f"planes/{plane}.bin" in str(caught[0].message) for plane in absent)
    assert str(caught[0].message).endswith("can run: " + ", ".join(map(str, levels)))


def test_a_plane_that_comes_back_brings_its_level(path):
    away = path.parent / "r8.bin"
    (path / "planes/r8.bin").rename(away)
    with pytest.warns(MissingPlaneWarning):
        assert verify(path).ok
    away.rename(path / "planes/r8.bin")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert 8 in Bank.open(path).levels


def test_without_any_level_there_is_no_bank(path):
    for file in (path / "planes").iterdir():
        file.unlink()
    with pytest.raises(BankFormatError, match="layer layer0 cannot run"):
        Bank.open(path)


def test_codes_of_the_planes_that_are_there(path):
    (path / "planes/p4.bin").unlink()
    (path / "planes/f32.bin").unlink()
    with pytest.warns(MissingPlaneWarning):
        bank = Bank.open(path)
    codes = bank.layer_codes(bank.layer("layer3"))
    assert codes.weight is None
    assert set(codes.codes) == {"r8", "s1", "m1"}
    assert set(codes.scales) == {2, 1}


def test_sizes(path):
    bank = Bank.open(path)
    assert bank.weights == sum(shape.rows * shape.columns for shape in RAGGED)
    one = {plane: int(bank.chunks(plane)["bytes"].sum()) for plane in PLANES}
    assert bank.weight_bytes(8) == one["p4"] + one["r8"]
    assert bank.weight_bytes(2) == one["s1"] + one["m1"]
    assert bank.bits_per_weight(4) == 8 * one["p4"] / bank.weights


def test_sensitivity_has_a_row_per_chunk_and_a_column_per_level_built(path):
    expected = np.concatenate([random_sensitivity(shape) for shape in RAGGED])
    (path / "planes/r8.bin").unlink()
    with pytest.warns(MissingPlaneWarning):
        bank = Bank.open(path)
    np.testing.assert_array_equal(bank.sensitivity(), expected)
    assert bank.sensitivity().dtype == np.float32
    assert bank.sensitivity().shape == (bank.manifest.chunk_count, len(bank.manifest.levels))


def test_chunks_know_their_layer(path):
    bank = Bank.open(path)
    chunks = [bank.layer_of(chunk).name for chunk in range(bank.manifest.chunk_count)]
    assert chunks == ["layer0", "layer1"] + 2 * ["layer2"] + 3 * ["layer3"] + 2 * ["layer4"]
    layer = bank.layer("layer3")
    slices = [layer.chunk_slice(c) for c in range(layer.first_chunk, layer.first_chunk + 3)]
    assert slices == [slice(0, 48), slice(48, 96), slice(96, 100)]


def test_reading_a_chunk_gives_the_bytes_of_the_file(path):
    bank = Bank.open(path)
    file = bank.plane_path("p4").read_bytes()
    row = bank.chunks("p4")[3]
    assert bank.read_chunk("p4", 3) == file[row["offset"] :][: row["bytes"]]
    codes = bank.chunk_codes("p4", 3)
    assert codes.codes["p4"].shape == (1, 33)


def test_opening_and_reading_change_nothing(path):
    before = files_of(path)
    bank = Bank.open(path)
    bank.layer_codes(bank.layer("layer2"))
    verify(path)
    assert files_of(path) == before


def test_no_bank_at_all(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(BankNotFoundError, match="there is no bank"):
        Bank.open(tmp_path / "absent")
    with pytest.raises(BankNotFoundError, match=r"holds no manifest\.json"):
        Bank.open(tmp_path / "empty")
    with pytest.raises(BankFormatError, match="is a file, a bank is a directory"):
        Bank.open(tmp_path / "file")


def test_codes_are_independent_of_the_chunking(tmp_path):
    shapes = [dataclasses.replace(RAGGED[3], chunk_rows=rows) for rows in (16, 112)]
    read: list[LayerCodes] = []
    for i, shape in enumerate(shapes):
        write_bank(tmp_path / f"{i}.bank", [shape])
        bank = Bank.open(tmp_path / f"{i}.bank")
        read.append(bank.layer_codes(bank.layer("layer0")))
    assert_same_codes(*read)
    assert np.array_equal(read[0].codes["p4"], read[1].codes["p4"])
