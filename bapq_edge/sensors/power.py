"""Power: batteries and their state, and the board's draw where a meter of it exists.

How far a meter may be off: an INA2xx with a shunt of 1 % is taken for 2 %, as its own gain error is
below 1 % (data sheets, Texas Instruments). For the Pi 5's PMIC and for gauges nobody states one:
10 % is our assumption, as 5 % is for RAPL.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Any

from .files import list_directory, read_integer, read_text

__all__ = [
    "Power",
    "PowerMeter",
    "Supplies",
    "battery_draw",
    "battery_percent",
    "find_meter",
    "find_supplies",
    "meter_power",
    "on_battery",
    "pmic_power",
]


@dataclass(frozen=True)
class Power:
    """What a meter tells at one moment."""

    watts: float | None
    """None before a counter has counted."""
    source: str
    scope: str
    error_percent: float | None
    age_s: float = 0.0
    energy_j: float | None = None
    """What it has counted, if it counts."""

    def as_readings(self) -> dict[str, Any]:
        """The fields of Readings."""
        return {
            "power_w": self.watts,
            "power_source": self.source,
            "power_scope": self.scope,
            "power_error_percent": self.error_percent,
            "power_age_s": self.age_s,
            "energy_j": self.energy_j,
        }


# ---- batteries: /sys/class/power_supply ----


@dataclass(frozen=True)
class Supplies:
    """Directories of the board's batteries and of what charges them."""

    batteries: tuple[str, ...]
    mains: tuple[str, ...]


def find_supplies(root: str) -> Supplies:
    """Batteries of the board itself; those of a mouse or a headset have the scope "Device"."""
    batteries, mains = [], []
    for directory in list_directory(os.path.join(root, "sys/class/power_supply")):
        kind = read_text(os.path.join(directory, "type"))
        if read_text(os.path.join(directory, "scope")) == "Device":
            continue
        if kind == "Battery" and read_text(os.path.join(directory, "present")) != "0":
            batteries.append(directory)
        elif kind in ("Mains", "USB"):
            mains.append(directory)
    return Supplies(tuple(batteries), tuple(mains))


def battery_percent(supplies: Supplies) -> float | None:
    """Charge of the battery, or of all of them together where each tells its energy or charge."""
    if len(supplies.batteries) == 1:
        capacity = read_integer(os.path.join(supplies.batteries[0], "capacity"))
        if capacity is not None and capacity >= 0:
            return float(capacity)
    for quantity in ("energy", "charge"):
        pairs = [
            (
                read_integer(os.path.join(directory, f"{quantity}_now")),
                read_integer(os.path.join(directory, f"{quantity}_full")),
            )
            for directory in supplies.batteries
        ]
        now = [pair[0] for pair in pairs if pair[0] is not None]
        full = [pair[1] for pair in pairs if pair[1] is not None and pair[1] > 0]
        if pairs and len(now) == len(full) == len(pairs):
            return 100.0 * sum(now) / sum(full)
    return None


def on_battery(supplies: Supplies) -> bool | None:
    """Whether the board lives on its battery; None without a battery or when it cannot be told."""
    if not supplies.batteries:
        return None
    states = {read_text(os.path.join(path, "status")) for path in supplies.batteries}
    online = {read_integer(os.path.join(path, "online")) for path in supplies.mains}
    if "Discharging" in states:  # also with a charger that is too weak
        return True
    if 1 in online or states & {"Charging", "Full", "Not charging"}:
        return False
    return True if online == {0} else None


def battery_draw(supplies: Supplies) -> Power | None:
    """What the batteries give; None unless all that discharge tell it.

    While a battery charges its power is the charger's, not the board's.
    """
    watts, names = 0.0, []
    for directory in supplies.batteries:
        if read_text(os.path.join(directory, "status")) != "Discharging":
            continue
        power_uw = read_integer(os.path.join(directory, "power_now"))
        current_ua = read_integer(os.path.join(directory, "current_now"))
        voltage_uv = read_integer(os.path.join(directory, "voltage_now"))
        if power_uw is not None:
            watts += abs(power_uw) * 1e-6
        elif current_ua is not None and voltage_uv is not None:
            watts += (
                abs(current_ua) * 1e-6 * voltage_uv * 1e-6
            )  # some gauges count discharge negative
        else:
            return None
        names.append(os.path.basename(directory))
    return Power(watts, f"power_supply {'+'.join(names)}", "battery", 10) if names else None


