"""What the report predicts of boards: by hand, and marked where a profile only assumes."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from bapq_edge.bank.reader import Bank
from bapq_edge.control.device_profile import load_profile
from bapq_edge.planning.planner import chunk_costs
from bapq_tools.report.board_section import Board, board_section
from bapq_tools.report.run_costs import RunCosts, levels_shown, measure_costs
from support.streaming import chain_bank, mobile_bank, tied_bank

MIB = 1 << 20
PEAKS = {8: 9 * MIB, 4: 7 * MIB, 2: 6 * MIB}
CHAIN = np.array([96 * 400, 400 * 250, 250 * 64], float)


@pytest.fixture(scope="module")
def bank(tmp_path_factory):
    return Bank.open(chain_bank(tmp_path_factory.mktemp("boards") / "m.bank"))


def board(bank, **changes):
    """A board of 1 GMAC/s at level 8 and 2 at level 4, which nothing is assumed of."""
    known = dict.fromkeys(("gmac_s", "idle_w", "busy_w", "power_error_percent"), "measured")
    known |= dict.fromkeys(("memory_mib", "storage_read_mb_s"), "measured")
    profile = dataclasses.replace(
        load_profile("raspberry_pi_4"),
        gmac_s={"level_8": 1.0, "level_4": 2.0, "level_2": 2.0},
        **{"storage_read_mb_s": 10, "sources": known, **changes},
    )
    return Board(profile, chunk_costs(bank), bank, run_costs())


def drawn(*arguments):
    return board_section(*arguments).replace("\u00a0", " ")


def run_costs(whole=True):
    return RunCosts(CHAIN, PEAKS, 3 * MIB, 5 * MIB, "x [1, 96]", whole)


def test_the_products_of_a_run_are_those_of_its_layers(bank, tmp_path):
    found = measure_costs(bank, shapes={"x": (3, 96)})
    np.testing.assert_array_equal(found.products, 3 * CHAIN)
    assert found.whole and found.shapes == "x [3, 96]"
    assert [*found.peak_bytes] == [8, 4, 2]
    # So small a bank is all but nothing beside ONNX Runtime's own memory.
    for size in (*found.peak_bytes.values(), found.least_peak_bytes, found.besides_bytes):
        assert MIB < size < 40 * MIB
    mobile = measure_costs(Bank.open(mobile_bank(tmp_path / "c.bank")))
    places = 7 * 6
    np.testing.assert_array_equal(mobile.products, np.array([120 * 48, 120 * 9, 40 * 120]) * places)
    # A table is looked up, and multiplied by where a product reads it, too.
    tied = measure_costs(Bank.open(tied_bank(tmp_path / "t.bank")))
    np.testing.assert_array_equal(tied.products, [150 * 64, 0, 64 * 64])


def test_time_is_products_over_speed_and_reading_that_cannot_hide(bank):
    here = board(bank)
    assert here.run_s(8, None) == pytest.approx(CHAIN.sum() / 1e9)
    assert here.run_s(4, None) == pytest.approx(CHAIN.sum() / 2e9)
    # Of 155 KB nearly all is read in every run, at 10 MB/s: far longer than 0.15 ms of computing.
    least = here.least_bytes(8)
    streamed = bank.weight_bytes(8) - least
    assert here.run_s(8, least) == pytest.approx(streamed / 10e6, rel=0.2)
    fast = board(bank, storage_read_mb_s=100_000)
    assert fast.run_s(8, fast.least_bytes(8)) == pytest.approx(CHAIN.sum() / 1e9, rel=0.01)


def test_memory_is_the_weights_and_the_rest_beside_the_automatic_budget(bank):
    here = board(bank, memory_mib=100, reserve_mib=20)
    assert here.budget_bytes == 40 * MIB
    assert here.placed_bytes(8) == bank.weight_bytes(8)
    assert here.limit_bytes(8) == int(40 * MIB * (1 - 1 / 32)) - 5 * MIB
    assert board(bank, memory_mib=24, reserve_mib=20).limit_bytes(8) is None


def test_what_rests_on_an_assumption_is_marked_and_nothing_else(bank, tmp_path, monkeypatch):
    from bapq_edge.control.device_profile import save_profile

    known = board(bank).profile
    sources = {**known.sources, "busy_w": "assumption: a guess"}
    for name, profile in (
        ("known", known),
        ("guessed", dataclasses.replace(known, sources=sources)),
    ):
        save_profile(dataclasses.replace(profile, name=name), tmp_path / f"{name}.yaml")
    text = drawn(bank, run_costs(), [tmp_path / "known.yaml", tmp_path / "guessed.yaml"])
    times, memory, energy = text.split("<table>")[1:]

    def cells(table, name):
        return table.partition(f"<td>{name}</td>")[2].partition("</tr>")[0]

    assert "*" not in cells(times, "known") + cells(memory, "known") + cells(energy, "known")
    assert "*" not in cells(times, "guessed") + cells(memory, "guessed")
    assert cells(energy, "guessed").count("*") == 6
    # (6.4 - 2.7) W over four cores, for 0.154 ms; 20 % either way.
    assert "<td>0.143 ± 0.029</td>" in cells(energy, "known")
    assert cells(times, "raspberry_pi_5").count("*") == 9
    assert cells(times, "generic_x86").count("not known") == 9


def test_a_board_without_a_power_model_and_one_too_small_are_told(bank, tmp_path):
    from bapq_edge.control.device_profile import save_profile

    small = dataclasses.replace(board(bank, memory_mib=24, reserve_mib=20).profile, busy_w=None)
    save_profile(dataclasses.replace(small, name="small"), tmp_path / "small.yaml")
    text = drawn(bank, run_costs(whole=False), [tmp_path / "small.yaml"])
    assert text.count("does not fit") == 3 and text.count("no power model") == 6
    assert "<td>6.0 MiB, too much</td><td>3.0 MiB</td>" in text
    assert "in a branch or a loop are not counted" in text
    assert "No times" in drawn(bank, "there is no input")


def test_levels_of_a_bank_that_lacks_them(bank):
    assert levels_shown(bank) == [8, 4, 2]
