"""The socket of a session that is monitored, and what reads it.

Who connects is sent the status, one line of JSON, and the connection is closed: nothing that a peer
sends is ever read, and nothing can be changed through it. One thread answers, one peer after
another, each for a second at most, so a peer that hangs costs other peers a second and the session
nothing. Only the session's own user can connect.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import socket
import stat
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import NoMonitorError, StorageError
from ..telemetry import logger

__all__ = ["StatusServer", "find_sockets", "read_status", "socket_folder"]

_PEER_S = 1.0
"""Most time that a peer is given."""

_READ_S = 5.0
_MOST_BYTES = 16 << 20
_SUFFIX = ".sock"
_CREDENTIALS = struct.Struct("3i")

_numbers = itertools.count(1)
"""Of the sessions of this process."""


def socket_folder() -> Path:
    """Where sockets are: bapq in XDG_RUNTIME_DIR, or /tmp/bapq-<uid> where there is none."""
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    if os.path.isdir(runtime):
        return Path(runtime) / "bapq"
    return Path("/tmp") / f"bapq-{os.getuid()}"


def _check_own(folder: Path) -> None:
    """Raise StorageError unless it is a directory that is ours alone."""
    status = os.lstat(folder)
    private = stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid()
    if not private or stat.S_IMODE(status.st_mode) & 0o077:
        raise StorageError(
            f"{folder} is not a directory of yours alone: remove it, or set XDG_RUNTIME_DIR"
        )


class StatusServer:
    """Answers every peer with the status, on a thread of its own, until it is closed."""

    def __init__(self, tell: Callable[[], dict[str, Any] | None]) -> None:
        """Listen. `tell` gives the status, None once the session is closed.

        Raises StorageError where there can be no socket.
        """
        folder = socket_folder()
        self._tell = tell
        self.path = folder / f"{os.getpid()}-{next(_numbers)}{_SUFFIX}"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            folder.mkdir(mode=0o700, exist_ok=True)
            _check_own(folder)
            self.path.unlink(missing_ok=True)  # of an earlier process of that number
            self._socket.bind(str(self.path))
            self.path.chmod(0o600)
            self._socket.listen()
        except OSError as error:
            self._socket.close()
            if isinstance(error, StorageError):
                raise
            raise StorageError(
                f"{self.path}: no socket for the monitor: {error.strerror or error}: open the "
                "session without it, or set XDG_RUNTIME_DIR"
            ) from error
        self._thread = threading.Thread(target=self._serve, name="bapq-monitor", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Answer no more. Called from the server's own thread it does not wait for it."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes the thread
        if self._thread is not threading.current_thread():
            self._thread.join()
        self._socket.close()
        with contextlib.suppress(OSError):
            self.path.unlink()

    def _serve(self) -> None:
        while True:
            try:
                peer, _ = self._socket.accept()
            except OSError:  # closed
                return
            with peer:
                try:
                    self._answer(peer)
                except OSError as error:
                    logger.debug("monitor: a peer went away: %s", error)
                except Exception:
                    logger.exception("monitor: the status cannot be told")

    def _answer(self, peer: socket.socket) -> None:
        data = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        _, user, _ = _CREDENTIALS.unpack(data)
        if user not in (0, os.getuid()):
            return
        peer.settimeout(_PEER_S)
        status = self._tell()
        if status is not None:
            peer.sendall(json.dumps(status).encode() + b"\n")


def find_sockets() -> list[Path]:
    """Sockets of sessions that live, by process and age; those that dead ones left are removed.

    Raises StorageError where the folder is not the user's own.
    """
    folder = socket_folder()
    if not folder.exists():
        return []
    _check_own(folder)
    found = []
    for path in folder.glob(f"*{_SUFFIX}"):
        pid, _, number = path.stem.partition("-")
        if pid.isdecimal() and number.isdecimal() and _is_heard(path):
            found.append((int(pid), int(number), path))
    return [path for _, _, path in sorted(found)]


def _is_heard(path: Path) -> bool:
    """Whether a process listens; where none does any more, the socket is removed."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as channel:
            channel.settimeout(_PEER_S)
            channel.connect(str(path))
    except ConnectionRefusedError:
        path.unlink(missing_ok=True)
        return False
    except OSError:
        return False
    return True


def read_status(path: Path) -> dict[str, Any]:
    """The status that a session tells. Raises NoMonitorError where none does."""
    data = bytearray()
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as channel:
            channel.settimeout(_READ_S)
            channel.connect(str(path))
            while (part := channel.recv(1 << 16)) and len(data) < _MOST_BYTES:
                data += part
        status = json.loads(data)
    except (OSError, ValueError) as error:
        raise NoMonitorError(
            f"{path}: no session tells its status there: {error}: it was closed, or is no monitor"
        ) from error
    if not isinstance(status, dict) or "protocol" not in status:
        raise NoMonitorError(f"{path}: what answers there is no session")
    return status
