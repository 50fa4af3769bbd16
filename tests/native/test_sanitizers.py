"""The chunk store and the arena under load, built with gcc's sanitizers."""

from __future__ import annotations

import re
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
    assert result.stdout.count("refused, 0 failed") == 1


def sanitized(target: str, *arguments: str) -> str:
    """What a test program prints that is built with the address sanitizer."""
    build = str(Path(__file__).with_name("build.sh"))
    program = subprocess.run(
        [build, "address", target], check=True, capture_output=True, text=True
    ).stdout.strip()
    result = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=400)
    assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]
    return result.stdout


def test_the_arena_keeps_blocks_apart():
    assert sanitized("arena_stress", "1", "3") == "arena_stress: passed\n"


def test_operators_answer_or_refuse_whatever_the_graph_says(tmp_path):
    """5,000 cases: hostile attributes, shapes, types and tickets, each tensor in its own memory."""
    told = sanitized("operators_fuzz", str(tmp_path), "5000", "7")
    answered, refused = map(int, re.findall(r"(\d+) (?:answered|refused)", told))
    assert answered > 500 and answered + refused == 5000 and told.endswith("0 failed\n")
