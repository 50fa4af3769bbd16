"""What sensors tell: one frozen record per read, in which whatever cannot be read is None."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

__all__ = ["CAPPED_BITS", "Readings", "Sensors"]

_THROTTLE_BITS = {
    0: "under-voltage",
    1: "frequency capped",
    2: "throttled",
    3: "soft temperature limit",
}
_SINCE_BOOT_SHIFT = 16
CAPPED_BITS = 0b0110
"""Bits of `throttled`: the firmware slows the CPU right now, for heat or a weak supply."""


@dataclass(frozen=True)
class Readings:
    """One moment of the device. None means that this device does not tell; nothing is estimated."""

    time_s: float
    """Monotonic time; of a mock, the time of its trace."""
    available_bytes: int | None = None
    """MemAvailable: what the system can hand out without swapping."""
    rss_bytes: int | None = None
    """Resident memory of this process."""
    cgroup_limit_bytes: int | None = None
    """Limit of the cgroup, our own or one above it, that leaves least free; None is no limit."""
    cgroup_used_bytes: int | None = None
    """Memory in use in that cgroup, file cache that the kernel can drop at once not counted."""
    memory_pressure_percent: float | None = None
    """PSI: share of the last 10 s in which some task waited for memory."""
    battery_percent: float | None = None
    """Charge of the battery."""
    on_battery: bool | None = None
    """Whether the board lives on its battery."""
    power_w: float | None = None
    """What the board draws."""
    power_source: str | None = None
    """Meter and rail that power_w stands for; a meter that counts energy is named before it has
    counted enough for a power."""
    power_scope: str | None = None
    """What that meter measures, such as "board" or "CPU package"."""
    power_error_percent: float | None = None
    """How far the meter itself may be off, by its maker or by assumption."""
    power_age_s: float | None = None
    """Age of power_w and energy_j."""
    energy_j: float | None = None
    """What a meter that counts has counted since the sensors were opened, or another start."""
    temperature_c: float | None = None
    """Temperature of the hottest zone of CPU and SoC."""
    temperature_source: str | None = None
    """Type of that zone."""
    throttled: int | None = None
    """Bits of `vcgencmd get_throttled`: 0 to 3 are now, 16 to 19 since boot."""
    vcgencmd_age_s: float | None = None
    """Age of the older of what vcgencmd told: throttled, and the PMIC's power."""

    @property
    def throttled_now(self) -> tuple[str, ...] | None:
        """What the firmware does to the board right now, in words."""
        return self._throttle_words(0)

    @property
    def throttled_since_boot(self) -> tuple[str, ...] | None:
        """What the firmware has done to the board since boot, in words."""
        return self._throttle_words(_SINCE_BOOT_SHIFT)

    def _throttle_words(self, shift: int) -> tuple[str, ...] | None:
        if self.throttled is None:
            return None
        bits = self.throttled >> shift
        return tuple(word for bit, word in _THROTTLE_BITS.items() if bits >> bit & 1)


class Sensors(Protocol):
    """Where readings come from: the system, or a mock that plays a trace."""

    def read(self) -> Readings:
        """The readings of this moment. Never raises for a sensor that is absent or fails."""
        ...

    def close(self) -> None:
        """Let go of what the sensors hold."""
        ...
