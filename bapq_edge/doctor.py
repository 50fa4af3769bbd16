"""Examines the board: what BAPQ-Edge finds on it, what is missing, and what to do about that."""

from __future__ import annotations

import importlib
import importlib.metadata
import mmap
import os
import platform
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from .bank.reader import Bank
from .bank.storage import read_bytes_s
from .control.device_profile import DeviceProfile, find_profile
from .engine.library import kernels_name
from .errors import BapqError, InputFileError, InterruptedUpdateWarning, SensorError
from .sensors import Readings, Sensors, open_sensors
from .sensors.files import read_text
from .units import format_size

__all__ = ["Finding", "examine"]

_LITTLE_MEMORY_BYTES = 128 << 20
_READ_BYTES = 8 << 20
_BLOCK_BYTES = 1 << 20
_BETTER = {
    "neon": ("neondot", {"asimddp"}),
    "avx2": ("avx512vnni", {"avx512f", "avx512bw", "avx512vl", "avx512_vnni"}),
    "scalar": ("avx2", {"avx2", "fma"}),
}
"""the next better kernels, and the CPU features that they need, as /proc/cpuinfo calls them"""
_SLOW_SHARE = 0.5
"""of the profile's storage speed: below it the planner expects far too much"""


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's."""

    item: str
    state: Literal["OK", "note", "BAD"]
    """note: it runs, but something could be better; BAD: nothing runs before this is fixed"""
    found: str
    fix: str = ""


def examine(
    bank: Path | None = None,
    root: str | os.PathLike[str] = "/",
    environment: Mapping[str, str] = os.environ,
    sensors: Sensors | None = None,
) -> list[Finding]:
    """Look at everything; `root` is where /proc and /sys of the board stand."""
    base = os.fspath(root)
    profile = find_profile(root)
    kernels = _kernels(base, environment, profile)
    findings = [_python(), *_packages(), kernels, _page_size(profile), _cores()]
    try:
        sensors = sensors or open_sensors(root, environment)
    except (SensorError, InputFileError) as error:
        found = str(error).removesuffix(": check the path")
        fix = "unset BAPQ_SENSORS, or correct it"
        return [*findings, Finding("sensors", "note", found, fix)]
    readings = sensors.read()
    sensors.close()
    findings += [
        _memory(readings),
        _cgroup(base, readings),
        _pressure(base, readings),
        _swap(base),
        _power(readings),
        _temperature(readings, profile),
        _throttling(base, readings),
        _profile(base, profile),
    ]
    if bank is not None:
        findings += _bank(bank, profile)
    return findings


# ---- the software ----


def _python() -> Finding:
    version = platform.python_version()
    return Finding("python", "OK", f"{version}, 64-bit, {platform.machine()}")


def _packages() -> Iterator[Finding]:
    for name in ("onnxruntime", "numpy"):
        needed = _needed(name)
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            fix = f"pip install '{name}>={needed}'"
            yield Finding(name, "BAD", "not installed", fix)
            continue
        try:
            importlib.import_module(name)
        except ImportError as error:
            fix = f"pip install --force-reinstall {name}"
            yield Finding(name, "BAD", f"{found} cannot be imported: {error}", fix)
            continue
        if _numbers(found) < _numbers(needed):
            fix = f"pip install --upgrade '{name}>={needed}'"
            yield Finding(name, "BAD", f"{found}, needed is {needed} or newer", fix)
        else:
            yield Finding(name, "OK", f"{found} (needed: {needed} or newer)")


def _needed(name: str) -> str:
    """The oldest version that the package's own metadata admits."""
    for requirement in importlib.metadata.requires("bapq-edge") or []:
        match = re.fullmatch(rf"{name}\s*>=\s*([\d.]+)", requirement)
        if match:
            return match[1]
    return "0"


