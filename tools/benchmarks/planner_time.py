"""Time of one plan, by number of chunks and kind of request, on random chunks.

PYTHONPATH=tools python -m benchmarks.planner_time [--format table|md]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time

import numpy as np

from bapq_edge.bank.layout import LEVELS
from bapq_edge.planning.planner import ChunkCosts, Request, plan
from bapq_edge.planning.timing import Speeds

from .tables import add_format, print_table

CHUNK_COUNTS = (500, 5_000, 50_000)
ROUNDS = 21


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="benchmarks.planner_time")
    add_format(parser)
    arguments = parser.parse_args()
    problems = [_random_problem(count) for count in CHUNK_COUNTS]
    requests = [_requests(costs) for costs in problems]
    rows = []
    for name in requests[0]:
        times = [
            _median_s(costs, request[name])
            for costs, request in zip(problems, requests, strict=True)
        ]
        rows.append([name, *(f"{1e3 * seconds:.1f} ms" for seconds in times)])
    heads = ["request", *(f"{count:,} chunks" for count in CHUNK_COUNTS)]
    print_table(f"One plan, {len(LEVELS)} levels", heads, rows, arguments.format)
    return 0


def _random_problem(chunks: int) -> ChunkCosts:
    rng = np.random.default_rng(chunks)
    weights = rng.integers(1, 20, chunks) * 16_384
    level_bytes = np.stack([weights * level // 8 + weights // 16 for level in LEVELS], axis=1)
    error = 10 ** rng.uniform(-4, 0, (chunks, 1)) * 3.0 ** -np.array(LEVELS)
    error = error * rng.uniform(0.5, 2, error.shape) * (np.array(LEVELS) != 32)
    return ChunkCosts(
        LEVELS,
        weights,
        level_bytes,
        error.astype(np.float32),
        np.zeros(chunks, np.bool_),
        np.tile(np.array(LEVELS, np.uint8), (chunks, 1)),
        np.full(chunks // 25, 25),
    )


def _requests(costs: ChunkCosts) -> dict[str, Request]:
    """Half the bytes of level 8 are allowed."""
    limit = int(costs.level_bytes[:, LEVELS.index(8)].sum()) // 2
    layer_s = np.full(len(costs.chunks_of_layer), 1 / len(costs.chunks_of_layer))
    speeds = Speeds(limit / 4, layer_s)
    return {
        "level 8, half of it streamed": Request(level=8, weight_bytes_limit=limit),
        "3.5 bits": Request(bits=3.5, weight_bytes_limit=limit),
        "auto": Request(weight_bytes_limit=limit),
        "auto, speeds known": Request(weight_bytes_limit=limit, max_slowdown=1.1, speeds=speeds),
    }


def _median_s(costs: ChunkCosts, request: Request) -> float:
    times = []
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        plan(costs, request)
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


if __name__ == "__main__":
    sys.exit(main())
