"""Device profiles: facts about boards, from device_profiles/*.yaml (its README has the schema)."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path

from ..errors import ProfileError
from ..input_files import input_file_errors

__all__ = ["DeviceProfile", "find_profile", "load_profile", "profile_names"]

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

    def __post_init__(self) -> None:
        """Refuse a value of the wrong type or a number below one."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            expected = int if field.type == "int" else str
            if type(value) is not expected or not value or (expected is int and int(value) < 1):
                raise ProfileError(
                    f"profile key {field.name!r} is {value!r}, it needs a "
                    f"{'positive integer' if expected is int else 'non-empty string'}"
                )

    @property
    def storage_bytes_s(self) -> float:
        """Read speed to plan with until it is measured."""
        return self.storage_read_mb_s * 1e6


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
    keys = {field.name for field in dataclasses.fields(DeviceProfile)}
    if not isinstance(values, dict) or set(values) != keys:
        found = set(values) if isinstance(values, dict) else set()
        raise ProfileError(
            f"{path}: missing keys {sorted(keys - found)}, "
            f"unknown keys {sorted(map(str, found - keys))}"
        )
    return DeviceProfile(**values)


def find_profile(root: str | os.PathLike[str] = "/") -> DeviceProfile | None:
    """The profile of the board that this runs on; None where the package knows none."""
    try:
        model = Path(root, _BOARD_MODEL).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    fitting = [load_profile(name) for name in profile_names()]
    fitting = [profile for profile in fitting if model.startswith(profile.model_prefix)]
    return max(fitting, key=lambda profile: len(profile.model_prefix), default=None)
