"""A power meter of the user's, which writes lines to a file or a socket (docs/how-to/profiling.md).

1764128345.12 2.31         seconds since 1970, watts
1764128345.37 0.42 usb     the same for one rail of several, which are added
# source UM25C             also scope and error_percent, before the first sample
"""

from __future__ import annotations

import contextlib
import math
import os
import socket
import time
from collections import deque
from collections.abc import Callable

from ..errors import SensorError
from ..input_files import input_file_errors
from .power import Power

__all__ = ["PowerFeed", "open_feed"]

_GONE_S = 10.0
"""A meter that has been silent for so long is taken for gone."""
_TAIL_BYTES = 4096
_CONNECT_S = 5.0


class PowerFeed:
    """Integrates the samples of every rail, whatever their rates, by trapezoids."""

    def __init__(
        self,
        receive: Callable[[], bytes],
        close: Callable[[], object],
        name: str,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`receive` gives what has come since the last call; `clock` is that of the samples."""
        self._receive = receive
        self.close = close
        self._clock = clock
        self._rest = b""
        self._rails: dict[str, _Rail] = {}
        self._facts = {"source": name, "scope": "as the meter is wired", "error_percent": ""}

    def read(self) -> Power | None:
        """Power now, and the energy up to the last moment that all rails tell of.

        None while there is no sample, after 10 s without one, and once after a line that is none.
        """
        try:
            received = self._receive()
        except OSError:
            return None
        *lines, self._rest = (self._rest + received).split(b"\n")
        if not all([self._take(line.decode("utf-8", "replace").strip()) for line in lines]):
            return None
        if not self._rails:
            return None
        rails = list(self._rails.values())
        end_s = min(rail.last_s for rail in rails)
        age_s = self._clock() - end_s
        if age_s > _GONE_S:
            return None
        percent = self._facts["error_percent"]
        return Power(
            sum(rail.last_w for rail in rails),
            self._facts["source"],
            self._facts["scope"],
            float(percent) if percent else None,
            max(age_s, 0.0),
            sum(rail.joules_at(end_s) for rail in rails),
        )

    def _take(self, line: str) -> bool:
        """Take a line in; whether it is one of the protocol."""
        if not line:
            return True
        if line.startswith("#"):
            key, _, value = line[1:].strip().partition(" ")
            if key in self._facts and (key != "error_percent" or _number(value) is not None):
                self._facts[key] = value.strip()
            return True
        words = line.replace(",", " ").split()
        numbers = [_number(word) for word in words[:2]]
        time_s, watts = numbers if len(numbers) == 2 else (None, None)
        if time_s is None or watts is None or len(words) > 3:
            return False
        rail = self._rails.setdefault(words[2] if len(words) == 3 else "", _Rail())
        rail.add(time_s, watts)
        return True


class _Rail:
    """The samples of one rail as counted energy."""

    def __init__(self) -> None:
        self._points: deque[tuple[float, float]] = deque()  # (time, joules until then)
        self.last_s = 0.0
        self.last_w = 0.0

    def add(self, time_s: float, watts: float) -> None:
        if self._points and time_s <= self.last_s:
            return  # a clock that was set back, or a line again
        joules = 0.0
        if self._points:
            joules = self._points[-1][1] + (time_s - self.last_s) * (self.last_w + watts) / 2
        self._points.append((time_s, joules))
        self.last_s, self.last_w = time_s, watts

    def joules_at(self, time_s: float) -> float:
        """What was counted until then; never asked for an earlier moment afterwards."""
        while len(self._points) > 1 and self._points[1][0] <= time_s:
            self._points.popleft()
        first_s, joules = self._points[0]
        if len(self._points) == 1 or time_s <= first_s:
            return joules
        next_s, after = self._points[1]
        return joules + (after - joules) * (time_s - first_s) / (next_s - first_s)


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def open_feed(setting: str) -> PowerFeed:
    """The meter of BAPQ_POWER: file:PATH, socket:PATH or socket:HOST:PORT. Raises SensorError."""
    kind, _, place = setting.partition(":")
    if kind == "file" and place:
        return _open_file(place)
    if kind == "socket" and place:
        return _open_socket(place)
    raise SensorError(
        f"BAPQ_POWER is {setting!r}; it can be file:PATH, socket:PATH or socket:HOST:PORT, or not "
        "be set"
    )


def _open_file(path: str) -> PowerFeed:
    with input_file_errors(path):
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    skips = False
    with contextlib.suppress(OSError):  # a pipe has no end to go to
        size = os.lseek(descriptor, 0, os.SEEK_END)
        head = os.pread(descriptor, _TAIL_BYTES, 0)
        skips = size > _TAIL_BYTES
        os.lseek(descriptor, max(0, size - _TAIL_BYTES), os.SEEK_SET)

    def receive() -> bytes:
        nonlocal skips
        parts = []
        with contextlib.suppress(BlockingIOError):
            while part := os.read(descriptor, 1 << 16):
                parts.append(part)
        received = b"".join(parts)
        if skips:  # what is before the tail: its remarks only, and no part of a line
            skips = False
            remarks = [line for line in head.split(b"\n") if line.startswith(b"#")]
            received = b"\n".join([*remarks, received.partition(b"\n")[2]])
        return received

    return PowerFeed(receive, lambda: os.close(descriptor), f"file {os.path.basename(path)}")


def _open_socket(place: str) -> PowerFeed:
    host, _, port = place.rpartition(":")
    network = bool(host) and port.isdigit() and "/" not in place
    connection = socket.socket(socket.AF_INET if network else socket.AF_UNIX)
    connection.settimeout(_CONNECT_S)
    try:
        connection.connect((host, int(port)) if network else place)
    except OSError as error:
        connection.close()
        raise SensorError(
            f"BAPQ_POWER names the socket {place}, which cannot be reached ({error}): start the "
            "meter's program first"
        ) from error
    connection.setblocking(False)

    def receive() -> bytes:
        parts = []
        with contextlib.suppress(BlockingIOError):
            while part := connection.recv(1 << 16):
                parts.append(part)
        return b"".join(parts)

    return PowerFeed(receive, connection.close, f"socket {place}")
