"""Fixtures of all tests."""

from __future__ import annotations

import ctypes
import faulthandler
from collections.abc import Iterator

import pytest

from bapq_edge.engine.library import library_path

pytest.register_assert_rewrite("support")  # an assertion of a helper shows its values too


def kernel_families() -> list[str]:
    """Names of the kernel families that this CPU can run, best first."""
    library = ctypes.CDLL(str(library_path()))
    names = ["avx512vnni", "avx2", "neondot", "neon", "scalar"]
    library.bapq_kernels_by_name.restype = ctypes.c_void_p
    return [name for name in names if library.bapq_kernels_by_name(name.encode())]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test that asks for `kernel_family` once per family that this CPU can run."""
    if "kernel_family" in metafunc.fixturenames:
        metafunc.parametrize("kernel_family", kernel_families())


@pytest.fixture
def use_isa(monkeypatch: pytest.MonkeyPatch, kernel_family: str) -> None:
    """Compute with every kernel family in turn."""
    monkeypatch.setenv("BAPQ_ISA", kernel_family)


@pytest.fixture
def watchdog() -> Iterator[None]:
    """A deadlock must not hang the suite: it ends with every thread's stack."""
    faulthandler.dump_traceback_later(240, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()
