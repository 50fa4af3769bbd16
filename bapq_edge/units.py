"""Sizes and counts as people write them."""

from __future__ import annotations

import math
import re
from typing import Literal

from .errors import SizeError

__all__ = ["counted", "format_size", "parse_size"]

_UNITS = {"": 1, "B": 1}
for _power, _prefix in enumerate("KMGT", start=1):
    _UNITS[f"{_prefix}B"] = 1000**_power
    _UNITS[f"{_prefix}iB"] = 1024**_power
_LEAST_WITHOUT_UNIT = 1 << 20


def parse_size(size: int | str) -> int:
    """Bytes of `64MiB` (binary), `64MB` (decimal) or a plain number. Raises SizeError.

    An integer is bytes. A string without a unit is bytes from 1 MiB on; a smaller number has surely
    lost its unit, and is refused.
    """
    if isinstance(size, int) and not isinstance(size, bool) and size > 0:
        return size
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(size))
    if match and match[2] in _UNITS:
        value = int(float(match[1]) * _UNITS[match[2]])
        if not match[2] and 0 < value < _LEAST_WITHOUT_UNIT:
            raise SizeError(
                f"{match[1]} what? A size this small needs its unit: write {match[1]}MiB, or "
                f"{match[1]}B for bytes"
            )
        if value > 0:
            return value
    raise SizeError(
        f"{size!r} is not a size: write it as 64MiB, 64MB or a positive number of bytes"
    )


def format_size(size_bytes: float, towards: Literal["nearest", "up", "down"] = "nearest") -> str:
    """The size in the largest binary unit that keeps it above one, such as `12.5 MiB`.

    What is rounded up may be given as a budget where the size itself is needed.
    """
    size, unit = float(size_bytes), "B"
    for larger in ("KiB", "MiB", "GiB"):
        if abs(size) >= 1024:
            size, unit = size / 1024, larger
    if unit == "B":
        return f"{size:.0f} B"
    if towards != "nearest":
        size = (math.ceil if towards == "up" else math.floor)(size * 10) / 10
    return f"{size:.1f} {unit}"


def counted(number: int, noun: str) -> str:
    """A number and what it counts, such as `1 layer` and `1,200 layers`."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")
