"""Our kernels and ONNX Runtime's on this machine, in turns on one core.

Times are those of the thread on the core: the turns of other programs do not count.
"""

from __future__ import annotations

import ctypes
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnxruntime

from bapq_edge.bank.layout import LEVELS
from bapq_edge.engine.library import library_path
from bapq_tools.quantize.options import SCALE_COLUMNS

from ..native_build import build_native
from .peers import BLOCK, Shape, open_peer

__all__ = ["SHAPES", "Machine", "cache_bytes", "measure"]

SHAPES: tuple[Shape, ...] = (
    (8192, 2048, 1),
    (11008, 4096, 1),
    (1536, 384, 1),
    (1536, 384, 16),
    (1536, 384, 64),
    (384, 1536, 64),
    (256, 2304, 196),
    (64, 576, 784),
)
"""a decoder's matrices, MiniLM's, and 3x3 convolutions of ResNet-50 as matrices"""
PEERS_OF = {32: ("fp32",), 8: ("nbits_8", "int8"), 4: ("nbits_4",), 2: ("nbits_2",)}
"""level -> ONNX Runtime's kernels of as many bits"""
REPEATS = 15
SAMPLE_MACS = 1e8
"""multiply-adds of a sample: long for a clock"""
BEYOND_CACHE = 8
"""copies of a matrix-vector layer fill the last cache so many times"""
READ_BYTES = 256 << 20


@dataclass(frozen=True)
class Machine:
    """What was measured on, and what it can do at most."""

    cpu: str
    core: int
    runtime: str
    bytes_per_s: float
    """that one thread reads, far beyond the caches"""
    macs_per_s: dict[str, float]
    """of int8, by kernel family, all operands in registers"""


class _Bench:
    """kernels_bench.c as a library, and the families of libbapq that this CPU runs."""

    def __init__(self) -> None:
        library = build_native("kernels_bench_library")
        kernels = ctypes.CDLL(str(library_path()), mode=ctypes.RTLD_GLOBAL)
        kernels.bapq_kernels_by_name.restype = ctypes.c_void_p
        self.kernels = kernels
        self.native = ctypes.CDLL(str(library))
        self.native.bapq_bench_open.restype = ctypes.c_void_p
        for name in ("products_s", "inputs_s", "bytes_per_s", "macs_per_s"):
            getattr(self.native, f"bapq_bench_{name}").restype = ctypes.c_double
        self.native.bapq_bench_bytes_per_s.argtypes = (ctypes.c_int64,)

    def family(self, name: str) -> ctypes.c_void_p:
        found = self.kernels.bapq_kernels_by_name(name.encode())
        if not found:
            raise ValueError(f"this CPU has no kernels {name!r}")
        return ctypes.c_void_p(found)


def cache_bytes() -> list[int]:
    """Bytes of each data cache of the core, the smallest first."""
    sizes = []
    for folder in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        if (folder / "type").read_text().strip() != "Instruction":
            size = (folder / "size").read_text().strip()
            sizes.append(int(size[:-1]) << {"K": 10, "M": 20}[size[-1]])
    return sorted(sizes)


def measure(families: list[str], shapes: list[Shape]) -> tuple[Machine, Iterator[dict[str, Any]]]:
    """What the machine can do, and a record for each shape and level."""
    core = max(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {core})
    bench = _Bench()
    native = bench.native  # what the machine can do at most: another program may only hide it
    bytes_per_s = max(native.bapq_bench_bytes_per_s(READ_BYTES) for _ in range(REPEATS))
    macs_per_s = {
        family: max(native.bapq_bench_macs_per_s(family.encode()) for _ in range(REPEATS))
        for family in families
    }
    runtime = f"onnxruntime {onnxruntime.__version__}"
    machine = Machine(_cpu_name(), core, runtime, bytes_per_s, macs_per_s)
    records = (record for shape in shapes for record in _measure_shape(bench, families, shape))
    return machine, records


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def weight_bytes(level: int, rows: int, columns: int) -> int:
    """Codes and scales of a layer as our kernels read them."""
    scale_columns = SCALE_COLUMNS.get(4 if level == 8 else level, 0)
    scales = 0 if level == 32 else 2 * rows * math.ceil(columns / scale_columns)
    return rows * columns * level // 8 + scales


def _copies(level: int, shape: Shape) -> int:
    """Layers of one pass: of matrix-vector ones, more than the caches hold."""
    rows, columns, m = shape
    for_time = math.ceil(SAMPLE_MACS / 4 / (rows * columns * m))
    if m > 1 or rows * columns < 1 << 22:
        return for_time
    wanted = BEYOND_CACHE * cache_bytes()[-1]
    return max(for_time, math.ceil(wanted / weight_bytes(level, rows, columns)))


def _measure_shape(bench: _Bench, families: list[str], shape: Shape) -> Iterator[dict[str, Any]]:
    rows, columns, m = shape
    for level in LEVELS:
        copies = _copies(level, shape)
        macs = rows * columns * m * copies
        scale_blocks = SCALE_COLUMNS.get(4 if level == 8 else level, BLOCK) // BLOCK
        sides = (LEVELS.index(level), rows, columns, m, copies, scale_blocks)
        layers = ctypes.c_void_p(bench.native.bapq_bench_open(*sides))
        if not layers:
            raise MemoryError(f"no memory for {copies} layers of {rows} x {columns}")
        peers = PEERS_OF.get(level, ())
        passes = max(1, round(SAMPLE_MACS / macs))
        contestants: dict[str, Callable[[], float]] = {}
        for family in families:
            for part in ("products", "inputs"):
                contestants[f"{family} {part}"] = _ours(bench, family, part, layers, passes)
        for peer in peers:
            contestants[peer] = _theirs(open_peer(peer, shape, copies), passes)
        samples: dict[str, list[float]] = {name: [] for name in contestants}
        for _ in range(REPEATS + 1):
            for name, run_s in contestants.items():
                samples[name].append(run_s() / copies)
        bench.native.bapq_bench_close(layers)
        medians = {name: statistics.median(found[1:]) for name, found in samples.items()}
        for family in families:
            yield {
                "shape": shape,
                "level": level,
                "family": family,
                "weight_bytes": weight_bytes(level, rows, columns),
                "copies": copies,
                "products_s": medians[f"{family} products"],
                "inputs_s": medians[f"{family} inputs"],
                "peers_s": {peer: medians[peer] for peer in peers},
            }


def _ours(
    bench: _Bench, family: str, part: str, layers: ctypes.c_void_p, passes: int
) -> Callable[[], float]:
    function, kernels = getattr(bench.native, f"bapq_bench_{part}_s"), bench.family(family)
    return lambda: float(function(layers, kernels, passes))


def _theirs(run: Callable[[], object], passes: int) -> Callable[[], float]:
    def run_s() -> float:
        started_s = time.thread_time()
        for _ in range(passes):
            run()
        return (time.thread_time() - started_s) / passes

    return run_s
