"""Control groups of the kernel, versions 1 and 2: a memory limit, a slow disk, for one command."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

__all__ = ["GroupError", "memory_group", "slow_reads_group", "within"]

_ROOT = Path("/sys/fs/cgroup")


class GroupError(Exception):
    """This machine or this user cannot have such a group; the message says why."""


def within(group: Path, command: Sequence[str]) -> list[str]:
    """The command, started inside the group: all its memory counts there."""
    join = 'echo $$ > "$0/cgroup.procs" && exec "$@"'
    return ["sh", "-c", join, str(group), *command]


@contextlib.contextmanager
def memory_group(limit_bytes: int) -> Iterator[Path]:
    """A group that gets no more memory than this, and no swap."""
    with _group("memory") as (group, version):
        if version == 1:
            _write(group / "memory.limit_in_bytes", str(limit_bytes))
            _write(group / "memory.swappiness", "0")
        else:
            _write(group / "memory.max", str(limit_bytes))
            _write(group / "memory.swap.max", "0")
        yield group


@contextlib.contextmanager
def slow_reads_group(path: Path, bytes_s: int) -> Iterator[Path]:
    """A group that reads no faster than this from the disk that holds `path`."""
    device = _disk_of(path)
    with _group("blkio", "io") as (group, version):
        if version == 1:
            _write(group / "blkio.throttle.read_bps_device", f"{device} {bytes_s}")
        else:
            _write(group / "io.max", f"{device} rbps={bytes_s}")
        yield group


@contextlib.contextmanager
def _group(v1_controller: str, v2_controller: str = "memory") -> Iterator[tuple[Path, int]]:
    """A new group and its version; inside this process's own limits, whatever they are."""
    parent, version = _parent(v1_controller, v2_controller)
    group = parent / f"bapq-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        raise GroupError(f"{group} cannot be made ({error.strerror}): run as root") from error
    try:
        yield group, version
    finally:
        group.rmdir()


def _parent(v1_controller: str, v2_controller: str) -> tuple[Path, int]:
    own = [line.split(":", 2)[1:] for line in Path("/proc/self/cgroup").read_text().splitlines()]
    for controllers, path in own:
        if v1_controller in controllers.split(","):
            return _ROOT / v1_controller / path.lstrip("/"), 1
    for controllers, path in own:
        # A group that holds processes hands no controllers on, but its parent does.
        parent = (_ROOT / path.lstrip("/")).parent if path != "/" else _ROOT
        enabled = parent / "cgroup.subtree_control"
        if not controllers and enabled.exists() and v2_controller in enabled.read_text().split():
            return parent, 2
    raise GroupError(f"no control group with the controller {v2_controller} is mounted")


def _disk_of(path: Path) -> str:
    """The numbers major:minor of the whole disk."""
    number = path.stat().st_dev
    block = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}").resolve()
    if not block.exists():
        raise GroupError(f"{path} is not on a disk whose reads can be slowed down")
    disk = block.parent if (block / "partition").exists() else block
    return (disk / "dev").read_text().strip()


def _write(file: Path, text: str) -> None:
    try:
        file.write_text(text)
    except OSError as error:
        raise GroupError(f"{file} does not take {text!r} ({error.strerror})") from error
