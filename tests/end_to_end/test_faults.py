"""Faults at the read: a named error or a loud fallback, right answers again when they are gone."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto

import support
from bapq_edge import Session
from bapq_edge.bank.install import install
from bapq_edge.bank.layout import PLANES_OF_LEVEL
from bapq_edge.errors import (
    BankIntegrityError,
    BankTruncatedError,
    DegradedWarning,
    RunInputError,
)
from bapq_edge.planning.planner import Request, plan
from support.banks import graph_bytes, node, write_bank
from support.internals import adopt, bank_of, costs_of
from support.streaming import (
    LINEAR,
    PRECISIONS,
    all_resident,
    chain_bank,
    inputs,
    layer,
    limits,
    publish,
    resident_outputs,
    run,
    tied_bank,
)

SUPPORT = Path(support.__file__).parent


pytestmark = pytest.mark.usefixtures("watchdog")


# ---- the disk: in processes of their own, where a preloaded library answers the reads ----


@pytest.fixture(scope="module")
def faulty_pread():
    command = [SUPPORT.parent / "native" / "build.sh", "tests", "faulty_pread"]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


@pytest.mark.parametrize(
    "scenario",
    [
        "interrupted",
        "slow",
        "too_slow",
        "in_another_order",
        "failing",
        "dead",
        "opening",
        "flapping",
    ],
)
def test_a_disk_that_is(faulty_pread, tmp_path, scenario):
    (tmp_path / "faults").write_bytes(bytes(4096))
    environment = {
        **os.environ,
        "LD_PRELOAD": faulty_pread,
        "BAPQ_FAULTS": str(tmp_path / "faults"),
        "PYTHONPATH": str(SUPPORT.parent),
    }
    command = [sys.executable, "-X", "faulthandler", str(SUPPORT / "disk_faults.py"), scenario]
    result = subprocess.run(
        [*command, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr[-2000:]


# ---- the files ----


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """(bank, input, {level: output})"""
    path = chain_bank(tmp_path_factory.mktemp("original") / "m.bank")
    x, _ = inputs("chain")
    outputs = resident_outputs(path, [x])
    return (
        path,
        x,
        {precision.get("level"): y for precision, (y,) in zip(PRECISIONS, outputs, strict=True)},
    )


@pytest.fixture
def bank(original, tmp_path):
    return shutil.copytree(original[0], tmp_path / "m.bank")


def plane_file(bank, plane):
    return bank / "planes" / f"{plane}.bin"


def flip(bank, plane, position):
    with open(plane_file(bank, plane), "r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 16]))


def place_of(session, plane, chunk):
    """A byte inside the chunk, and the name of its layer."""
    extent = bank_of(session).chunks(plane)[chunk]
    offset, size = (int(extent[name]) for name in ("offset", "bytes"))
    first = [entry.first_chunk for entry in bank_of(session).manifest.layers]
    name = bank_of(session).manifest.layers[np.searchsorted(first, chunk, side="right") - 1].name
    return offset + size * 2 // 3, name


CASES = [(level, plane) for level, planes in PLANES_OF_LEVEL.items() for plane in planes]


LOWER = {"r8": 4, "m1": 1}
"""Level that stands in where this plane cannot be read."""


@pytest.mark.parametrize(("level", "plane"), CASES)
@pytest.mark.parametrize("chunk", [0, 30, 44])
def test_a_flipped_bit_is_named_while_streaming(original, bank, level, plane, chunk):
    _, x, outputs = original
    with Session(bank, threads=2) as session:
        request = Request(level=level)
        request = replace(request, weight_bytes_limit=limits(costs_of(session), request)[0])
        position, name = place_of(session, plane, chunk)
        message = rf"m.bank: layer {name}: plane {plane}, chunk {chunk}: CRC-32 is"
        for _ in range(2):
            flip(bank, plane, position)
            publish(session, request)  # another plan: what was read ahead of the flip is forgotten
            for _ in range(2):
                with pytest.raises(BankIntegrityError, match=message) as caught:
                    run(session, x)
                assert "\n" not in str(caught.value)
            flip(bank, plane, position)
            for _ in range(2):
                np.testing.assert_array_equal(run(session, x), outputs[level])


@pytest.mark.parametrize(("level", "plane"), CASES)
@pytest.mark.parametrize("chunk", [3, 44])
def test_a_flipped_bit_is_named_or_a_lower_level_stands_in(original, bank, level, plane, chunk):
    _, x, outputs = original
    with Session(bank, level=32 if level != 32 else 1, threads=1) as session:
        run(session, x)
        position, name = place_of(session, plane, chunk)
        message = rf"m.bank: layer {name}: plane {plane}, chunk {chunk}: CRC-32 is"
        flip(bank, plane, position)
        session.set_level(level)
        if plane in LOWER:
            base = all_resident(costs_of(session), plan(costs_of(session), Request(level=level)))
            levels = base.levels.copy()
            levels[chunk] = LOWER[plane]
            for _ in range(2):
                with pytest.warns(DegradedWarning, match=f"^1 chunk ran .*{message}"):
                    y = run(session, x)
                assert session.events()[-1].kind == "degraded"
                with Session(original[0]) as sound:
                    adopt(sound, replace(base, levels=levels))
                    np.testing.assert_array_equal(run(sound, x), y)
        else:
            for _ in range(2):
                with pytest.raises(BankIntegrityError, match=message):
                    run(session, x)
        flip(bank, plane, position)
        np.testing.assert_array_equal(run(session, x), outputs[level])
        flip(bank, plane, position)  # what is in memory was checked when it came
        np.testing.assert_array_equal(run(session, x), outputs[level])


@pytest.mark.parametrize("streamed", [True, False])
def test_a_file_cut_short_while_running_is_named(original, bank, streamed):
    _, x, outputs = original
    with Session(bank, level=1, threads=2) as session:
        run(session, x)
        data = plane_file(bank, "p4").read_bytes()
        request = Request(level=4)
        if streamed:
            request = replace(request, weight_bytes_limit=limits(costs_of(session), request)[0])
        for size in (len(data) - 1, len(data) // 2, 0):
            session.set_level(1)
            os.truncate(plane_file(bank, "p4"), size)
            publish(session, request)
            for _ in range(2):
                with pytest.raises(BankTruncatedError, match=r"layer \w+: plane p4 ends inside"):
                    run(session, x)
            plane_file(bank, "p4").write_bytes(data)
            np.testing.assert_array_equal(run(session, x), outputs[4])


@pytest.mark.parametrize("streamed", [True, False])
def test_a_file_overwritten_while_running_is_refused(original, bank, streamed):
    """Another bank's plane of the same size, written into the same file."""
    _, x, outputs = original
    with Session(bank, level=1, threads=2) as session:
        data = plane_file(bank, "p4").read_bytes()
        request = Request(level=4)
        if streamed:
            request = replace(request, weight_bytes_limit=limits(costs_of(session), request)[0])
        plane_file(bank, "p4").write_bytes(data[::-1])
        publish(session, request)
        with pytest.raises(BankIntegrityError, match="layer fc0: plane p4, chunk 0: CRC-32"):
            run(session, x)
        plane_file(bank, "p4").write_bytes(data)
        np.testing.assert_array_equal(run(session, x), outputs[4])


