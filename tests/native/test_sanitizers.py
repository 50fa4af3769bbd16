"""The chunk store and the arena under load, built with gcc's sanitizers."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest


@pytest.mark.slow
def test_store_and_arena_are_sound_under_the_sanitizers():
    command = [str(Path(__file__).with_name("run_sanitizers.sh")), "10"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]
    assert result.stdout.count(" passed, 0 failed") == 2
    assert result.stdout.count("arena_stress: passed") == 2


def test_the_arena_keeps_blocks_apart():
    build = str(Path(__file__).with_name("build.sh"))
    program = subprocess.run(
        [build, "address", "arena_stress"], check=True, capture_output=True, text=True
    ).stdout.strip()
    result = subprocess.run([program, "1", "3"], capture_output=True, text=True, timeout=100)
    assert (result.returncode, result.stdout) == (0, "arena_stress: passed\n"), result.stderr
