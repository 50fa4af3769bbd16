"""A small model and its bank, and the command line in a folder of its own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import bapq_tools  # its functions are loaded as they are used: boards have no host packages
from bapq_edge import errors
from bapq_edge.cli import main

ONE, TWO = ("x",), ("a", "b")


def save_model(path: Path, inputs: tuple[str, ...]) -> Path:
    """A layer and an output for each input."""
    weight = np.random.default_rng(0).standard_normal((64, 32)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", [name, f"w_{name}"], [f"y_{name}"]) for name in inputs],
        "model",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 64]) for name in inputs],
        [
            helper.make_tensor_value_info(f"y_{name}", TensorProto.FLOAT, ["n", 32])
            for name in inputs
        ],
        [numpy_helper.from_array(weight, f"w_{name}") for name in inputs],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)]), path)
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a model of one input and output, one of two, their banks, and inputs."""
    folder = tmp_path_factory.mktemp("made")
    x = np.ones((3, 64), np.float32)
    for name, inputs in (("one", ONE), ("two", TWO)):
        np.savez(folder / f"{name}.npz", **dict.fromkeys(inputs, x))
        save_model(folder / f"{name}.onnx", inputs)
        bapq_tools.build_bank(
            folder / f"{name}.onnx",
            folder / f"{name}.bank",
            calibration=folder / f"{name}.npz",
            workers=1,
            progress=False,
        )
    np.save(folder / "x.npy", x)
    return folder


@pytest.fixture
def bapq(capsys, made, tmp_path, monkeypatch):
    """Runs a command in a folder of its own; returns what it printed on stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object, code: int = 0) -> tuple[str, str]:
        try:
            found = main([str(argument) for argument in arguments])
        except SystemExit as end:  # argparse
            found = end.code
        printed = capsys.readouterr()
        assert found == code, printed.err
        return printed.out, printed.err

    return run


@pytest.fixture
def refused(bapq, tmp_path):
    """Runs a command that must fail in one line and leave the folder as it was."""

    def run(code: int | type[errors.BapqError], *arguments: object) -> str:
        before = sorted(tmp_path.rglob("*"))
        out, err = bapq(*arguments, code=code if isinstance(code, int) else code.exit_code)
        assert out == "" and err.startswith("bapq: ") and err.count("\n") == 1
        assert sorted(tmp_path.rglob("*")) == before
        return err

    return run
