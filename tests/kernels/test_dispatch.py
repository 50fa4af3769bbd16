"""Which kernel family runs."""

from __future__ import annotations

import platform
import re
from pathlib import Path

import pytest

from support.kernel_library import Library

OF_MACHINE = {
    "x86_64": ("avx512vnni", "avx2", "scalar"),
    "aarch64": ("neondot", "neon", "scalar"),
}


def test_available_is_what_by_name_finds(library: Library) -> None:
    names = [family.name for family in library.available()]
    order = OF_MACHINE[platform.machine()]
    assert names == [name for name in order if library.by_name(name) is not None]
    assert names[-1] == "scalar"


def test_available_is_what_the_cpu_has(library: Library) -> None:
    """A compiler whose library knows no CPU would leave all of them the scalar kernels."""
    text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    match = re.search(r"^(flags|Features)\s*: (.*)$", text, re.MULTILINE)
    assert match is not None
    needs = {
        "avx2": {"avx2", "fma"},
        "avx512vnni": {"avx2", "fma", "avx512f", "avx512bw", "avx512vl", "avx512_vnni"},
        "neon": {"asimd"},
        "neondot": {"asimd", "asimddp"},
        "scalar": set(),
    }
    able = {name for name in OF_MACHINE[platform.machine()] if needs[name] <= set(match[2].split())}
    assert {family.name for family in library.available()} == able


def test_unknown_or_foreign_name_is_refused(library: Library) -> None:
    foreign = OF_MACHINE["aarch64" if platform.machine() == "x86_64" else "x86_64"][0]
    for name in ("", "AVX2", "scalar ", "sse", foreign):
        assert library.by_name(name) is None


def test_best_follows_the_environment(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BAPQ_ISA", raising=False)
    available = [family.name for family in library.available()]
    best = library.best()
    assert best is not None
    assert best.name == available[0]
    for name in available:
        monkeypatch.setenv("BAPQ_ISA", name)
        chosen = library.best()
        assert chosen is not None
        assert chosen.name == name
    monkeypatch.setenv("BAPQ_ISA", "quantum")
    assert library.best() is None