# ---- meters: /sys/class/hwmon ----

_INA_NAME = re.compile(r"ina\d{3,4}")
# Rails of the INA3221 on Jetson overlap; these are the inputs of the whole module.
_TOTAL_RAILS = ("VDD_IN", "POM_5V_IN")


@dataclass(frozen=True)
class PowerMeter:
    """One channel of a current meter that measures the whole board."""

    directory: str
    channel: int
    source: str
    total: bool
    """Whether its label names the board's input; otherwise it is the board's only meter."""

    @property
    def scope(self) -> str:
        """What it measures."""
        return "board" if self.total else "where the meter sits"


def find_meter(root: str) -> PowerMeter | None:
    """The channel that measures the board: its total rail, or its one single-channel meter.

    Found by name, for the numbers of hwmon move between boots. Of several meters without a label
    that names the total, none is chosen: they may overlap or measure something else.
    """
    single = []
    for directory in list_directory(os.path.join(root, "sys/class/hwmon")):
        name = read_text(os.path.join(directory, "name")) or ""
        if not _INA_NAME.fullmatch(name):
            continue
        for channel in (1, 2, 3):
            label = read_text(os.path.join(directory, f"in{channel}_label"))
            if label in _TOTAL_RAILS:
                return PowerMeter(directory, channel, f"hwmon {name} {label}", True)
        if name != "ina3221":
            single.append(PowerMeter(directory, 1, f"hwmon {name}", False))
    return single[0] if len(single) == 1 else None


def meter_power(meter: PowerMeter) -> Power | None:
    """Power on the meter's channel, without a sign: which way is positive depends on the wiring."""
    prefix = os.path.join(meter.directory, "")
    power_uw = read_integer(f"{prefix}power{meter.channel}_input")
    if power_uw is not None:
        return Power(abs(power_uw) * 1e-6, meter.source, meter.scope, 2)
    current_ma = read_integer(f"{prefix}curr{meter.channel}_input")
    voltage_mv = read_integer(f"{prefix}in{meter.channel}_input")
    if current_ma is None or voltage_mv is None:
        return None
    return Power(abs(current_ma) * 1e-3 * voltage_mv * 1e-3, meter.source, meter.scope, 2)


# ---- the Pi 5's PMIC ----

# "VDD_CORE_A current(7)=1.2A" of the stock firmware and "VDD_CORE_A=1.2A" of others
_PMIC_LINE = re.compile(
    r"\s*(\w+)_([AV])\s*(?:\s(?:current|volt)\(\d+\))?\s*=\s*(\d+(?:\.\d+)?)\s*([AV])\s*"
)


def pmic_power(text: str) -> Power | None:
    """Power by `vcgencmd pmic_read_adc`: its rails, without USB, HATs and NVMe.

    None when a rail's current comes without its voltage: a sum of fewer rails would be too small.
    """
    values: dict[str, dict[str, float]] = {"A": {}, "V": {}}
    for line in text.splitlines():
        match = _PMIC_LINE.fullmatch(line)
        if match and match[2] == match[4]:
            values[match[2]][match[1]] = float(match[3])
    amperes, volts = values["A"], values["V"]
    if "EXT5V" in amperes and "EXT5V" in volts:  # the input, of which the other rails are parts
        return Power(amperes["EXT5V"] * volts["EXT5V"], "pmic EXT5V", "board", 10)
    if not amperes or set(amperes) - set(volts):
        return None
    watts = sum(amperes[rail] * volts[rail] for rail in amperes)
    return Power(watts, f"pmic, {len(amperes)} rails", "SoC, memory, no USB", 10)
