"""A build or an install that is killed at any moment: one whole bank stands there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bapq_edge.bank.install import install
from bapq_edge.bank.reader import Bank
from bapq_edge.bank.verify import verify
from bapq_edge.bank.writer import BankWriter
from bapq_edge.errors import BankNotFoundError, InterruptedUpdateWarning
from support.bank_samples import SOURCE, Shape, files_of, sound_files_of, write_bank


def environment_of_tests():
    """For a process that imports what tests import."""
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


KILLED_BUILD = """
import os, sys
from support.bank_samples import Shape, write_bank
from bapq_edge.bank import staging

path, last = sys.argv[1:]
done = 0

def step(real):
    def counted(*arguments):
        global done
        done += 1
        if done == int(last):
            os._exit(9)
        return real(*arguments)
    return counted

staging._exchange = lambda first, second: False
staging.os.rename = step(os.rename)
staging.shutil.rmtree = step(staging.shutil.rmtree)
write_bank(path, [Shape(3, 5)], seed=9)
"""


def killed_build(path, step):
    """Build in a process that ends before it moves the old bank aside, before it moves the new
    one into its place, or before it removes the old one.
    """
    command = [sys.executable, "-c", KILLED_BUILD, str(path), str(step)]
    assert subprocess.run(command, env=environment_of_tests(), check=False).returncode == 9


@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_killed_build_loses_no_bank_and_the_next_one_cleans_up(tmp_path, step):
    path = tmp_path / "m.bank"
    write_bank(path, [Shape(3, 5)])
    before = files_of(path)
    killed_build(path, step)
    left = set(os.listdir(tmp_path))
    assert len(left) == 2
    assert left < {"m.bank", "m.bank.bapq-building", "m.bank.bapq-replaced"}
    with BankWriter(path, levels=(4,), source=SOURCE):
        pass  # a build that does not finish still puts the old bank back
    assert os.listdir(tmp_path) == ["m.bank"]
    assert verify(path).ok
    assert (files_of(path) == before) == (step < 3)


KILLED_INSTALL = """
import itertools, os, shutil, sys
from pathlib import Path
from bapq_edge.bank import staging, writer
from bapq_edge.bank.install import install

root, way = Path(sys.argv[1]), sys.argv[2]
done = 0

def step(real):
    def counted(*arguments, **options):
        global done
        done += 1
        if done == last:
            os._exit(9)
        return real(*arguments, **options)
    return counted

for last in itertools.count(1):
    case = root / f"case{last}"
    case.mkdir()
    if way != "fresh":
        shutil.copytree(root / "old.bank", case / "m.bank")
    child = os.fork()
    if child == 0:
        for name in ("mkdir", "link", "unlink", "rmdir", "rename", "fsync"):
            setattr(os, name, step(getattr(os, name)))
        if way == "two renames":
            staging._exchange = lambda first, second: False
        else:
            staging._exchange = step(staging._exchange)
        install(root / "stick/new.bank", case / "m.bank")
        os._exit(0)
    if os.waitpid(child, 0)[1] == 0:
        break
"""


@pytest.mark.parametrize("way", ["fresh", "exchange", "two renames"])
def test_an_install_killed_at_every_step_leaves_one_whole_bank(tmp_path, way):
    (tmp_path / "stick").mkdir()
    source = tmp_path / "stick/new.bank"
    write_bank(source, [Shape(40, 20), Shape(3, 5)], levels=(4, 1))
    write_bank(tmp_path / "old.bank", [Shape(40, 20)], levels=(4, 1))
    new_files, old_files = files_of(source), files_of(tmp_path / "old.bank")
    environment = environment_of_tests() | {"OPENBLAS_NUM_THREADS": "1"}  # a fork has one thread
    command = [sys.executable, "-c", KILLED_INSTALL, tmp_path, way]
    subprocess.run(command, env=environment, check=True)
    found = []
    for case in sorted(tmp_path.glob("case*"), key=lambda path: int(path.name[4:])):
        path = case / "m.bank"
        if path.exists():
            assert verify(path).ok
            found.append("new" if files_of(path) == new_files else "old")
            assert files_of(path) in (new_files, old_files)
        elif way == "two renames":  # between the two
            with pytest.warns(InterruptedUpdateWarning, match="an update was cut off, .*replaced"):
                opened = Bank.open(path)
            assert files_of(opened.path) == old_files
            found.append("aside")
        else:
            with pytest.raises(BankNotFoundError):
                Bank.open(path)
            found.append("nothing")
        install(source, path)
        assert sound_files_of(path) == new_files
    before = "nothing" if way == "fresh" else "old"
    changes = [state for i, state in enumerate(found) if i == 0 or found[i - 1] != state]
    assert changes == [before, *(["aside"] if way == "two renames" else []), "new"]
    assert len(found) >= 20


@pytest.mark.slow
def test_build_fit_install_and_sign_survive_kills_full_disks_and_read_only_ones():
    campaign = Path(__file__).parents[1] / "fuzz/kills.py"
    command = [sys.executable, str(campaign), "--times", "15"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr[-2000:]
