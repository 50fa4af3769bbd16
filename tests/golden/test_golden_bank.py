"""The committed bank stands for every bank in the field: both directions must keep working."""

from __future__ import annotations

import make_golden
import numpy as np
import pytest

from bapq_edge.bank.exchange import pack, unpack
from bapq_edge.bank.reader import Bank
from bapq_edge.bank.verify import verify


def files_of(directory):
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


def test_todays_writer_gives_the_golden_bytes(tmp_path):
    make_golden.write_golden(tmp_path / "new.bank")
    assert files_of(tmp_path / "new.bank") == files_of(make_golden.GOLDEN)


@pytest.mark.parametrize("name", make_golden.LAYERS)
def test_todays_reader_reads_the_golden_codes(name):
    bank = Bank.open(make_golden.GOLDEN)
    found, expected = bank.layer_codes(bank.layer(name)), make_golden.golden_codes(name)
    if expected.weight is None:
        assert found.weight is None
    else:
        np.testing.assert_array_equal(found.weight, expected.weight)
    for field in ("codes", "scales", "bias"):
        arrays = getattr(expected, field)
        assert getattr(found, field).keys() == arrays.keys()
        for key, array in arrays.items():
            np.testing.assert_array_equal(getattr(found, field)[key], array)


def test_todays_reader_reads_the_golden_sensitivity():
    expected = np.concatenate([make_golden.golden_sensitivity(name) for name in make_golden.LAYERS])
    np.testing.assert_array_equal(Bank.open(make_golden.GOLDEN).sensitivity(), expected)


@pytest.mark.parametrize("name", make_golden.LAYERS)
def test_todays_reader_reads_the_golden_rows(name):
    bank = Bank.open(make_golden.GOLDEN)
    expected = make_golden.golden_rows(name)
    for key in ("row_order", "dropped_bias"):
        np.testing.assert_equal(getattr(bank, key)(bank.layer(name)), expected[key])


def test_golden_bank_is_intact():
    assert verify(make_golden.GOLDEN).ok
    assert Bank.open(make_golden.GOLDEN).graph_bytes() == make_golden.GRAPH


def test_golden_bank_survives_the_exchange_form(tmp_path):
    unpack(make_golden.GOLDEN, tmp_path)
    pack(tmp_path, tmp_path / "again.bank")
    assert files_of(tmp_path / "again.bank") == files_of(make_golden.GOLDEN)