@pytest.mark.parametrize("change", ["replaced", "removed", "updated"])
def test_a_bank_that_is_replaced_or_removed_serves_on(original, bank, change, tmp_path):
    """The session holds the files that it opened, whatever their names mean by now."""
    _, x, outputs = original
    with Session(bank, level=1, threads=2) as session:
        run(session, x)
        if change == "removed":
            shutil.rmtree(bank)
        elif change == "updated":
            install(tied_bank(tmp_path / "new.bank"), bank)
        else:
            for file in (bank / "planes").iterdir():
                other = file.with_suffix(".new")
                other.write_bytes(b"something else")
                other.rename(file)
        for level in (8, 32, 2, 4):
            request = Request(level=level)
            for limit in (limits(costs_of(session), request)[0], None):
                publish(session, replace(request, weight_bytes_limit=limit))
                np.testing.assert_array_equal(run(session, x), outputs[level])
    if change == "updated":
        with Session(bank) as session:
            assert bank_of(session).manifest.layers[1].name == "positions"


@pytest.mark.parametrize("plane", ["p4", "r8"])
def test_a_flipped_bit_in_an_embedding_row_is_named(tmp_path, plane):
    path = tied_bank(tmp_path / "m.bank")
    xs = inputs("tied")
    ((expected,),) = resident_outputs(path, xs[:1], [{"level": 8}])
    with Session(path, level=8) as session:
        chunk = bank_of(session).manifest.layers[1].first_chunk + int(xs[0].flat[0]) // 16
        position, name = place_of(session, plane, chunk)
        assert name == "positions"
        flip(path, plane, position)
        message = rf"layer positions: plane {plane}, chunk {chunk}: CRC-32 is"
        for _ in range(2):
            with pytest.raises(BankIntegrityError, match=message):
                run(session, xs[0])
        flip(path, plane, position)
        np.testing.assert_array_equal(run(session, xs[0]), expected)


def test_a_graph_whose_operators_are_not_the_layers_is_refused(tmp_path):
    """A hostile bank: neither a wait without end nor a read outside the row cache."""
    layers = [layer("table", "Gather", 64, 64), layer("fc", "MatMul", 64, 64)]
    product = graph_bytes([node("MatMul", "x", "y", layer=0, **LINEAR)], ["n", 64], ["n", 64])
    lookup = graph_bytes([node("Gather", "x", "y", layer=1)], ["n"], ["n", 64], TensorProto.INT64)
    for graph, x, message in (
        (product, np.ones((1, 64), np.float32), "layer table: only Gather reads"),
        (lookup, np.array([1, 2]), "layer fc: Gather does not read"),
    ):
        with (
            Session(write_bank(tmp_path / "m.bank", graph, layers)) as session,
            pytest.raises(RunInputError, match=message),
        ):
            run(session, x)
        shutil.rmtree(tmp_path / "m.bank")
