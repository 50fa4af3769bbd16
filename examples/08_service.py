"""A service on loopback: POST an image to /classify, GET /stats. 08_service.py [PORT]"""

import dataclasses
import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import banks
import numpy as np

import bapq_edge

bank, images, _ = banks.digits()
session = bapq_edge.Session(bank, memory_budget="32MiB", controller="auto")


class Handler(BaseHTTPRequestHandler):
    """64 float32 values in, the class out; runs of several clients go on side by side."""

    def do_POST(self) -> None:
        """Classify."""
        pixels = np.frombuffer(self.rfile.read(int(self.headers["Content-Length"])), np.float32)
        if pixels.size != 64:
            return self.send_error(400, f"{pixels.size} values, 64 are needed")
        (logits,) = session.run(None, {"image": pixels.reshape(1, 1, 8, 8)})
        self.answer({"class": int(logits.argmax())})

    def do_GET(self) -> None:
        """Tell memory, precision and counts."""
        self.answer(dataclasses.asdict(session.stats()))

    def answer(self, content: dict[str, object]) -> None:
        """Send JSON."""
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(content).encode())


with session, ThreadingHTTPServer(("127.0.0.1", int(([*sys.argv, "8017"])[1])), Handler) as server:
    server.serve_forever()
