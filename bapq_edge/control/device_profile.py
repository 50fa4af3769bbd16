"""Device profiles: facts about boards, from device_profiles/*.yaml (schema.json has the schema)."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..bank.layout import LEVELS, Level
from ..bank.storage import storage_class
from ..errors import ProfileError, StorageError
from ..input_files import input_file_errors

__all__ = ["DeviceProfile", "find_profile", "load_profile", "profile_names", "save_profile"]

_SPEED_NAMES: dict[Level, str] = {level: f"level_{level}" for level in LEVELS}
_BOARD_MODEL = "proc/device-tree/model"
if os.path.exists(f"/{_BOARD_MODEL}"):
    # On a board every session reads a profile: what that takes comes with the package, not out of
    # the first session's memory budget. Elsewhere the package goes without.
    import yaml  # noqa: F401


@dataclass(frozen=True)
class DeviceProfile:
    """What is known about a board before anything is measured on it."""

    name: str
    description: str
    model_prefix: str
    """What /proc/device-tree/model begins with."""
    cpu: str
    cores: int
    memory_mib: int
    page_bytes: int
    storage_read_mb_s: int
    """Of storage whose class is not known."""
    throttle_c: int
    temperature_margin_c: int
    """The controller acts this far below throttle_c."""
    reserve_mib: int
    """Memory that the controller keeps available to the system."""
    pressure_percent: int
    """Memory pressure (PSI, some avg10) from which the controller gives memory back."""
    battery_low_percent: int
    battery_critical_percent: int
    hold_s: int
    """A reading must be good again for so long before the controller takes one step back."""
    kernels: str | None = None
    """The kernel family that this board's CPU can run."""
    gmac_s: Mapping[str, float] = field(default_factory=dict)
    """10^9 multiply-adds per second of one core in our kernels, by level: level_8 and so on."""
    soft_limit_c: int | None = None
    """From this temperature on the firmware lowers the clock a little, below throttle_c."""
    storage_classes_mb_s: Mapping[str, int] = field(default_factory=dict)
    """Sequential read speed by class of storage: sd, emmc, usb, sata, nvme."""
    idle_w: float | None = None
    """Power of the idle board, without display."""
    busy_w: float | None = None
    """Its power with all cores computing."""
    power_error_percent: int | None = None
    """How far an estimate out of idle_w and busy_w may be off."""
    measured: Mapping[str, float] = field(default_factory=dict)
    """What `bapq doctor --calibrate` measured beside them, for whoever reads it."""
    sources: Mapping[str, str] = field(default_factory=dict)
    """Where the values come from, by key."""

    def __post_init__(self) -> None:
        """Refuse a value of the wrong type or a number that is not positive."""
        for entry in dataclasses.fields(self):
            value = getattr(self, entry.name)
            kind, _, optional = str(entry.type).partition(" | ")
            wanted, fits = _KINDS[kind]
            if not fits(value) and not (optional and value is None):
                raise ProfileError(f"profile key {entry.name!r} is {value!r}, it needs {wanted}")
        for name, speed in self.gmac_s.items():
            if name not in _SPEED_NAMES.values() or speed <= 0:
                raise ProfileError(
                    f"profile key 'gmac_s' has {name}: {speed:g}, it needs positive numbers by "
                    f"level, such as {_SPEED_NAMES[8]}: 3.5"
                )
        if self.idle_w is not None and self.busy_w is not None and self.busy_w < self.idle_w:
            raise ProfileError(
                f"profile key 'busy_w' is {self.busy_w:g}, the least is idle_w, {self.idle_w:g}"
            )

    def read_mb_s(self, path: str | os.PathLike[str]) -> int:
        """Read speed to expect of the storage that holds this path, MB/s."""
        return self.storage_classes_mb_s.get(storage_class(path) or "", self.storage_read_mb_s)

    def products_s(self, level: Level) -> float | None:
        """Multiply-adds per second of one core at a level; None: not known."""
        speed = self.gmac_s.get(_SPEED_NAMES[level])
        return None if speed is None else speed * 1e9

    def assumes(self, *keys: str) -> bool:
        """Whether the value of one of these keys was not measured, published or chosen."""
        unsure = ("assumption", "estimate")
        return any(self.sources.get(key, unsure[0]).startswith(unsure) for key in keys)


