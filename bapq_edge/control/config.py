"""The controller's thresholds."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from ..errors import RequestError
from .device_profile import DeviceProfile

__all__ = ["ControllerConfig"]


@dataclass(frozen=True)
class ControllerConfig:
    """Thresholds. The defaults are for a board without a profile. Raises RequestError."""

    reserve_bytes: int = 128 << 20
    """Memory that the system is to keep available."""
    reserve_band_bytes: int = 64 << 20
    """Shedding restores the reserve and this much more, and growing leaves this much more."""
    cgroup_reserve_share: float = 0.1
    """Reserve inside a cgroup, as a share of its limit, where that is less than reserve_bytes."""
    memory_steps: int = 8
    """The weight limit returns in so many steps, and pressure takes one of them."""
    pressure_percent: float = 10.0
    """Memory pressure (PSI) from which memory is given back."""
    pressure_band_percent: float = 5.0
    """Pressure must fall so far below that before memory is taken again."""
    temperature_limit_c: float = 75.0
    """Temperature from which the board is hot."""
    temperature_band_c: float = 5.0
    """The board must cool so far below that before it is no longer hot."""
    hot_level: int = 4
    """Highest level while the board is hot; threads are halved with it."""
    battery_low_percent: float = 30.0
    """Charge below which the battery is low."""
    battery_low_level: int = 4
    """Highest level on a low battery."""
    battery_critical_percent: float = 15.0
    """Charge below which the battery is critical."""
    battery_critical_level: int = 2
    """Highest level on a critical battery."""
    battery_band_percent: float = 5.0
    """The charge must rise so far above a threshold before its cap goes."""
    hold_s: float = 10.0
    """A reading must stay good for so long before one step back."""
    period_s: float = 1.0
    """Time from one reading to the next."""

    def __post_init__(self) -> None:
        """Refuse numbers that make no rule."""
        for entry in dataclasses.fields(self):
            value = getattr(self, entry.name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
                raise RequestError(f"{entry.name} is {value!r}, the least is 0")
        for name in ("memory_steps", "period_s"):
            if not getattr(self, name) > 0:
                raise RequestError(f"{name} is {getattr(self, name)!r}, it must be above 0")
        if self.battery_critical_percent > self.battery_low_percent:
            raise RequestError(
                f"battery_critical_percent is {self.battery_critical_percent:g}, "
                f"at most battery_low_percent, {self.battery_low_percent:g}, is possible"
            )

    @classmethod
    def from_profile(cls, profile: DeviceProfile) -> ControllerConfig:
        """The thresholds that the board's profile sets; the others keep their defaults."""
        return cls(
            reserve_bytes=profile.reserve_mib << 20,
            reserve_band_bytes=profile.reserve_mib << 19,
            pressure_percent=profile.pressure_percent,
            temperature_limit_c=profile.throttle_c - profile.temperature_margin_c,
            battery_low_percent=profile.battery_low_percent,
            battery_critical_percent=profile.battery_critical_percent,
            hold_s=profile.hold_s,
        )
