"""Two bundled models as banks, and what this machine answers with them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

import bapq_tools
from benchmarks.zoo.digits import (
    INPUT_NAMES,
    calibration_npz,
    digits_cnn_path,
    digits_mlp_path,
    split_of,
)

RUN_BANK = Path(__file__).parents[1] / "end_to_end" / "run_bank.py"
IMAGES = 16


@dataclass
class Case:
    """A bank with the input of one run; kernel family and outputs of this machine."""

    model: str
    bank: Path
    source: Path
    family: str = ""
    outputs: dict[str, np.ndarray] = field(default_factory=dict)

    def run(self, python: Sequence[str | Path], target: Path) -> tuple[list[str], dict]:
        """(onnxruntime's version, kernel family) and the outputs under that interpreter."""
        command = [*python, RUN_BANK, self.bank, self.source, target]
        result = subprocess.run(
            command, check=True, stdout=subprocess.PIPE, text=True, cwd=target.parent
        )
        with np.load(target) as arrays:
            return result.stdout.split(), {name: arrays[name] for name in arrays.files}


@pytest.fixture(scope="session")
def cases(tmp_path_factory: pytest.TempPathFactory) -> list[Case]:
    folder = tmp_path_factory.mktemp("banks")
    found = []
    for model, path in (("cnn", digits_cnn_path()), ("mlp", digits_mlp_path())):
        calibration_npz(folder / f"{model}.calibration.npz", model)
        bank = Path(
            bapq_tools.build_bank(
                path,
                folder / f"{model}.bank",
                calibration=folder / f"{model}.calibration.npz",
                levels=(32, 8, 4, 2, 1),
                progress=False,
            )
        )
        source = folder / f"{model}.npz"
        np.savez(source, **{INPUT_NAMES[model]: split_of(model).x_test[:IMAGES]})
        case = Case(model, bank, source)
        target = folder / f"{model}.outputs.npz"
        (_, case.family), case.outputs = case.run([sys.executable, "-I"], target)
        found.append(case)
    return found
