"""Everything that `make test-pi` needs, into .cache/boards: systems, packages and banks.

The systems are installed as the README tells a user to, on the emulated board.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnxruntime

import bapq_tools
from bapq_edge import Session
from benchmarks.cases import load_case
from benchmarks.zoo import make_model
from support.documents import board_page, commands
from virtual_pi.machine import BOARDS, PI_4, PI_5, ROOT, Board, Machine, make_disk

WHEELS = BOARDS / "wheels"
MODELS = BOARDS / "models"
PYTHONS = {"bookworm": "3.11", "trixie": "3.13"}
CALIBRATION_SAMPLES = 32
BANKS: dict[str, tuple[int, ...]] = {
    "digits_cnn": (32, 8, 4, 2, 1),
    "digits_resnet": (8, 4, 2, 1),
    "minilm": (32, 8, 4, 2, 1),
    "bvlc_alexnet": (8, 4, 2, 1),
    "vgg19": (4,),
}
"""levels of each; the last two have random weights, which need no calibration"""

UPDATED = "digits_resnet"
"""the model of which there is another bank, as an update of the first: of codes not calibrated"""


def main() -> None:
    """Make what is missing or older than the sources."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--walk", action="store_true", help="only what test_the_walk needs")
    walk = parser.parse_args().walk
    boards = (PI_4,) if walk else (PI_4, PI_5)
    banks = ("digits_cnn",) if walk else tuple(BANKS)
    started_s = time.monotonic()

    def say(what: str) -> None:
        print(f"{time.monotonic() - started_s:5.0f} s  {what}", flush=True)

    BOARDS.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(2) as threads:
        download = threads.submit(_download, [board.system for board in boards])
        list(threads.map(_make_system, [board.system for board in boards]))
        download.result()
        say(f"made {', '.join(board.system for board in boards)}")
        installs = [threads.submit(_install, board) for board in boards]
        for name in banks:
            _make_bank(name, BANKS[name])
            say(f"made the bank {name}")
        for install in installs:
            say(f"installed bapq-edge on {install.result()}")


def _is_newer(made: Path, sources: Iterable[Path]) -> bool:
    newest_s = max(source.stat().st_mtime for source in sources)
    return made.exists() and made.stat().st_mtime > newest_s


def _make_system(suite: str) -> None:
    script, target = Path(__file__).with_name("make_system.sh"), BOARDS / suite
    sources = [script, *(script.parent / "guest").glob("*-*")]
    if not _is_newer(target / "disk.img", sources):
        result = subprocess.run([script, suite, target], capture_output=True, text=True)
        if result.returncode:
            sys.exit(result.stderr[-2000:])


def _download(systems: Iterable[str]) -> None:
    """The wheels that pip takes on the boards; ours is the one just built."""
    WHEELS.mkdir(exist_ok=True)
    for version in map(PYTHONS.__getitem__, systems):
        if not list(WHEELS.glob(f"numpy-*-cp{version.replace('.', '')}-*")):
            command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
            command += ["download", "--only-binary=:all:", "--implementation", "cp"]
            command += ["--python-version", version, "--dest", str(WHEELS)]
            for age in ("_2_28", "_2_27", "2014"):
                command += ["--platform", f"manylinux{age}_aarch64"]
            # What pip has to say is about this machine's package index.
            subprocess.run(
                [*command, "numpy", "onnxruntime", "psutil", "pyyaml"],
                check=True,
                stderr=subprocess.DEVNULL,
            )
    for old in WHEELS.glob("bapq_edge-*"):
        old.unlink()
    (ours,) = (ROOT / "dist").glob("bapq_edge-*_aarch64.whl")
    shutil.copy(ours, WHEELS)


def _install(board: Board) -> str:
    """Install bapq-edge on a fresh system, as its user does."""
    folder = BOARDS / board.system
    image = folder / "installed.img"
    if _is_newer(image, [ROOT / "dist" / ".aarch64", folder / "disk.img"]):
        return board.name
    image.unlink(missing_ok=True)
    disk = folder / "installing.img"
    subprocess.run(["cp", "--sparse=always", folder / "disk.img", disk], check=True)
    files: dict[str, Path | str] = {
        "wheels": WHEELS,
        "install.sh": commands(board_page())[0],
        "run.sh": "cd ~pi && runuser -u pi -- bash -ex /media/stick/install.sh\n",
    }
    stick = make_disk(folder / "install_stick.img", "stick", files)
    with Machine(board, stick, f"install_{board.name}", disk=disk, keep_disk=True) as machine:
        list(machine.records())
    disk.rename(image)
    return board.name


def _make_bank(name: str, levels: tuple[int, ...]) -> None:
    """The bank, one input, and what this machine answers at each level (float: the model's)."""
    folder = MODELS / name
    sources = [Path(__file__), *ROOT.glob("tools/**/*.py"), *ROOT.glob("bapq_edge/bank/*.py")]
    if _is_newer(folder / "expected.npz", sources):
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    model = folder / "model.onnx"
    make_model(name, model)
    case = load_case(name, model)
    calibration = None
    if case.judged_output:
        calibration = folder / "calibration.npz"
        samples = {key: value[:CALIBRATION_SAMPLES] for key, value in case.calibration.items()}
        np.savez(calibration, **samples)
    bank = bapq_tools.build_bank(
        model, folder / "bank", calibration=calibration, levels=levels, progress=False
    )
    if name == UPDATED:
        bapq_tools.build_bank(model, folder / "update", levels=levels, progress=False)
    np.savez(folder / "input.npz", **case.single)
    outputs = {}
    graph = onnxruntime.InferenceSession(str(model))
    names = [value.name for value in graph.get_outputs()]
    outputs.update(_named("float", names, graph.run(None, case.single)))
    del graph
    with Session(bank, level=levels[0]) as session:
        for level in levels:
            session.set_level(level)
            outputs.update(_named(str(level), names, session.run(None, case.single)))
    np.savez(folder / "expected.npz", **outputs)
    model.unlink()


def _named(level: str, names: list[str], values: list[np.ndarray]) -> dict[str, np.ndarray]:
    return {f"{name}@{level}": value for name, value in zip(names, values, strict=True)}


if __name__ == "__main__":
    main()
