"""Every snippet of the README runs, and every link of the pages leads somewhere."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import bapq_tools
from benchmarks.zoo.digits import digits_cnn_path, split_of
from support.documents import fenced, pages, readme

ROOT = Path(__file__).resolve().parents[2]
SNIPPETS = [content for info, content in fenced(readme()) if info == "python"]
COMMANDS = [
    "".join(line for line in content.splitlines(keepends=True) if line.startswith("bapq "))
    for info, content in fenced(readme())
    if info == "sh" and re.search("^bapq ", content, re.MULTILINE)
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the README speaks of; the digits CNN stands in for every model."""
    folder = tmp_path_factory.mktemp("readme")
    shutil.copyfile(digits_cnn_path(), folder / "model.onnx")
    images = split_of("cnn").x_test
    np.savez(folder / "samples.npz", image=images)
    np.savez(folder / "test.npz", image=split_of("cnn").x_calibration)
    np.savez(folder / "input.npz", image=images[:1])
    demo = folder / "build" / "demo"
    demo.mkdir(parents=True)
    shutil.copyfile(folder / "input.npz", demo / "minilm.npz")
    calibration = {"image": split_of("cnn").x_calibration}
    bapq_tools.build_bank(
        folder / "model.onnx", demo / "minilm.bank", calibration=calibration, progress=False
    )
    for block in COMMANDS:
        run(["bash", "-euxc", block], folder)
    return folder


def run(command: list[str], folder: Path) -> str:
    """The output of a command that must succeed."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path}
    ended = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_every_command_of_the_readme_runs(place):
    assert len(COMMANDS) == 3  # those that build, run and fit
    assert (place / "model.bank").is_dir()
    assert (place / "output.npz").is_file()
    assert (place / "trace.json").is_file()


@pytest.mark.parametrize("snippet", SNIPPETS, ids=range(len(SNIPPETS)))
def test_every_snippet_of_the_readme_runs(place, snippet):
    run([sys.executable, "-W", "error", "-c", snippet], place)


def test_the_first_snippet_has_ten_lines():
    assert len(re.findall(r"^ *[a-z].*$", SNIPPETS[0], re.MULTILINE)) <= 10


def test_every_link_of_the_pages_leads_to_a_file():
    broken = [
        f"{page.relative_to(ROOT)}: {link}"
        for page in pages()
        for link in re.findall(r"\]\((?!\w+:|#)([^)#\s]+)", page.read_text())
        if not (page.parent / link).exists()
    ]
    assert not broken


def test_every_page_that_the_code_names_is_there():
    files = subprocess.run(
        ["git", "ls-files", "*.py", "*.[ch]", "*.toml", "Makefile"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    missing = [
        f"{file}: {page}"
        for file in files.stdout.split()
        for page in re.findall(r"\bdocs/[\w/-]+\.(?:md|svg)\b", (ROOT / file).read_text())
        if not (ROOT / page).exists()
    ]
    assert not missing
