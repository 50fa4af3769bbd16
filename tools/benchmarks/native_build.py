"""Native programs and libraries of the benchmarks, built as CMakeLists.txt says."""

from __future__ import annotations

import subprocess
from pathlib import Path

__all__ = ["build_native"]

_BUILD = Path(__file__).resolve().parents[2] / "tests" / "native" / "build.sh"


def build_native(target: str) -> Path:
    """Path of a target for this machine, built if its sources changed.

    Raises subprocess.CalledProcessError; the compiler's words are on stderr.
    """
    return Path(subprocess.check_output([_BUILD, "tests", target], text=True).strip())
