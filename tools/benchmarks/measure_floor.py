"""One measurement of a bank's memory, in a process of its own; `memory_floor.py` starts them.

    PYTHONPATH=tools python -m benchmarks.measure_floor smallest|steps|activations BANK
    PYTHONPATH=tools python -m benchmarks.measure_floor growth BANK BUDGET_BYTES

Level 8 and one thread throughout. What is printed is JSON, in bytes.
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
import warnings
from typing import Any

import numpy as np

from bapq_edge import Session
from bapq_edge.bank.reader import Bank
from bapq_edge.engine.executor import execute
from bapq_edge.engine.graph import Graph, Graphs, open_graph
from bapq_edge.engine.store import Store
from bapq_edge.errors import BudgetTooSmallError
from bapq_edge.planning.planner import Request, chunk_costs, plan, smallest_limit
from bapq_edge.telemetry import peak_rss_bytes, rss_bytes

RUNS = 12
OPEN_LENGTH = 64
"""Of an open axis that is not the first: the tokens of a sentence."""
VIEWS = {"Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity"}
"""Operators whose output is their input's memory."""


def smallest(bank_path: str) -> int:
    """The smallest budget that errors name: that of opening, or that of runs on these inputs."""
    found = []
    try:
        Session(bank_path, memory_budget="1MiB", level=8, threads=1)
    except BudgetTooSmallError as error:
        found.append(_named(error))
    with Session(bank_path, memory_budget="1GiB", level=8, threads=1) as session:
        for _ in range(RUNS):
            session.run(None, _feed(session.get_inputs()))
        try:
            session.set_memory_budget("1MiB")
        except BudgetTooSmallError as error:
            found.append(_named(error))
    return max(found)


def growth(bank_path: str, budget_bytes: str) -> int:
    """Growth of the peak over 12 runs in a budget; a warning, such as of its excess, fails."""
    warnings.simplefilter("error")
    gc.collect()
    before_bytes = rss_bytes()
    session = Session(bank_path, memory_budget=int(budget_bytes), level=8, threads=1)
    feed = _feed(session.get_inputs())
    for _ in range(RUNS):
        session.run(None, feed)
    return peak_rss_bytes() - before_bytes


def steps(bank_path: str) -> dict[str, int]:
    """Memory that each step takes, with weights streamed and nothing pinned."""
    gc.collect()
    start = _memory()
    bank = Bank.open(bank_path)
    store = Store(bank)
    costs, request = chunk_costs(bank), Request(level=8)
    limit = smallest_limit(costs, request)
    made = plan(costs, Request(level=8, weight_bytes_limit=limit))
    store.publish(made.levels, made.pinned, made.ring_bytes, 0, 1)
    opened = _memory()
    graphs = Graphs(bank, store, 1, split=False)
    loading_peak_bytes = peak_rss_bytes() - start["VmRSS"]
    loaded = _memory()
    feed = _feed(graphs.inputs)
    for _ in range(RUNS):
        _, report = execute(store, graphs["whole"], feed)
    end = _memory()
    assert report is not None
    bank_bytes = opened["VmRSS"] - start["VmRSS"]
    objects_bytes = loaded["RssAnon"] - opened["RssAnon"]
    in_runs_bytes = end["RssAnon"] - loaded["RssAnon"]
    return {
        "bank_bytes": bank_bytes,
        "loading_peak_bytes": loading_peak_bytes,
        "objects_bytes": objects_bytes,
        "code_bytes": end["RssFile"] - opened["RssFile"],
        "in_runs_bytes": in_runs_bytes,
        "weight_bytes": report.weight_bytes,
        "scratch_bytes": store.stats().scratch_bytes,
        "all_bytes": end["VmRSS"] - start["VmRSS"],
        "anonymous_bytes": end["RssAnon"] - start["RssAnon"],
        "free_bytes": _free_heap_bytes(),
    }


def activations(bank_path: str) -> int:
    """The most that tensors take which are needed at once, in the order of the graph's nodes.

    Nothing is written in place; views take nothing.
    """
    import onnx

    bank = Bank.open(bank_path)
    model = onnx.load_from_string(bank.graph_bytes())
    nodes = model.graph.node
    outputs = {value.name for value in model.graph.output}
    made = [name for node in nodes for name in node.output if name]
    model.graph.output.extend(onnx.ValueInfoProto(name=n) for n in made if n not in outputs)
    store = Store(bank)
    costs = chunk_costs(bank)
    full = plan(costs, Request(level=8))
    store.publish(full.levels, full.pinned, full.ring_bytes, None, 1)
    graph = Graph(open_graph(model.SerializeToString(), store, 1), bank_path)
    values, _ = execute(store, graph, _feed(graph.inputs))

    memory_of: dict[str, str] = {}  # a view's is that of the tensor that it shows
    last_use: dict[str, int] = {}
    for number, node in enumerate(nodes):
        for name in node.input:
            last_use[memory_of.get(name, name)] = number
        if node.op_type in VIEWS:
            memory_of[node.output[0]] = memory_of.get(node.input[0], node.input[0])
    alive: dict[str, int] = {}
    most = 0
    for number, node in enumerate(nodes):
        alive |= {n: values[n].nbytes for n in node.output if n and n not in memory_of}
        most = max(most, sum(alive.values()))
        alive = {n: size for n, size in alive.items() if last_use.get(n, -1) > number}
    return most


def _feed(inputs: Any) -> dict[str, np.ndarray]:
    types = {"tensor(float)": np.float32, "tensor(int64)": np.int64}
    feed = {}
    for value in inputs:
        shape = [
            size if isinstance(size, int) else OPEN_LENGTH if axis else 1
            for axis, size in enumerate(value.shape)
        ]
        feed[value.name] = np.zeros(shape, types[value.type])
    return feed


def _named(error: BudgetTooSmallError) -> int:
    return int(str(error).split("the smallest that works is ")[1].split()[0])


def _memory() -> dict[str, int]:
    with open("/proc/self/status", encoding="ascii") as status:
        fields = (line.split() for line in status if line.startswith(("VmRSS", "Rss")))
        return {field[0].rstrip(":"): int(field[1]) * 1024 for field in fields}


class _MallocInfo(ctypes.Structure):
    """The C library's `struct mallinfo2`."""

    _fields_ = (
        ("heap_and_what_is_known_of_it", ctypes.c_size_t * 8),
        ("fordblks", ctypes.c_size_t),
        ("keepcost", ctypes.c_size_t),
    )


def _free_heap_bytes() -> int:
    """What glibc's main heap holds and nobody uses."""
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = _MallocInfo
    return int(mallinfo2().fordblks)


if __name__ == "__main__":
    kind, *rest = sys.argv[1:]
    kinds = {f.__name__: f for f in (smallest, growth, steps, activations)}
    print(json.dumps(kinds[kind](*rest)))
