"""Instructions that one inference takes on emulated boards: a table in Markdown.

Needs what `make test-arm` makes, and Debian's qemu-user, whose emulator takes plugins.

    PYTHONPATH=tests .venv/bin/python tests/virtual_pi/count_instructions.py
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from pathlib import Path

import numpy as np

from bapq_tools import build_bank
from benchmarks.cases import load_case
from benchmarks.zoo import make_model
from virtual_pi.run_counted import counted

HERE = Path(__file__).parent
ARM64 = HERE.parents[1] / ".cache" / "arm64"
MODELS = ("digits_mlp", "digits_cnn", "digits_resnet")
CALIBRATION_SAMPLES = 64
CPUS = ("cortex-a53", "cortex-a72", "cortex-a76")


def print_row(*cells: str) -> None:
    print("| " + " | ".join(cells) + " |", flush=True)


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        command = [HERE.parent / "native" / "build.sh", "tests", "instructions"]
        built = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        plugin = built.stdout.strip()
        folders = [ARM64 / "bapq", ARM64 / "ort-newest"]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(map(str, folders)),
            "PYTHONDONTWRITEBYTECODE": "1",
            "BAPQ_ARM_QEMU": f"qemu-aarch64 -plugin {plugin}",
        }
        for model in MODELS:
            files = [folder / f"{model}.{kind}" for kind in ("onnx", "bank", "npz")]
            make_model(model, files[0])
            case = load_case(model, files[0])
            calibration = folder / "calibration.npz"
            samples = case.calibration.items()
            np.savez(calibration, **{key: array[:CALIBRATION_SAMPLES] for key, array in samples})
            build_bank(
                files[0], files[1], calibration=calibration, levels=(32, 8, 4, 2, 1), progress=False
            )
            np.savez(files[2], **case.single)
            for cpu in CPUS:
                result = subprocess.run(
                    [HERE / "arm_python.sh", HERE / "run_counted.py", *files],
                    check=True,
                    stderr=subprocess.PIPE,
                    text=True,
                    cwd=folder,
                    env={**environment, "BAPQ_ARM_CPU": cpu},
                )
                counts = counted(result.stderr.splitlines())
                if (model, cpu) == (MODELS[0], CPUS[0]):
                    print_row("model", "CPU", *counts)
                    print_row(*["---"] * (2 + len(counts)))
                cells = (f"{count / 1e6:.2f} M" for count in counts.values())
                print_row(model, cpu, *cells)


if __name__ == "__main__":
    main()
