"""A service: POST an image to /classify, GET /stats, GET /metrics. Watch it: `bapq monitor`."""

import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import banks
import numpy as np

import bapq_edge
from bapq_edge.live.status import to_prometheus

bank, _, _ = banks.digits()
session = bapq_edge.Session(bank, memory_budget="32MiB", controller="auto", monitor=True)


class Handler(BaseHTTPRequestHandler):
    """64 float32 values in, the class out; runs of several clients go on side by side."""

    def do_POST(self) -> None:
        """Classify."""
        pixels = np.frombuffer(self.rfile.read(int(self.headers["Content-Length"])), np.float32)
        if pixels.size != 64:
            return self.send_error(400, f"{pixels.size} values, 64 are needed")
        (logits,) = session.run(None, {"image": pixels.reshape(1, 1, 8, 8)})
        self._answer(json.dumps({"class": int(logits.argmax())}))

    def do_GET(self) -> None:
        """Tell memory, precision and counts, to people or to Prometheus."""
        status = session.status()
        self._answer(to_prometheus([status]) if self.path == "/metrics" else json.dumps(status))

    def _answer(self, text: str) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(text.encode())


with session, ThreadingHTTPServer(("127.0.0.1", int(([*sys.argv, "8017"])[1])), Handler) as server:
    server.serve_forever()
