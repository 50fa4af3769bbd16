"""ONNX Runtime's memory settings: what the process grew by after 1, 2 and 12 runs of a bank.

    PYTHONPATH=tools python -m benchmarks.arena [MODEL ...] [--format table|md]

Each row is a process of its own; all weights are streamed, level 8, one thread.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from .tables import add_format, print_table

RUNS = (1, 2, 12)


def measure(bank_path: str, arena: bool, patterns: bool) -> list[int]:
    """Growth of the process's peak after each of RUNS, in bytes."""
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
    options.enable_cpu_mem_arena = arena
    options.enable_mem_pattern = patterns
    options.register_custom_ops_library(str(library_path()))
    session = onnxruntime.InferenceSession(
        bank.graph_bytes(), options, providers=["CPUExecutionProvider"]
    )
    graph = Graph(session, bank_path)
    costs, request = chunk_costs(bank), Request(level=8)
    limit = smallest_limit(costs, request)
    made = plan(costs, Request(level=8, weight_bytes_limit=limit))
    store.publish(made.levels, made.pinned, made.ring_bytes, 0, 1)
    feed = zeros(graph.inputs) or {}
    grown = []
    for run in range(1, max(RUNS) + 1):
        execute(store, graph, feed)
        if run in RUNS:
            grown.append(peak_rss_bytes() - before_bytes)
    return grown


def main() -> None:
    """Build each model's bank, measure the four settings, print the table."""
    from bapq_tools import build_bank
    from benchmarks.zoo import make_model

    parser = argparse.ArgumentParser(prog="benchmarks.arena")
    parser.add_argument("models", nargs="*", default=["resnet50", "densenet121"], metavar="MODEL")
    add_format(parser)
    arguments = parser.parse_args()
    rows = []
    for name in arguments.models:
        with tempfile.TemporaryDirectory() as folder:
            model, bank = Path(folder, "model.onnx"), Path(folder, "model.bank")
            make_model(name, model)
            build_bank(model, bank, levels=(8,), progress=False)
            for arena, patterns in ((False, False), (False, True), (True, True), (True, False)):
                command = [sys.executable, "-m", __spec__.name, "--measure", bank]
                command += [str(int(arena)), str(int(patterns))]
                result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                sizes = [f"{size / 2**20:.1f}" for size in json.loads(result.stdout)]
                rows.append([name, _on(arena), _on(patterns), *sizes])
    heads = ["model", "arena", "memory patterns", *(f"MiB after {run}" for run in RUNS)]
    print_table("Growth of the process's peak, weights streamed", heads, rows, arguments.format)


def _on(value: bool) -> str:
    return "on" if value else "off"


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(measure(sys.argv[2], sys.argv[3] == "1", sys.argv[4] == "1")))
    else:
        main()