def _is_whole(value: Any) -> bool:
    return type(value) is int and value >= 1


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_text(value: Any) -> bool:
    return type(value) is str and bool(value)


def _is_mapping_of(fits: Any) -> Any:
    def check(value: Any) -> bool:
        return isinstance(value, Mapping) and all(
            _is_text(key) and fits(entry) for key, entry in value.items()
        )

    return check


_KINDS = {
    "int": ("a positive integer", _is_whole),
    "str": ("a non-empty string", _is_text),
    "float": ("a positive number", lambda value: _is_number(value) and value > 0),
    "Mapping[str, int]": ("positive integers by name", _is_mapping_of(_is_whole)),
    "Mapping[str, float]": ("numbers by name", _is_mapping_of(_is_number)),
    "Mapping[str, str]": ("texts by key", _is_mapping_of(_is_text)),
}
"""What each type of a key needs, in words and as a check."""


def _directory() -> Path:
    import bapq_edge

    # An editable install has them beside the package; the copy inside is as old as the install.
    roots = [Path(root) for root in bapq_edge.__path__]
    beside = [root.parent for root in roots if (root.parent / "pyproject.toml").is_file()]
    for place in (*beside, *roots):
        if (place / "device_profiles").is_dir():
            return place / "device_profiles"
    raise ProfileError("the package has no device_profiles: reinstall with 'pip install bapq-edge'")


def profile_names() -> list[str]:
    """Names of the boards that the package knows."""
    return sorted(path.stem for path in _directory().glob("*.yaml"))


def load_profile(profile: str | os.PathLike[str]) -> DeviceProfile:
    """The profile of that name, or of that YAML file: its name ends in .yaml or has a slash.

    Raises ProfileError, or InputFileError when the file cannot be read.
    """
    import yaml

    path = Path(profile)
    if path.suffix not in (".yaml", ".yml") and os.sep not in os.fspath(profile):
        path = _directory() / f"{profile}.yaml"
        if str(profile) not in profile_names():
            known = ", ".join(profile_names())
            raise ProfileError(f"no profile is named {str(profile)!r}; there are {known}")
    try:
        with input_file_errors(path):
            text = path.read_text(encoding="utf-8")
        values = yaml.safe_load(text)
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ProfileError(f"{path} is no YAML: {reason}") from error
    entries = dataclasses.fields(DeviceProfile)
    needed = {entry.name for entry in entries if _is_needed(entry)}
    found = set(values) if isinstance(values, dict) else set()
    unknown = found - {entry.name for entry in entries}
    if not isinstance(values, dict) or needed - found or unknown:
        raise ProfileError(
            f"{path}: missing keys {sorted(needed - found)}, "
            f"unknown keys {sorted(map(str, unknown))}"
        )
    return DeviceProfile(**values)


def save_profile(profile: DeviceProfile, path: Path) -> None:
    """Write a profile that `load_profile` reads. Raises StorageError."""
    import yaml

    values = {name: value for name, value in dataclasses.asdict(profile).items() if value}
    try:
        path.write_text(yaml.safe_dump(values, sort_keys=False, allow_unicode=True), "utf-8")
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {error.strerror}") from error


def _is_needed(entry: dataclasses.Field[Any]) -> bool:
    missing = dataclasses.MISSING
    return entry.default is missing and entry.default_factory is missing


def find_profile(root: str | os.PathLike[str] = "/") -> DeviceProfile | None:
    """The profile of the board that this runs on; None where the package knows none."""
    try:
        model = Path(root, _BOARD_MODEL).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    fitting = [load_profile(name) for name in profile_names()]
    fitting = [profile for profile in fitting if model.startswith(profile.model_prefix)]
    return max(fitting, key=lambda profile: len(profile.model_prefix), default=None)
