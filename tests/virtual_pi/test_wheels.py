"""What is in the wheels that `make wheel-aarch64` and `make wheel-x86_64` build."""

from __future__ import annotations

import io
import os
import platform
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from elftools.elf.elffile import ELFFile

ROOT = Path(__file__).resolve().parents[2]
ARCHITECTURES = ("aarch64", "x86_64")
LIBRARY = "bapq_edge/engine/libbapq.so"
MOST_BYTES = 1_500_000
NEWEST_GLIBC = (2, 28)

pytestmark = pytest.mark.arm


def wheel_of(architecture: str) -> Path:
    (wheel,) = (ROOT / "dist").glob(f"bapq_edge-*-py3-none-manylinux_2_28_{architecture}.whl")
    return wheel


def library_of(architecture: str) -> ELFFile:
    with zipfile.ZipFile(wheel_of(architecture)) as archive:
        return ELFFile(io.BytesIO(archive.read(LIBRARY)))


def dot_products(elf: ELFFile) -> int:
    """How many sdot and udot instructions the code holds, in both of their forms."""
    count = 0
    for section in elf.iter_sections():
        if section["sh_flags"] & 4 and section["sh_type"] == "SHT_PROGBITS":  # executable
            words = np.frombuffer(section.data(), "<u4")
            vector = (words & 0x9FE0FC00) == 0x0E809400
            by_lane = (words & 0x9FC0F400) == 0x0F80E000
            count += int((vector | by_lane).sum())
    return count


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_wheel_is_small_and_whole(architecture):
    wheel = wheel_of(architecture)
    assert wheel.stat().st_size <= MOST_BYTES
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {LIBRARY, "bapq_edge/session.py", "bapq_edge/device_profiles/raspberry_pi_4.yaml"} <= (
        names
    )
    assert not [name for name in names if name.endswith((".c", ".h", ".o", ".pyc"))]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_library_needs_an_old_glibc_and_nothing_else(architecture):
    elf = library_of(architecture)
    assert elf.get_machine_arch() == {"aarch64": "AArch64", "x86_64": "x64"}[architecture]
    needed = {tag.needed for tag in elf.get_section_by_name(".dynamic").iter_tags("DT_NEEDED")}
    glibc = {"libc.so.6", "libpthread.so.0", "libm.so.6"}
    assert needed <= glibc | {"ld-linux-x86-64.so.2"}  # the loader, for what is a thread's own
    versions = [
        version.name
        for _, auxiliary in elf.get_section_by_name(".gnu.version_r").iter_versions()
        for version in auxiliary
    ]
    assert versions
    for version in versions:
        match = re.fullmatch(r"GLIBC_(\d+)\.(\d+)(\.\d+)?", version)
        assert match, version
        assert (int(match[1]), int(match[2])) <= NEWEST_GLIBC, version


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_library_gives_away_no_names_but_its_own(architecture):
    symbols = library_of(architecture).get_section_by_name(".dynsym").iter_symbols()
    names = {symbol.name for symbol in symbols if symbol["st_shndx"] != "SHN_UNDEF"}
    assert "RegisterCustomOps" in names
    assert not {name for name in names if not name.startswith("bapq_")} - {"RegisterCustomOps"}


def test_dot_products_stand_in_their_own_family_only():
    objects = ROOT / "build/py3-none-manylinux_2_28_aarch64/CMakeFiles/bapq_core.dir/native/src"
    counts = {}
    for path in objects.rglob("*.c.o"):
        with path.open("rb") as file:
            counts[path.name.partition(".")[0]] = dot_products(ELFFile(file))
    assert counts["neon"] == 0 and counts["neondot"] > 0
    assert {name for name, count in counts.items() if count} == {"neondot"}
    assert dot_products(library_of("aarch64")) == counts["neondot"]


def pythons() -> list[str]:
    """BAPQ_PYTHONS, else the interpreters of this machine that the package admits."""
    admitted = " ".join(f"python3.{minor}" for minor in range(10, 15))
    names = os.environ.get("BAPQ_PYTHONS", admitted).split()
    commands = [[name, "-c", "import venv"] for name in names if shutil.which(name)]
    return [
        command[0]
        for command in commands
        if subprocess.run(command, check=False, capture_output=True).returncode == 0
    ]


@pytest.mark.parametrize("python", pythons())
def test_one_wheel_serves_every_python(python, cases, tmp_path):
    subprocess.run([python, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    inside = tmp_path / "venv" / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--quiet", "--python", inside]
    subprocess.run([*pip, "install", wheel_of(platform.machine())], check=True, cwd=tmp_path)
    for case in cases:
        (_, family), outputs = case.run([inside, "-I"], tmp_path / f"{case.model}.npz")
        assert family == case.family
        for name, value in outputs.items():
            np.testing.assert_allclose(value, case.outputs[name], rtol=1e-5, atol=1e-5)
