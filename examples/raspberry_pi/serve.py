"""A bank as a service on localhost, for systemd (bapq-serve.service).

POST /run    an .npz of the model's inputs in, an .npz of its outputs out
GET  /stats  statistics and the last events, as JSON
GET  /metrics  the same for Prometheus

The runs of all clients queue on the session's one thread: each has all cores, and the memory of one
at a time is all there is. The watchdog's own run queues with them. It is systemd that restarts: the
service only says that it lives, and only while runs come to an end.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import os
import select
import signal
import socket
import sys
import threading
import warnings
import zipfile
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np

import bapq_edge
from bapq_edge.errors import DegradedWarning, RequestError
from bapq_edge.live.status import to_prometheus

BODY_LIMIT_BYTES = 16 << 20
EVENTS_SHOWN = 20
STATUS_PERIOD_S = 30.0


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def notify(*lines: str) -> None:
    """Tell systemd, where it started us; the protocol is in sd_notify(3)."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):  # an abstract name: no file
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel, suppress(OSError):
        channel.connect(address)  # that nobody listens is no reason to stop
        channel.sendall("\n".join(lines).encode())


def catch_signals() -> socket.socket:
    """A socket that is readable once SIGTERM or SIGINT came, whichever thread it hit."""
    readable, written = socket.socketpair()
    written.setblocking(False)
    signal.set_wakeup_fd(written.detach())
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    return readable


def zeros(session: bapq_edge.Session) -> dict[str, np.ndarray]:
    """A feed of zeros; an open axis has length 1."""
    feed = {}
    for value in session.get_inputs():
        kind = value.type.removeprefix("tensor(").removesuffix(")")
        shape = [size if isinstance(size, int) else 1 for size in value.shape]
        feed[value.name] = np.zeros(shape, "float32" if kind == "float" else kind)
    return feed


def read_arrays(body: bytes) -> dict[str, np.ndarray]:
    """The arrays of an .npz that may come from anybody. Raises RequestError."""
    try:
        with zipfile.ZipFile(io.BytesIO(body)) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > BODY_LIMIT_BYTES:
                raise ValueError(f"unpacks to more than {BODY_LIMIT_BYTES} bytes")
        with np.load(io.BytesIO(body), allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except Exception as error:  # a damaged archive raises nearly anything
        raise RequestError(f"the body is not an .npz of plain arrays: {error}") from error


class Handler(BaseHTTPRequestHandler):
    """One request."""

    server: Server
    timeout = 10  # a client that falls silent does not hold a thread for ever

    def do_POST(self) -> None:
        """Run the model."""
        self._answer({"/run": self._run})

    def do_GET(self) -> None:
        """Tell statistics and events, or metrics."""
        self._answer({"/stats": self._stats, "/metrics": self._metrics})

    def _answer(self, pages: dict[str, Callable[[], tuple[str, bytes]]]) -> None:
        try:
            if self.path not in pages:
                raise RequestError(f"there is no {self.path}: POST /run, GET /stats, GET /metrics")
            self._reply(200, *pages[self.path]())
        except RequestError as error:
            self._reply(400, "text/plain; charset=utf-8", f"{_one_line(error)}\n".encode())
        except (bapq_edge.BapqError, DegradedWarning) as error:
            self._reply(503, "text/plain; charset=utf-8", f"{_one_line(error)}\n".encode())

    def _run(self) -> tuple[str, bytes]:
        length = self.headers.get("Content-Length", "")
        if not (length.isdecimal() and len(length) < 20 and int(length) <= BODY_LIMIT_BYTES):
            raise RequestError(f"Content-Length is {length!r}, the most is {BODY_LIMIT_BYTES}")
        session = self.server.session
        outputs = session.submit(None, read_arrays(self.rfile.read(int(length)))).result()
        body = io.BytesIO()
        np.savez(body, **{v.name: y for v, y in zip(session.get_outputs(), outputs, strict=True)})
        return "application/octet-stream", body.getvalue()

    def _stats(self) -> tuple[str, bytes]:
        session = self.server.session
        shown: dict[str, Any] = dataclasses.asdict(session.stats())
        shown["events"] = [str(event) for event in session.events()[-EVENTS_SHOWN:]]
        return "application/json", json.dumps(shown).encode()

    def _metrics(self) -> tuple[str, bytes]:
        text = to_prometheus([self.server.session.status()])
        return "text/plain; version=0.0.4", text.encode()

    def _reply(self, status: int, kind: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_request(self, *_: object) -> None:
        """Nothing: the journal is on the card, too."""


class Server(ThreadingHTTPServer):
    """Listens on localhost."""

    daemon_threads = False  # closing waits for the answers that are under way

    def __init__(self, port: int, session: bapq_edge.Session) -> None:
        """Listen; `serve_forever` answers."""
        self.session = session
        super().__init__(("127.0.0.1", port), Handler)

    def status(self) -> str:
        """What `systemctl status` shows."""
        now = self.session.stats()
        return (
            f"STATUS=port {self.server_port}, {now.planned_bits_per_weight:.2f} bits per weight, "
            f"{now.resident_bytes / 2**20:.1f} MiB of weights in memory, {now.runs} runs"
        )


def serve(session: bapq_edge.Session, port: int, stop: socket.socket) -> None:
    """Answer until SIGTERM, and tell systemd how it goes."""
    probe = zeros(session)
    session.run(None, probe)
    watchdog_us = os.environ.get("WATCHDOG_USEC")
    period_s = int(watchdog_us) / 2e6 if watchdog_us else STATUS_PERIOD_S
    with Server(port, session) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            notify("READY=1", server.status())
            seen_runs, question = 0, None
            while not select.select([stop], [], [], period_s)[0]:
                runs = session.stats().runs
                if runs > seen_runs:  # one came to an end since we last looked
                    notify("WATCHDOG=1", server.status())
                    seen_runs = runs
                if question is None or question.done():
                    question = session.submit(None, probe)
            notify("STOPPING=1")
        finally:
            server.shutdown()


def main() -> int:
    """Parse the command line and serve; the exit code is the error's."""
    parser = argparse.ArgumentParser(description="answer with a bank on localhost")
    parser.add_argument("bank")
    parser.add_argument("--budget", default="auto", help="such as 64MiB, or auto (the default)")
    parser.add_argument("--level", default="auto", help="auto (the default), 32, 8, 4, 2 or 1")
    parser.add_argument("--port", type=int, default=8008, help="0 takes any that is free")
    options = parser.parse_args()
    stop = catch_signals()
    warnings.simplefilter("error", DegradedWarning)  # 503 rather than a worse answer
    try:
        with bapq_edge.Session(
            options.bank,
            memory_budget=options.budget,
            level=options.level,
            controller="auto",
            on_switch=lambda event: print(event, flush=True),
        ) as session:
            serve(session, options.port, stop)
    except (bapq_edge.BapqError, OSError) as error:
        print(f"serve: {_one_line(error)}", file=sys.stderr)
        return getattr(error, "exit_code", 1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
