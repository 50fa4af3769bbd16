"""Kills what writes banks, or takes its storage away: `python tests/fuzz/kills.py --times 100`.

`build`, `fit`, `install` and `sign` replace a bank that is there. Each is killed at random moments
of its work; each runs on a file system that fills up at a random byte, and on one that is
read-only, where root may mount such ones. Afterwards the old bank or the new one must stand there,
whole, and one more run must leave the new one and nothing else.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), str(TESTS.parent / "tools")]

from bapq_edge.bank.install import install  # noqa: E402
from bapq_edge.bank.manifest import UNFINISHED_SIGNATURE  # noqa: E402
from bapq_edge.bank.verify import verify  # noqa: E402
from bapq_edge.errors import BapqWarning, StorageError  # noqa: E402
from bapq_tools import build_bank  # noqa: E402
from bapq_tools.boundary.fit import fit  # noqa: E402
from bapq_tools.signing import load_secret_key, make_key, sign  # noqa: E402

REFUSED = 9
"""Exit status of a child whose storage failed, by name."""

SPARE_BYTES = 4 << 20
"""Of a file system that is to fill up: more than any of the commands needs."""


@dataclass(frozen=True)
class Command:
    """What writes a bank; the old one is always the same, and so is the new one."""

    name: str
    run: Callable[[Path], object]
    """Makes the new bank at the path, where the old one stands."""


def commands_of(folder: Path) -> tuple[Path, list[Command]]:
    """The old bank, and the commands; what they read is made in the folder."""
    from benchmarks.zoo.digits import digits_cnn_path, split_of

    samples = {"image": split_of("cnn").x_calibration[:24]}
    old, other, key = folder / "old.bank", folder / "other.bank", folder / "k.key"
    options: dict[str, Any] = {"workers": 1, "progress": False}
    build_bank(digits_cnn_path(), old, fast=True, calibration=samples, levels=[8, 4], **options)
    build_bank(digits_cnn_path(), other, fast=True, levels=[4, 2], **options)
    make_key(key, None)
    secret = load_secret_key(key)
    fitting = {"image": split_of("cnn").x_train[:200]}
    return old, [
        Command(
            "build",
            lambda path: build_bank(
                digits_cnn_path(), path, calibration=samples, levels=[4, 1], **options
            ),
        ),
        Command("fit", lambda path: fit(path, fitting, digits_cnn_path(), progress=False)),
        Command("install", lambda path: install(other, path)),
        Command("sign", lambda path: sign(path, secret, "signed")),
    ]


def content(bank: Path) -> dict[str, bytes]:
    """Bytes of every file but what a killed sign leaves; verified."""
    from support.bank_samples import files_of

    assert verify(bank).ok
    files = files_of(bank)
    files.pop(UNFINISHED_SIGNATURE, None)
    return files


def started(command: Command, bank: Path) -> int:
    """The command in a process, and a process group, of its own; its number."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        os.setsid()
        command.run(bank)
        status = 0
    except StorageError:
        status = REFUSED
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


class Campaign:
    """One command, in one place."""

    def __init__(self, command: Command, old: Path, place: Path, chance: random.Random) -> None:
        """Learn what the new bank is, and how long it takes to make."""
        self.counts: Counter[str] = Counter()
        self.kills = 0
        self._command, self._old, self._chance = command, old, chance
        self._folder = place / command.name
        self._bank = self._folder / "m.bank"
        self._prepare()
        started_s = time.monotonic()
        self._finish()
        self._took_s = time.monotonic() - started_s
        self._states = {"old": content(old), "new": content(self._bank)}
        assert self._states["old"] != self._states["new"]
        self._left = sorted(os.listdir(self._folder))

    def kill(self) -> None:
        """Once, at a random moment."""
        self._prepare()
        child = started(self._command, self._bank)
        time.sleep(self._chance.random() * 1.1 * self._took_s)
        with contextlib.suppress(ProcessLookupError):  # it may not have its group yet, or ended
            os.killpg(child, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        killed = os.WIFSIGNALED(status)
        self.kills += killed
        self._judge("killed" if killed else "ended before")

    def fill(self) -> None:
        """Once, on a file system that has a random number of bytes left."""
        self._prepare()
        filler = self._folder.parent / "filler"
        with filler.open("wb") as file:
            free = os.statvfs(self._folder)
            left = int(self._chance.random() ** 2 * SPARE_BYTES)
            os.posix_fallocate(file.fileno(), 0, free.f_bavail * free.f_frsize - left)
        self._refuse("full")
        filler.unlink()

    def lock(self, mounted: Path) -> None:
        """Once, on a file system that is read-only."""
        self._prepare()
        subprocess.run(["mount", "-o", "remount,ro", mounted], check=True)
        try:
            self._refuse("read-only")
        finally:
            subprocess.run(["mount", "-o", "remount,rw", mounted], check=True)

    def end(self) -> None:
        """One more run makes the new bank, and leaves nothing else."""
        self._finish()
        assert content(self._bank) == self._states["new"]
        assert sorted(os.listdir(self._folder)) == self._left, os.listdir(self._folder)
        assert not (self._bank / UNFINISHED_SIGNATURE).exists()

    def _prepare(self) -> None:
        """The old bank in its place; what a killed one left beside it stays."""
        self._folder.mkdir(exist_ok=True)
        shutil.rmtree(self._bank, ignore_errors=True)
        shutil.copytree(self._old, self._bank)

    def _finish(self) -> None:
        _, status = os.waitpid(started(self._command, self._bank), 0)
        assert status == 0, f"{self._command.name} ended with {status}"

    def _refuse(self, why: str) -> None:
        _, status = os.waitpid(started(self._command, self._bank), 0)
        code = os.waitstatus_to_exitcode(status)
        assert code in (0, REFUSED), f"{self._command.name}, {why}: ended with {code}"
        self._judge(f"{why}: refused" if code else f"{why}: done")

    def _judge(self, what: str) -> None:
        found = content(self._bank)
        states = [name for name, files in self._states.items() if files == found]
        assert states, f"{self._command.name}, {what}: neither the old bank nor the new one"
        self.counts[f"{what}, {states[0]}"] += 1


@contextlib.contextmanager
def small_file_system(folder: Path) -> Iterator[Path | None]:
    """A file system of its own; None where that is not allowed."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={2 * SPARE_BYTES}", "tmpfs", folder]
    if subprocess.run(command, check=False, capture_output=True).returncode:
        yield None
        return
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def main() -> None:
    """Parse the command line; print what was found, command by command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", choices=["build", "fit", "install", "sign"])
    arguments = parser.parse_args()
    warnings.simplefilter("ignore", BapqWarning)
    chance = random.Random(arguments.seed)
    report: dict[str, dict[str, int]] = {}
    with (
        tempfile.TemporaryDirectory(prefix="bapq-kills-") as work,
        small_file_system(Path(work) / "small") as small,
    ):
        old, commands = commands_of(Path(work))
        for command in commands:
            if arguments.only not in (None, command.name):
                continue
            campaign = Campaign(command, old, Path(work), chance)
            while campaign.kills < arguments.times:
                campaign.kill()
            campaign.end()
            counts = dict(campaign.counts)
            if small is not None:
                campaign = Campaign(command, old, small, chance)
                for _ in range(arguments.times):
                    campaign.fill()
                campaign.lock(small)
                campaign.end()
                counts |= campaign.counts
                shutil.rmtree(small / command.name)
            report[command.name] = counts
            print(f"{command.name}: {counts}", file=sys.stderr, flush=True)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
