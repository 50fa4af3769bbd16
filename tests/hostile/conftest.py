"""A bank to damage, and a check that nothing stays open."""

from __future__ import annotations

import gc
import os
import shutil

import pytest
from victims import GOLDEN, Victim


@pytest.fixture
def victim(tmp_path):
    shutil.copytree(GOLDEN, tmp_path / "m.bank")
    return Victim(tmp_path / "m.bank")


@pytest.fixture
def no_descriptor_left():
    """Fails when the test leaves a file open."""
    gc.collect()  # what earlier tests dropped must not close during this one
    before = len(os.listdir("/proc/self/fd"))
    yield
    assert len(os.listdir("/proc/self/fd")) == before
