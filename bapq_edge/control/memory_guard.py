"""The weight limit: shrinks by what the reserve of memory lacks, grows back by steps."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..sensors.readings import Readings
from ..units import format_size
from .config import ControllerConfig
from .hysteresis import Hold

__all__ = ["MemoryGuard", "free_memory"]


def free_memory(readings: Readings) -> list[tuple[str, int]]:
    """(name, free bytes) of each limit that can be read."""
    free = []
    if readings.available_bytes is not None:
        free.append(("available_bytes", readings.available_bytes))
    if readings.cgroup_limit_bytes is not None and readings.cgroup_used_bytes is not None:
        unused = max(0, readings.cgroup_limit_bytes - readings.cgroup_used_bytes)
        free.append(("free in cgroup", unused))
    return free


@dataclass(frozen=True)
class _Room:
    """One limit on memory: what is free in it and what should be."""

    name: str
    free_bytes: int
    reserve_bytes: int
    band_bytes: int

    @property
    def surplus_bytes(self) -> int:
        """What is free beyond the reserve; negative when the reserve is not full."""
        return self.free_bytes - self.reserve_bytes


@dataclass
class _Shed:
    """What was given back lately and may not show in the readings yet."""

    time_s: float
    free_bytes: dict[str, int]
    given_bytes: int
    shown_bytes: dict[str, int] = field(default_factory=dict)


class MemoryGuard:
    """The weight limit: shrinks by what the reserve lacks, grows back by steps."""

    def __init__(
        self, config: ControllerConfig, budget_bytes: int | None, minimum_bytes: int
    ) -> None:
        """Begin with the whole budget; None is no limit."""
        self._config = config
        self._budget_bytes = budget_bytes
        self._minimum_bytes = minimum_bytes
        self.limit_bytes = budget_bytes
        self._full_bytes = budget_bytes
        self._hold = Hold(config.hold_s)
        self._pressure_s: float | None = None
        self._shed: _Shed | None = None
        self._seen: set[str] = set()

    @property
    def restricted(self) -> bool:
        """Whether the limit is below the budget."""
        return self.limit_bytes != self._budget_bytes

    def set_budget(self, budget_bytes: int | None, minimum_bytes: int) -> None:
        """Take another budget; a limit that is held below it stays, or grows to the minimum."""
        restricted = self.restricted
        self._budget_bytes = budget_bytes
        self._minimum_bytes = minimum_bytes
        if budget_bytes is not None or not restricted:
            self._full_bytes = budget_bytes
        if not restricted or (
            budget_bytes is not None
            and self.limit_bytes is not None
            and self.limit_bytes >= budget_bytes
        ):
            self.limit_bytes = budget_bytes
        elif self.limit_bytes is not None:
            self.limit_bytes = max(self.limit_bytes, minimum_bytes)

    def update(self, readings: Readings, weight_bytes: int | None) -> str | None:
        """The text of the reading that moved the limit."""
        rooms = self._rooms(readings)
        missing = self._missing_readings(readings)
        pressure = readings.memory_pressure_percent
        for_room = self._shed_for_room(readings.time_s, rooms, weight_bytes)
        if for_room is not None:
            return for_room
        if pressure is not None:
            for_pressure = self._shed_for_pressure(readings.time_s, pressure, weight_bytes)
            if for_pressure is not None:
                return for_pressure
        return self._grow(readings.time_s, rooms, pressure, missing)

    def _rooms(self, readings: Readings) -> list[_Room]:
        config = self._config
        rooms = []
        for name, free_bytes in free_memory(readings):
            reserve, band = config.reserve_bytes, config.reserve_band_bytes
            if name != "available_bytes":
                share = int((readings.cgroup_limit_bytes or 0) * config.cgroup_reserve_share)
                if share < reserve:
                    reserve, band = share, band * share // reserve
            rooms.append(_Room(name, free_bytes, reserve, band))
        return rooms

    def _missing_readings(self, readings: Readings) -> bool:
        """Whether one that was there before is absent now."""
        present = {
            name
            for name in ("available_bytes", "cgroup_used_bytes", "memory_pressure_percent")
            if getattr(readings, name) is not None
        }
        self._seen |= present
        return present != self._seen

    def _shed_for_room(
        self, time_s: float, rooms: list[_Room], weight_bytes: int | None
    ) -> str | None:
        pending = self._pending(time_s, rooms)
        tight = [room for room in rooms if room.surplus_bytes + pending[room.name] < 0]
        if not tight:
            return None
        lacking = {
            room.name: room.band_bytes - room.surplus_bytes - pending[room.name] for room in tight
        }
        worst = max(tight, key=lambda room: lacking[room.name])
        before = self._base_bytes(weight_bytes)
        text = f"{worst.name} {format_size(worst.free_bytes)} < {format_size(worst.reserve_bytes)}"
        if before is None or not self._shrink(before - lacking[worst.name], before):
            self._hold.passed(time_s, False)
            return None
        given = before - (self.limit_bytes or 0)
        self._shed = _Shed(
            time_s, {room.name: room.free_bytes for room in rooms}, given + pending[worst.name]
        )
        self._hold.passed(time_s, False)
        return text

    def _pending(self, time_s: float, rooms: list[_Room]) -> dict[str, int]:
        """Per limit: bytes given back that its free memory does not show yet.

        Runs in flight keep their weights until they end. What does not show within the hold time
        has gone to someone else.
        """
        shed = self._shed
        if shed is not None and time_s - shed.time_s >= self._config.hold_s:
            shed = self._shed = None
        pending = {}
        for room in rooms:
            if shed is None or room.name not in shed.free_bytes:
                pending[room.name] = 0
                continue
            rise = room.free_bytes - shed.free_bytes[room.name]
            shown = max(shed.shown_bytes.get(room.name, 0), rise)
            shed.shown_bytes[room.name] = shown
            pending[room.name] = max(0, shed.given_bytes - shown)
        return pending

    def _shed_for_pressure(
        self, time_s: float, pressure: float, weight_bytes: int | None
    ) -> str | None:
        """One step at once, and one per hold time while it lasts: it is a mean over 10 s."""
        config = self._config
        if pressure < config.pressure_percent:
            return None
        self._hold.passed(time_s, False)
        if self._pressure_s is not None and time_s - self._pressure_s < config.hold_s:
            return None
        before = self._base_bytes(weight_bytes)
        if before is None or not self._shrink(before - self._step_bytes(before), before):
            return None
        self._pressure_s = time_s
        return f"memory_pressure_percent {pressure:.3g} >= {config.pressure_percent:g}"

    def _base_bytes(self, weight_bytes: int | None) -> int | None:
        known = [value for value in (self.limit_bytes, weight_bytes) if value is not None]
        return min(known, default=None)

    def _step_bytes(self, fallback_bytes: int) -> int:
        full = self._full_bytes if self._full_bytes is not None else fallback_bytes
        return max(1, full // self._config.memory_steps)

    def _shrink(self, wanted_bytes: int, before_bytes: int) -> bool:
        """Lower the limit; whether that changed it."""
        limit = max(self._minimum_bytes, wanted_bytes)
        if limit >= before_bytes or (self.limit_bytes is not None and limit >= self.limit_bytes):
            return False
        if self._full_bytes is None:
            self._full_bytes = before_bytes  # where an unlimited session has to get back to
        self.limit_bytes = limit
        return True

    def _grow(
        self, time_s: float, rooms: list[_Room], pressure: float | None, missing: bool
    ) -> str | None:
        config, full, limit = self._config, self._full_bytes, self.limit_bytes
        if not self.restricted or full is None or limit is None:
            return None
        step = min(self._step_bytes(full), full - limit)
        room = min(rooms, key=lambda room: room.surplus_bytes - room.band_bytes, default=None)
        good = (
            not missing
            and (room is None or room.surplus_bytes - room.band_bytes >= step)
            and (
                pressure is None
                or pressure < config.pressure_percent - config.pressure_band_percent
            )
        )
        if not self._hold.passed(time_s, good):
            return None
        self.limit_bytes = limit + step
        self._shed = None
        if self.limit_bytes >= full:
            self.limit_bytes = self._budget_bytes
            if self._budget_bytes is None:
                self._full_bytes = None
        if room is None:
            return f"memory_pressure_percent {pressure:.3g} for {config.hold_s:g} s"
        enough = format_size(room.reserve_bytes + room.band_bytes + step)
        return f"{room.name} {format_size(room.free_bytes)} >= {enough} for {config.hold_s:g} s"
