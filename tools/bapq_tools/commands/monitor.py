"""The command `bapq monitor`: a running session, seen live."""

from __future__ import annotations

import argparse
import json
import time
from collections import deque
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from bapq_edge.errors import NoMonitorError, RequestError, StorageError
from bapq_edge.live.status import to_prometheus
from bapq_edge.live.status_socket import find_sockets, read_status, socket_folder

__all__ = ["StatusPages", "add_monitor_command"]

_PORT = 8042
_HISTORY = 600
_HOSTS = ("127.0.0.1", "localhost", "[::1]")
_EVENTS_SHOWN = 8


def add_monitor_command(commands: Any) -> None:
    """Add `monitor` to the subparsers of the `bapq` command."""
    monitor = commands.add_parser(
        "monitor", help="watch a running session that was opened with monitor=True"
    )
    monitor.add_argument(
        "session",
        nargs="?",
        metavar="PID",
        help="number of its process, or its socket (default: the only one there is)",
    )
    monitor.add_argument(
        "--interval",
        type=float,
        default=1.0,
        metavar="S",
        help="seconds from one look to the next (default: 1)",
    )
    monitor.add_argument("--once", action="store_true", help="show it once")
    form = monitor.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print a line of JSON at every look")
    form.add_argument(
        "--http",
        nargs="?",
        type=int,
        const=_PORT,
        metavar="PORT",
        help=f"serve a page, /status and /metrics on localhost (default: port {_PORT})",
    )
    monitor.set_defaults(command=_monitor)


def _monitor(arguments: argparse.Namespace) -> None:
    if not 0.05 <= arguments.interval <= 3600:
        raise RequestError(f"--interval is {arguments.interval:g}, it must be 0.05 to 3600 seconds")
    path = _chosen(arguments.session)
    first = read_status(path)
    if arguments.http is not None:
        _serve(path, arguments.http, arguments.interval)
    elif arguments.json or arguments.once:
        _print_looks(path, first, arguments)
    else:
        _watch(path, first, arguments.interval)


def _chosen(wanted: str | None) -> Path:
    """The socket of a process, or of the only session."""
    if wanted is not None and not wanted.isdecimal():
        return Path(wanted)
    found = [
        path for path in find_sockets() if wanted is None or path.name.startswith(f"{wanted}-")
    ]
    if not found:
        whose = f"process {wanted}" if wanted else "no process of yours"
        raise NoMonitorError(
            f"{socket_folder()}: {whose} has {'no' if wanted else 'a'} session with a monitor: "
            "open it with Session(monitor=True), or start the program with BAPQ_MONITOR=1"
        )
    if len(found) > 1:
        names = ", ".join(str(path) for path in found)
        raise RequestError(f"there are {len(found)} sessions, name one of them: {names}")
    return found[0]


def _print_looks(path: Path, status: dict[str, Any], arguments: argparse.Namespace) -> None:
    while True:
        if arguments.json:
            print(json.dumps(status), flush=True)
        else:
            from rich.console import Console

            Console().print(_screen(status))
        if arguments.once:
            return
        time.sleep(arguments.interval)
        status = read_status(path)


def _watch(path: Path, status: dict[str, Any], interval_s: float) -> None:
    from rich.live import Live

    try:
        with Live(_screen(status), screen=True, auto_refresh=False) as live:
            while True:
                live.update(_screen(status), refresh=True)
                time.sleep(interval_s)
                status = read_status(path)
    except NoMonitorError:
        print("the session was closed")


def _screen(status: dict[str, Any]) -> Any:
    """The status, for a terminal."""
    from rich.console import Group
    from rich.table import Table

    from ..report.live_sections import event_rows, layer_rows, reading_rows, state_rows

    def table(title: str, heads: list[str], rows: list[list[str]]) -> Any:
        drawn = Table(title=title, title_justify="left", show_header=bool(any(heads)), box=None)
        for head in heads:
            drawn.add_column(head, overflow="fold")
        for row in rows:
            drawn.add_row(*(_plain(cell) for cell in row))
        return drawn

    parts = [table("", ["", ""], [*state_rows(status), *reading_rows(status)])]
    changes = event_rows(status)[:_EVENTS_SHOWN]
    parts.append(table("Changes", ["seconds", "event", "bits", "cause"], changes))
    parts.append(table("Layers", ["layer", "level", "in memory"], layer_rows(status)))
    return Group(*parts)


def _plain(text: str) -> Any:
    """Text that the terminal shows as it is: names come out of banks."""
    from rich.text import Text

    return Text("".join(each if each.isprintable() else "?" for each in text))


# ---- over HTTP ----


def _serve(path: Path, port: int, interval_s: float) -> None:
    try:
        pages = StatusPages(path, port, interval_s)
    except (OSError, OverflowError) as error:
        raise StorageError(
            f"port {port} cannot be had: {error}: name another with --http"
        ) from None
    with pages:
        print(f"http://127.0.0.1:{pages.server_port}/, until you press Ctrl+C", flush=True)
        pages.serve_forever()


class StatusPages(ThreadingHTTPServer):
    """The page, the status and the metrics of a session, on localhost."""

    daemon_threads = True

    def __init__(self, path: Path, port: int, interval_s: float) -> None:
        """Listen; `serve_forever` answers. The page loads itself again after the interval."""
        self.path = path
        self.interval_s = interval_s
        self.history: deque[dict[str, Any]] = deque(maxlen=_HISTORY)
        super().__init__(("127.0.0.1", port), _Handler)

    def look(self) -> dict[str, Any]:
        """The status now, which history takes. Raises NoMonitorError."""
        status = read_status(self.path)
        self.history.append(status)
        return status


class _Handler(BaseHTTPRequestHandler):
    server: StatusPages
    timeout = 10

    def do_GET(self) -> None:
        """Answer."""
        host = self.headers.get("Host", "").rsplit(":", 1)[0]
        if host not in _HOSTS:  # another site's name that leads here
            self._reply(403, "text/plain", "this page is for localhost\n")
            return
        try:
            status = self.server.look()
        except NoMonitorError as error:
            self._reply(503, "text/plain", f"{error}\n")
            return
        if self.path == "/metrics":
            self._reply(200, "text/plain; version=0.0.4", to_prometheus([status]))
        elif self.path == "/status":
            self._reply(200, "application/json", json.dumps(status) + "\n")
        elif self.path == "/":
            self._reply(200, "text/html", self._page(status))
        else:
            self._reply(404, "text/plain", "there are /, /status and /metrics\n")

    def _page(self, status: dict[str, Any]) -> str:
        from ..report.live_sections import live_sections
        from ..report.page import page

        title = f"{status['bank']['model']}, process {status['pid']}"
        again_s = max(1, round(self.server.interval_s))
        return page(title, [*live_sections(list(self.server.history))], refresh_s=again_s)

    def _reply(self, code: int, kind: str, text: str) -> None:
        body = text.encode()
        self.send_response(code)
        self.send_header("Content-Type", kind if "version" in kind else f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Security-Policy", "default-src 'none'; style-src 'unsafe-inline'")
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(body)

    def log_request(self, *_: object) -> None:
        """Nothing: the page asks every second."""
