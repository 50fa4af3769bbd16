"""The mock plays a CSV of readings, to develop off the board (docs/explanation/controller.md)."""

from __future__ import annotations

import dataclasses
import math
import os
import time
from bisect import bisect_right
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import SensorError
from ..input_files import input_file_errors
from .readings import Readings

__all__ = ["MockSensors", "load_trace"]

_TYPES = {field.name: str(field.type).partition(" ")[0] for field in dataclasses.fields(Readings)}


class MockSensors:
    """Plays a trace: in real time from its first read, or one row per read. The last row stays."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        step: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Load the trace. Raises SensorError, or InputFileError when it cannot be read."""
        self._rows = load_trace(path)
        self._times_s = [row.time_s for row in self._rows]
        self._step = step
        self._clock = clock
        self._started_s: float | None = None
        self._reads = 0

    def read(self) -> Readings:
        """The row of this moment, or the next one."""
        if self._step:
            row = self._rows[min(self._reads, len(self._rows) - 1)]
            self._reads += 1
            return row
        now_s = self._clock()
        if self._started_s is None:
            self._started_s = now_s
        time_s = self._times_s[0] + now_s - self._started_s
        row = self._rows[bisect_right(self._times_s, time_s) - 1]
        return dataclasses.replace(row, time_s=time_s)

    def close(self) -> None:
        """Nothing is held between reads."""


def load_trace(path: str | os.PathLike[str]) -> list[Readings]:
    """The rows of a trace: first column time_s, the others named as fields of Readings.

    An empty cell is an absent reading. Raises SensorError with file, line and column, or
    InputFileError.
    """
    import csv

    try:
        with input_file_errors(path):
            text = Path(path).read_text(encoding="utf-8")
        lines = list(csv.reader(text.splitlines()))
    except (UnicodeDecodeError, csv.Error) as error:
        raise SensorError(f"trace {path} cannot be read: {error}") from error
    if not lines:
        raise SensorError(f"trace {path} is empty: its first line names the columns, time_s first")
    columns = [name.strip() for name in lines[0]]
    unknown = [name for name in columns if name not in _TYPES]
    if unknown:
        raise SensorError(f"trace {path}: unknown columns {unknown}; there are {', '.join(_TYPES)}")
    if columns[0] != "time_s" or len(set(columns)) != len(columns):
        raise SensorError(
            f"trace {path}: columns are {columns}, time_s first and each once is needed"
        )
    rows: list[Readings] = []
    for number, cells in enumerate(lines[1:], start=2):
        if not cells:
            continue
        place = f"trace {path}, line {number}"
        if len(cells) != len(columns):
            raise SensorError(f"{place}: {len(cells)} cells, the header has {len(columns)}")
        row = _row(place, columns, cells)
        if rows and row.time_s <= rows[-1].time_s:
            raise SensorError(
                f"{place}: time_s {row.time_s:g} does not come after "
                f"{rows[-1].time_s:g}: sort the rows"
            )
        rows.append(row)
    if not rows:
        raise SensorError(f"trace {path} has no rows: the least is one")
    return rows


def _row(place: str, columns: list[str], cells: list[str]) -> Readings:
    values: dict[str, Any] = {}
    for name, cell in zip(columns, (cell.strip() for cell in cells), strict=True):
        if cell or name == "time_s":
            values[name] = _value(place, name, cell)
    if {"power_w", "energy_j"} & set(values):
        values.setdefault("power_source", "mock")
    return Readings(**values)


def _value(place: str, name: str, cell: str) -> float | int | bool | str:
    kind = _TYPES[name]
    if kind == "str":
        return cell
    try:
        value = float(cell)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise SensorError(f"{place}: {name} is {cell!r}, a number is needed")
    if value < 0 and name not in ("time_s", "temperature_c"):
        raise SensorError(f"{place}: {name} is {cell}, the least is 0")
    if kind == "bool":
        if value not in (0, 1):
            raise SensorError(f"{place}: {name} is {cell}, 0 or 1 is needed")
        return bool(value)
    if kind == "int":
        if not value.is_integer():
            raise SensorError(f"{place}: {name} is {cell}, a whole number is needed")
        return int(value)
    return value