def _numbers(version: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", version)[:3]]


def _kernels(root: str, environment: Mapping[str, str], profile: DeviceProfile | None) -> Finding:
    try:
        name = kernels_name()
    except BapqError as error:
        return Finding("kernels", "BAD", str(error), "unset BAPQ_ISA")
    forced = environment.get("BAPQ_ISA")
    if forced:
        fix = "unset BAPQ_ISA to have the best"
        return Finding("kernels", "note", f"{name}, because BAPQ_ISA={forced}", fix)
    expected = None if profile is None else profile.kernels
    if expected not in (None, name):
        fix = "see whether the kernel or a container hides features of the CPU (/proc/cpuinfo)"
        return Finding("kernels", "note", f"{name}, the board's profile says {expected}", fix)
    return Finding("kernels", "OK", f"{name}{_why_no_better(name, root)}")


def _why_no_better(name: str, root: str) -> str:
    """What the CPU lacks for a better family."""
    if name in ("avx512vnni", "neondot"):
        return ", the best there is"
    better, needs = _BETTER[name]
    text = read_text(os.path.join(root, "proc/cpuinfo")) or ""
    match = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    missing = needs - set(match[1].split()) if match else set()
    if not missing:
        return ""
    return f"; {better} is faster, but this CPU has no {', '.join(sorted(missing))}"


def _page_size(profile: DeviceProfile | None) -> Finding:
    stock = mmap.PAGESIZE if profile is None else profile.page_bytes
    if stock != mmap.PAGESIZE:
        found = f"{format_size(mmap.PAGESIZE)}; this board's stock kernel has {format_size(stock)}"
        return Finding("page size", "OK", found)
    return Finding("page size", "OK", format_size(mmap.PAGESIZE))


def _cores() -> Finding:
    usable, there = len(os.sched_getaffinity(0)), os.cpu_count() or 1
    if usable < there:
        fix = "see taskset -p, or the service's CPUAffinity"
        return Finding("cores", "note", f"{usable} usable of {there}", fix)
    return Finding("cores", "OK", f"{usable} usable")


# ---- memory ----


def _memory(readings: Readings) -> Finding:
    if readings.available_bytes is None:
        return Finding("memory", "note", "/proc/meminfo cannot be read", "mount /proc")
    found = f"{format_size(readings.available_bytes)} available"
    if readings.available_bytes < _LITTLE_MEMORY_BYTES:
        return Finding("memory", "note", found, "stop other programs; a desktop takes most")
    return Finding("memory", "OK", found)


def _command_line(root: str) -> str:
    """Where the kernel's options are written."""
    if _is_raspberry_pi(root):
        return "the one line of /boot/firmware/cmdline.txt (before Bookworm: /boot/cmdline.txt)"
    return "the kernel's command line (in the boot loader's settings)"


def _is_raspberry_pi(root: str) -> bool:
    return "Raspberry Pi" in (read_text(os.path.join(root, "proc/device-tree/model")) or "")


def _cgroup(root: str, readings: Readings) -> Finding:
    item, limit = "cgroup limit", readings.cgroup_limit_bytes
    if limit is not None:
        used = format_size(readings.cgroup_used_bytes or 0)
        return Finding(item, "OK", f"{format_size(limit)}, of which {used} are in use")
    if readings.cgroup_used_bytes is not None:
        return Finding(item, "OK", "none")
    controllers = read_text(os.path.join(root, "sys/fs/cgroup/cgroup.controllers"))
    if controllers is not None and "memory" not in controllers.split():
        option = f"add cgroup_enable=memory to {_command_line(root)} and reboot"
        fix = f"to limit containers or services, {option}"
        return Finding(item, "note", "this kernel has the memory controller off", fix)
    return Finding(item, "OK", "none that can be seen")


def _pressure(root: str, readings: Readings) -> Finding:
    item, percent = "memory pressure", readings.memory_pressure_percent
    if percent is not None:
        return Finding(item, "OK", f"{percent:.1f} % (PSI, some avg10)")
    fix = f"add psi=1 to {_command_line(root)} and reboot"
    if not os.path.exists(os.path.join(root, "proc/pressure/memory")):
        fix += "; if it stays, the kernel is built without CONFIG_PSI"
    return Finding(item, "note", "PSI cannot be read; the controller goes by free memory", fix)


def _swap(root: str) -> Finding:
    lines = (read_text(os.path.join(root, "proc/swaps")) or "").splitlines()[1:]
    places = [line.split()[0] for line in lines if line.split()]
    if not places:
        return Finding("swap", "OK", "none")
    on_disk = [place for place in places if not os.path.basename(place).startswith("zram")]
    if not on_disk:
        return Finding("swap", "OK", f"{', '.join(places)} (compressed, in memory)")
    fix = (
        "what is swapped out comes back slower than from a bank: "
        "sudo swapoff -a, or use zram (apt install zram-tools)"
    )
    return Finding("swap", "note", f"{', '.join(on_disk)} on storage", fix)


# ---- sensors ----


def _power(readings: Readings) -> Finding:
    if readings.power_source is not None:
        found = readings.power_source
        if readings.power_w is not None:
            found = f"{readings.power_w:.2f} W ({found})"
        if readings.power_scope is not None:
            found += f", measures: {readings.power_scope}"
        if readings.power_error_percent is not None:
            found += f", ±{readings.power_error_percent:g} %"
        return Finding("power", "OK", found)
    fix = (
        "a Pi 5 tells it through vcgencmd, others through an INA219 or the like on I2C (hwmon), "
        "any meter through BAPQ_POWER=file:PATH"
    )
    return Finding("power", "note", "no meter: energy is not measured", fix)


def _temperature(readings: Readings, profile: DeviceProfile | None) -> Finding:
    if readings.temperature_c is not None:
        found = f"{readings.temperature_c:.1f} °C ({readings.temperature_source})"
        soft_c = None if profile is None else profile.soft_limit_c
        if soft_c is not None and readings.temperature_c >= soft_c:
            found += f"; from {soft_c} °C on this board lowers its clock"
            return Finding("temperature", "note", found, "give it a heat sink or a fan")
        return Finding("temperature", "OK", found)
    fix = "boards have /sys/class/thermal; in a container, mount /sys"
    return Finding("temperature", "note", "no thermal zone of CPU or SoC", fix)


def _throttling(root: str, readings: Readings) -> Finding:
    item, now, since_boot = "throttling", readings.throttled_now, readings.throttled_since_boot
    if now is None or since_boot is None:
        if not _is_raspberry_pi(root):
            return Finding(item, "OK", "only a Raspberry Pi tells it")
        fix = "apt install libraspberrypi-bin (Trixie: raspi-utils), sudo usermod -aG video $USER"
        return Finding(item, "note", "vcgencmd does not answer", fix)
    if not since_boot and not now:
        return Finding(item, "OK", "none since boot")
    words = {*now, *since_boot}
    fixes = []
    if "under-voltage" in words:
        fixes.append("use the board's own power supply and a short cable")
    if words - {"under-voltage"}:
        fixes.append("give it a heat sink or a fan")
    when = f"now: {', '.join(now) or 'none'}; since boot: {', '.join(since_boot) or 'none'}"
    return Finding(item, "note", when, " and ".join(fixes))


def _profile(root: str, profile: DeviceProfile | None) -> Finding:
    if profile is not None:
        return Finding("device profile", "OK", f"{profile.name} ({profile.description})")
    model = (read_text(os.path.join(root, "proc/device-tree/model")) or "").rstrip("\0")
    found = f"none for {model!r}" if model else "none: this machine names no board"
    fix = "bapq doctor --calibrate -o board.yaml measures one; give it as Session(profile=...)"
    return Finding("device profile", "note", found, fix)


# ---- the bank's storage ----


def _bank(path: Path, profile: DeviceProfile | None) -> Iterator[Finding]:
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            bank = Bank.open(path)
    except BapqError as error:
        found, _, fix = str(error).rpartition(": ")  # a message ends with the next step
        yield Finding("bank", "BAD", found, fix)
        return
    levels = ", ".join(map(str, bank.levels))
    for warning in caught:
        cut_off = issubclass(warning.category, InterruptedUpdateWarning)
        fix = "install the new bank again" if cut_off else "copy the planes for the other levels"
        yield Finding("bank", "note", str(warning.message), fix)
    if not caught:
        yield Finding("bank", "OK", f"{bank.manifest.model.name}, levels {levels}")
    file = max((bank.plane_path(plane) for plane in bank.planes), key=os.path.getsize)
    try:
        speed = _read_speed(file, direct=True)
        yield Finding("direct reads", "OK", "possible: Session(direct_io=True)")
    except OSError as error:
        fix = (
            "nothing to do unless you want direct_io=True: then copy the bank to ext4, xfs or f2fs"
        )
        yield Finding("direct reads", "note", f"not on this file system ({error.strerror})", fix)
        speed = _read_speed(file, direct=False)
    found = f"{speed / 1e6:.0f} MB/s in blocks of {format_size(_BLOCK_BYTES)}"
    size = os.path.getsize(file)
    if size < _READ_BYTES:
        found += f" (only {format_size(size)} there to read: a rough figure)"
    expected = profile.read_mb_s(path) * 1e6 if profile else 0
    if speed < _SLOW_SHARE * expected:
        fix = "try another card or port; or put storage_read_mb_s into a profile of your own"
        found += f", the profile says {expected / 1e6:.0f}"
        yield Finding("read speed", "note", found, fix)
    else:
        yield Finding("read speed", "OK", found)


def _read_speed(file: Path, *, direct: bool) -> float:
    return read_bytes_s(file, direct=direct, block_bytes=_BLOCK_BYTES, most_bytes=_READ_BYTES)
