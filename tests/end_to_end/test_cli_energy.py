"""Joules in run, bench and profile: by a mock's meter, by an estimate, or not at all."""

from __future__ import annotations

import json

import pytest

from bapq_edge import errors


@pytest.fixture
def meter(tmp_path, monkeypatch):
    """A mock that draws 3 W, and its source named; idle or not, so a run takes nothing more."""
    (tmp_path / "trace.csv").write_text("time_s,power_w,power_scope\n0,3,board\n")
    monkeypatch.setenv("BAPQ_SENSORS", f"mock:{tmp_path / 'trace.csv'}")


def test_run_tells_the_energy_of_warm_runs_beyond_idle(bapq, made, meter):
    arguments = ("run", made / "one.bank", "--input", made / "one.npz", "--repeat", 50)
    out, _ = bapq(*arguments, "--json")
    energy = json.loads(out)["energy"]
    assert energy["energy_j"] == pytest.approx(0, abs=1e-6)
    assert energy["idle_w"] == pytest.approx(3)
    assert energy["idle_s"] > 1.9
    assert (energy["power_source"], energy["power_scope"]) == ("mock", "board")
    assert energy["power_hz"] > 0 and energy["estimated"] is False
    out, _ = bapq(*arguments)
    assert "mJ a run more than idle (3.00 W" in out


def test_without_a_meter_there_is_no_energy_and_an_estimate_only_when_asked_for(bapq, made):
    arguments = ("run", made / "one.bank", "--input", made / "one.npz", "--repeat", 3, "--json")
    assert json.loads(bapq(*arguments)[0])["energy"] is None
    asked = ("--estimate-energy", "--profile", "raspberry_pi_4", "--threads", 1)
    report = json.loads(bapq(*arguments, *asked)[0])
    energy = report["energy"]
    assert energy["estimated"] is True and "raspberry_pi_4" in energy["power_source"]
    expected = (6.4 - 2.7) / 4 * report["warm_run_ms"] / 1e3
    assert energy["energy_j"] == pytest.approx(expected)
    assert energy["error_j"] == pytest.approx(expected * 0.2)


def test_an_estimate_needs_a_profile(refused, made):
    arguments = ("run", made / "one.bank", "--input", made / "one.npz", "--estimate-energy")
    assert "--profile" in refused(errors.RequestError, *arguments)


def test_bench_has_the_energy_of_every_row(bapq, made, meter):
    arguments = ("bench", made / "one.bank", "--against", made / "one.onnx", "-r", 2)
    rows = json.loads(bapq(*arguments, "--levels", 8, "--json")[0])
    assert len(rows) == 2
    for row in rows:
        assert row["energy_j"] == pytest.approx(0, abs=1e-5)
        assert row["idle_w"] == pytest.approx(3) and row["power_source"] == "mock"
        assert row["energy_estimated"] is False


def test_bench_shows_an_estimate_as_one(bapq, made):
    estimate = ("--estimate-energy", "--profile", "raspberry_pi_5", "-r", 2, "--levels", 8)
    table, _ = bapq("bench", made / "one.bank", *estimate)
    assert "energy mJ" in table.splitlines()[0]
    assert "energy of a run: estimate, beyond that of the idle board, 3.00 W" in table
    table, _ = bapq("bench", made / "one.bank", "-r", 2, "--levels", 8)
    assert "energy" not in table


def test_profile_tells_the_energy(bapq, made, meter, tmp_path):
    arguments = ("profile", made / "one.bank", "-o", tmp_path / "t.json", "--seconds", 0.3)
    energy = json.loads(bapq(*arguments, "--json")[0])["energy"]
    assert energy["idle_w"] == pytest.approx(3) and energy["energy_j"] == pytest.approx(0, abs=1e-5)


def test_a_window_that_does_not_count_is_told(bapq, made, tmp_path, monkeypatch):
    # It changes for ten minutes: a busy machine comes to its runs late.
    times_s = [2.02 + i / 500 for i in range(5000)] + [12.1 + i / 20 for i in range(12_000)]
    rows = "".join(f"{time_s},3,{i % 2}\n" for i, time_s in enumerate(times_s))
    (tmp_path / "trace.csv").write_text("time_s,power_w,throttled\n0,3,0\n" + rows)
    monkeypatch.setenv("BAPQ_SENSORS", f"mock:{tmp_path / 'trace.csv'}")
    arguments = ("run", made / "one.bank", "--input", made / "one.npz", "--repeat", 5000)
    out, err = bapq(*arguments, "--json")
    assert json.loads(out)["energy"] is None
    assert "no energy by mock: throttling changed: 0x0, 0x1" in err and err.count("\n") == 1
