"""Arenas for tensors: what the process grew by after 1, 2 and 12 runs of a bank, and their time.

    PYTHONPATH=tools python -m benchmarks.arena [MODEL ...] [--format table|md]

Each row is a process of its own; all weights are streamed, level 8, one thread. Times are those of
that thread: the turns of other programs do not count.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from .tables import add_format, print_table

RUNS = (1, 2, 12)

ARENAS = {
    "ours": "libbapq's",
    "doubling": "ONNX Runtime's",
    "patterns": "ONNX Runtime's, with memory patterns",
    "as_requested": "ONNX Runtime's, kSameAsRequested",
    "off": "none",
    "off_mapped": "none, malloc maps blocks from 64 KiB on",
}
_M_MMAP_THRESHOLD = -3


def measure(bank_path: str, arena: str) -> dict[str, Any]:
    """Growth of the process's peak after each of RUNS, in bytes, and a run's median time."""
    import onnxruntime

    from bapq_edge.bank.reader import Bank
    from bapq_edge.engine.executor import execute
    from bapq_edge.engine.feeds import zeros
    from bapq_edge.engine.graph import Graph
    from bapq_edge.engine.library import library_path
    from bapq_edge.engine.store import Store
    from bapq_edge.planning.planner import Request, chunk_costs, plan, smallest_limit
    from bapq_edge.telemetry import peak_rss_bytes, rss_bytes

    before_bytes = rss_bytes()
    bank = Bank.open(bank_path)
    store = Store(bank)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.enable_cpu_mem_arena = not arena.startswith("off")
    options.enable_mem_pattern = arena == "patterns"
    options.register_custom_ops_library(str(library_path()))
    if arena == "as_requested":
        kinds, places = onnxruntime.OrtAllocatorType, onnxruntime.OrtMemType
        memory = onnxruntime.OrtMemoryInfo("Cpu", kinds.ORT_ARENA_ALLOCATOR, 0, places.DEFAULT)
        settings = onnxruntime.OrtArenaCfg({"arena_extend_strategy": 1})
        onnxruntime.create_and_register_allocator(memory, settings)  # in the place of ours
    if arena in ("ours", "as_requested"):
        options.add_session_config_entry("session.use_env_allocators", "1")
    if arena == "off_mapped":
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 64 << 10)
    with store.owning_operators():
        session = onnxruntime.InferenceSession(
            bank.graph_bytes(), options, providers=["CPUExecutionProvider"]
        )
    graph = Graph(session, bank_path)
    costs, request = chunk_costs(bank), Request(level=8)
    limit = smallest_limit(costs, request)
    made = plan(costs, Request(level=8, weight_bytes_limit=limit))
    store.publish(made.levels, made.pinned, made.ring_bytes, 0, 1)
    feed = zeros(graph.inputs) or {}
    grown, times_s = [], []
    for run in range(1, max(RUNS) + 1):
        started_s = time.thread_time()
        execute(store, graph, feed)
        times_s.append(time.thread_time() - started_s)
        if run in RUNS:
            grown.append(peak_rss_bytes() - before_bytes)
    return {"growth_bytes": grown, "run_s": statistics.median(times_s)}


def main() -> None:
    """Build each model's bank, measure all arenas, print the table."""
    from bapq_tools import build_bank
    from benchmarks.zoo import make_model

    parser = argparse.ArgumentParser(prog="benchmarks.arena")
    parser.add_argument("models", nargs="*", default=["resnet50", "squeezenet"], metavar="MODEL")
    add_format(parser)
    arguments = parser.parse_args()
    rows = []
    for name in arguments.models:
        with tempfile.TemporaryDirectory() as folder:
            model, bank = Path(folder, "model.onnx"), Path(folder, "model.bank")
            make_model(name, model)
            build_bank(model, bank, levels=(8,), progress=False)
            for arena, words in ARENAS.items():
                command = [sys.executable, "-m", __spec__.name, "--measure", bank, arena]
                result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                found = json.loads(result.stdout)
                sizes = [f"{size / 2**20:.1f}" for size in found["growth_bytes"]]
                rows.append([name, words, *sizes, f"{found['run_s'] * 1e3:.0f} ms"])
    heads = ["model", "arena", *(f"MiB after {run}" for run in RUNS), "a run"]
    print_table("Growth of the process's peak, weights streamed", heads, rows, arguments.format)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(measure(sys.argv[2], sys.argv[3])))
    else:
        main()
