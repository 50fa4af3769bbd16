"""The trace of a session: what it read, waited for and ran, as Chrome-trace JSON for Perfetto.

The format: https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU
"""

from __future__ import annotations

import json
import statistics
import tempfile
import threading
import time
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..bank.layout import PLANES
from ..engine.library import TRACE_EVENT, TRACE_KINDS
from ..sensors import Sensors, open_sensors
from ..session import Session
from ..telemetry import rss_bytes

__all__ = ["Recorder", "Summary"]

_CAPACITY = 1 << 15
"""Events between two runs: five times what a run can have on the 1988 chunks of MiniLM's bank."""
_SAMPLE_HZ = 20.0

_READ, _ROWS, _WAIT = (TRACE_KINDS.index(kind) for kind in ("read", "rows", "wait"))
_RUNS, _READER, _PLANS = 1, 2, 3
_TRACKS = {_RUNS: "runs, and what they wait for", _READER: "reader thread", _PLANS: "plans"}


@dataclass(frozen=True)
class Summary:
    """What a trace adds up to."""

    runs: int
    """Number of runs."""
    median_run_ms: float
    """Median time of a run."""
    wait_share: float
    """Share of the time in runs in which operators waited for chunks, or read rows themselves."""
    read_bytes: int
    """Bytes read from storage."""
    read_bytes_per_run: float
    """Bytes read from storage per run."""
    read_bytes_s: float
    """Bytes read per second, over the whole recording."""
    read_bytes_s_while_reading: float
    """Bytes read per second of reading."""
    waits_by_layer_ms: dict[str, float]
    """Time that all runs waited for each layer, the longest first."""
    lost_events: int
    """Events that found no room in the buffer; above 0 the trace has holes, sums are too small."""


