"""The chunk store under load, built with gcc's sanitizers."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest


@pytest.mark.slow
def test_the_store_is_sound_under_the_sanitizers():
    command = [str(Path(__file__).with_name("run_sanitizers.sh")), "10"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]
    assert result.stdout.count(" passed, 0 failed") == 2
