"""The committed bank stands for every bank in the field: both directions must keep working."""

from __future__ import annotations

import numpy as np
import pytest

from bapq_edge.bank.exchange import pack, unpack
from bapq_edge.bank.reader import Bank
from bapq_edge.bank.verify import verify
from support.bank_samples import assert_same_codes, files_of
from support.golden_bank import (
    GOLDEN,
    GRAPH,
    LAYERS,
    golden_codes,
    golden_rows,
    golden_sensitivity,
    write_golden,
)


def test_todays_writer_gives_the_golden_bytes(tmp_path):
    write_golden(tmp_path / "new.bank")
    assert files_of(tmp_path / "new.bank") == files_of(GOLDEN)


@pytest.mark.parametrize("name", LAYERS)
def test_todays_reader_reads_the_golden_codes(name):
    bank = Bank.open(GOLDEN)
    found, expected = bank.layer_codes(bank.layer(name)), golden_codes(name)
    assert_same_codes(found, expected)


def test_todays_reader_reads_the_golden_sensitivity():
    expected = np.concatenate([golden_sensitivity(name) for name in LAYERS])
    np.testing.assert_array_equal(Bank.open(GOLDEN).sensitivity(), expected)


@pytest.mark.parametrize("name", LAYERS)
def test_todays_reader_reads_the_golden_rows(name):
    bank = Bank.open(GOLDEN)
    expected = golden_rows(name)
    for key in ("row_order", "dropped_bias"):
        np.testing.assert_equal(getattr(bank, key)(bank.layer(name)), expected[key])


def test_golden_bank_is_intact():
    assert verify(GOLDEN).ok
    assert Bank.open(GOLDEN).graph_bytes() == GRAPH


def test_golden_bank_survives_the_exchange_form(tmp_path):
    unpack(GOLDEN, tmp_path)
    pack(tmp_path, tmp_path / "again.bank")
    assert files_of(tmp_path / "again.bank") == files_of(GOLDEN)