class Recorder:
    """Runs a session and records it; one run at a time.

    with Recorder(session) as recorder:
        recorder.run(feed)
    summary = recorder.write(Path("trace.json"))

    What is recorded waits in a file without a name, so that the trace does not take memory that the
    session's budget would have to pay for.
    """

    def __init__(self, session: Session, *, sensors: Sensors | None = None) -> None:
        """`sensors` are the board's unless given; they are closed at the end of the recording."""
        self._session = session
        internals = session.internals
        self._store, self._bank, self._log = internals.store, internals.bank, internals.log
        self._sensors = open_sensors() if sensors is None else sensors
        self._spill = tempfile.TemporaryFile()  # noqa: SIM115  (closed by write)
        self._run_ns = array("q")  # start, end, ...
        self._samples: list[tuple[int, str, dict[str, float]]] = []
        self._lost = 0
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="bapq-profile", daemon=True)

    def __enter__(self) -> Recorder:
        """Begin to record."""
        self._start_ns = time.monotonic_ns()
        self._store.trace_start(_CAPACITY)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        """End the recording; the session stays open."""
        self._stopping.set()
        self._thread.join()
        self._sensors.close()
        self._drain()
        self._store.trace_start(0)
        self._end_ns = time.monotonic_ns()

    def run(self, feed: Mapping[str, Any]) -> list[Any]:
        """Run the session, as `Session.run` with all outputs."""
        start_ns = time.monotonic_ns()
        outputs = self._session.run(None, feed)
        self._run_ns.extend((start_ns, time.monotonic_ns()))
        self._drain()
        return outputs

    def _drain(self) -> None:
        events, self._lost = self._store.trace_read()
        self._spill.write(events.tobytes())

    def _watch(self) -> None:
        while True:
            readings = self._sensors.read()
            store = self._store.stats()
            memory = {
                "process": rss_bytes(),
                "pinned weights": store.home_bytes,
                "ring": store.ring_bytes,
                "row cache": store.row_cache_bytes,
            }
            now_ns = time.monotonic_ns()
            others = (
                ("available MB", readings.available_bytes, 1e-6),
                ("temperature C", readings.temperature_c, 1.0),
                ("power W", readings.power_w, 1.0),
            )
            for part, size in memory.items():
                self._samples.append((now_ns, f"{part} MB", {"MB": size / 1e6}))
            for name, value, scale in others:
                if value is not None:
                    self._samples.append((now_ns, name, {name.split()[-1]: value * scale}))
            if self._stopping.wait(1 / _SAMPLE_HZ):
                return

    # ---- after the recording ----

    def write(self, path: Path) -> Summary:
        """Write the trace and add it up. Once only."""
        self._spill.seek(0)
        events = np.fromfile(self._spill, TRACE_EVENT)
        self._spill.close()
        summary = self._summary(events)
        with open(path, "w", encoding="utf-8") as out:
            out.write('{"displayTimeUnit": "ms",\n"otherData": ')
            json.dump({"start_monotonic_ns": self._start_ns, "lost_events": self._lost}, out)
            out.write(',\n"traceEvents": [\n')
            for i, entry in enumerate(self._entries(events)):
                out.write(",\n" if i else "")
                json.dump(entry, out)
            out.write("\n]}\n")
        return summary

    def _entries(self, events: NDArray[np.void]) -> Iterator[dict[str, Any]]:
        for track, name in _TRACKS.items():
            common = {"ph": "M", "pid": 1, "tid": track}
            yield {**common, "name": "thread_name", "args": {"name": name}}
            yield {**common, "name": "thread_sort_index", "args": {"sort_index": track}}
        for number in range(0, len(self._run_ns), 2):
            start_ns, end_ns = self._run_ns[number : number + 2]
            yield self._slice(_RUNS, f"run {number // 2 + 1}", start_ns, end_ns, {})
        for event in events:
            kind, chunk = int(event["kind"]), int(event["chunk"])
            layer = self._bank.layer_of(chunk)
            name = f"{layer.name} #{chunk - layer.first_chunk}"
            track = _READER if kind == _READ else _RUNS
            details: dict[str, Any] = {"chunk": chunk}
            if kind != _WAIT:
                details["plane"] = tuple(PLANES)[event["plane"]]
                details["bytes"] = int(event["bytes"])
            if event["status"]:
                details["failed"] = True
            title = {_READ: name, _ROWS: f"read rows of {name}", _WAIT: f"wait for {name}"}[kind]
            yield self._slice(track, title, int(event["start_ns"]), int(event["end_ns"]), details)
        opened_ns = int(self._log.opened_s * 1e9)
        for change in self._log.events():
            happened_ns = opened_ns + int(change.time_s * 1e9)
            if self._start_ns <= happened_ns <= self._end_ns:
                common = {"ph": "i", "s": "p", "pid": 1, "tid": _PLANS}
                yield {
                    **common,
                    "name": change.kind,
                    "ts": self._microseconds(happened_ns),
                    "args": {
                        "reason": change.reason,
                        "bits_per_weight": change.bits_per_weight,
                        "weight_bytes": change.weight_bytes,
                    },
                }
        for sampled_ns, name, values in self._samples:
            common = {"ph": "C", "pid": 1, "name": name}
            yield {**common, "ts": self._microseconds(sampled_ns), "args": values}

    def _slice(
        self, track: int, name: str, start_ns: int, end_ns: int, details: dict[str, Any]
    ) -> dict[str, Any]:
        return {
            "ph": "X",
            "pid": 1,
            "tid": track,
            "name": name,
            "ts": self._microseconds(start_ns),
            "dur": (end_ns - start_ns) / 1e3,
            "args": details,
        }

    def _microseconds(self, time_ns: int) -> float:
        return (time_ns - self._start_ns) / 1e3

    def _summary(self, events: NDArray[np.void]) -> Summary:
        runs_ns = np.diff(np.array(self._run_ns, np.int64).reshape(-1, 2))[:, 0]
        took_ns = events["end_ns"] - events["start_ns"]
        waits = events["kind"] != _READ
        by_layer: dict[str, float] = {}
        for layer in self._bank.manifest.layers:
            chunks = range(layer.first_chunk, layer.first_chunk + layer.chunk_count)
            mine = waits & (events["chunk"] >= chunks.start) & (events["chunk"] < chunks.stop)
            if mine.any():
                by_layer[layer.name] = float(took_ns[mine].sum() / 1e6)
        longest_first = sorted(by_layer.items(), key=lambda item: -item[1])
        read_bytes, reading_ns = int(events["bytes"].sum()), int(took_ns[events["bytes"] > 0].sum())
        run_ns = int(runs_ns.sum())
        return Summary(
            runs=len(runs_ns),
            median_run_ms=statistics.median(runs_ns.tolist()) / 1e6 if len(runs_ns) else 0.0,
            wait_share=float(took_ns[waits].sum()) / run_ns if run_ns else 0.0,
            read_bytes=read_bytes,
            read_bytes_per_run=read_bytes / max(1, len(runs_ns)),
            read_bytes_s=read_bytes * 1e9 / (self._end_ns - self._start_ns),
            read_bytes_s_while_reading=read_bytes * 1e9 / max(1, reading_ns),
            waits_by_layer_ms=dict(longest_first),
            lost_events=self._lost,
        )
