"""The installed `bapq`, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

__all__ = ["BAPQ", "bapq"]

BAPQ = Path(sys.executable).with_name("bapq")


def bapq(*arguments: object, code: int = 0, **environment: str) -> tuple[str, str]:
    """Run a command that must end with this code; what it printed on stdout and stderr."""
    result = subprocess.run(
        [BAPQ, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )
    assert result.returncode == code, result.stderr
    return result.stdout, result.stderr
