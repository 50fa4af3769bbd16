"""Memory: what the system, this process's cgroup and the kernel's pressure meter tell."""

from __future__ import annotations

import os

from .files import read_integer, read_text

__all__ = ["available_bytes", "cgroup_bytes", "pressure_percent", "process_rss_bytes"]

# cgroup v1 writes "no limit" as the largest number of whole pages, close to 2**63.
_NO_LIMIT_BYTES = 1 << 60


def _field_bytes(path: str, field: str) -> int | None:
    """A field that /proc gives in kB, in bytes."""
    for line in (read_text(path) or "").splitlines():
        name, _, rest = line.partition(":")
        words = rest.split()
        if name == field and len(words) == 2 and words[0].isdigit() and words[1] == "kB":
            return int(words[0]) * 1024
    return None


def available_bytes(root: str) -> int | None:
    """MemAvailable, the figure that psutil gives as `virtual_memory().available`."""
    return _field_bytes(os.path.join(root, "proc/meminfo"), "MemAvailable")


def process_rss_bytes(root: str) -> int | None:
    """VmRSS of this process."""
    return _field_bytes(os.path.join(root, "proc/self/status"), "VmRSS")


def pressure_percent(root: str) -> float | None:
    """PSI "some avg10" of memory; None where the kernel has it off, even if the file is there."""
    for line in (read_text(os.path.join(root, "proc/pressure/memory")) or "").splitlines():
        words = line.split()
        if words[:1] == ["some"]:
            for word in words[1:]:
                name, _, value = word.partition("=")
                if name == "avg10":
                    return _non_negative(value)
    return None


def _non_negative(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if 0 <= value < float("inf") else None


def cgroup_bytes(root: str) -> tuple[int | None, int | None]:
    """(limit, used) of the cgroup that leaves this process least free, its own or one above it.

    Where none has a limit: (None, used of its own). Where there is no memory controller, as on
    stock Raspberry Pi OS: (None, None).
    """
    version, path = _own_cgroup(os.path.join(root, "proc/self/cgroup"))
    if path is None:
        return None, None
    mount = os.path.join(root, "sys/fs/cgroup", "memory" if version == 1 else "")
    parts = [part for part in path.split("/") if part]
    tightest: tuple[int, int] | None = None
    own_used: int | None = None
    # In a container the path may be the host's, and the mount its own cgroup: what is not there is
    # stepped over, and the walk ends at the mount.
    for depth in range(len(parts), -1, -1):
        directory = os.path.join(mount, *parts[:depth])
        limit = _limit_bytes(directory, version)
        if limit is None and own_used is not None:
            continue
        used = _used_bytes(directory, version)
        if used is None:
            continue
        if own_used is None:
            own_used = used
        if limit is not None and (tightest is None or limit - used < tightest[0] - tightest[1]):
            tightest = limit, used
    return tightest or (None, own_used)


def _own_cgroup(path: str) -> tuple[int, str | None]:
    """(version, path) of the hierarchy that counts this process's memory."""
    unified: str | None = None
    for line in (read_text(path) or "").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        if ".." in group.split("/"):  # outside of this cgroup namespace: nothing of it can be seen
            continue
        if "memory" in controllers.split(","):
            return 1, group
        if number == "0" and not controllers:
            unified = group
    return 2, unified


def _limit_bytes(directory: str, version: int) -> int | None:
    # memory.high does not kill, but beyond it the kernel slows every allocation down.
    names = ("memory.limit_in_bytes",) if version == 1 else ("memory.max", "memory.high")
    limits = [read_integer(os.path.join(directory, name)) for name in names]
    return min(
        (limit for limit in limits if limit is not None and limit < _NO_LIMIT_BYTES), default=None
    )


def _used_bytes(directory: str, version: int) -> int | None:
    name, cache = (
        ("memory.usage_in_bytes", "total_inactive_file")
        if version == 1
        else ("memory.current", "inactive_file")
    )
    used = read_integer(os.path.join(directory, name))
    if used is None:
        return None
    # Usage counts the page cache, which a scan of any large file fills to the limit.
    for line in (read_text(os.path.join(directory, "memory.stat")) or "").splitlines():
        field, _, value = line.partition(" ")
        if field == cache and value.isdigit():
            return max(0, used - int(value))
    return used
