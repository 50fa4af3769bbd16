"""Banks of many chunks, plans that stream them, and what a plan must answer."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from bapq_edge import Session
from bapq_edge.bank.layout import LEVELS, Level
from bapq_edge.planning.planner import ChunkCosts, Plan, Request, plan, smallest_limit
from support.banks import NO_CLIP, graph_bytes, node, random_codes, write_bank
from support.internals import adopt, costs_of, store_of

SCALE_COLUMNS: dict[Level, int] = {4: 32, 2: 64, 1: 128}
LINEAR = {"use_bias": 1, "clip_low": -NO_CLIP, "clip_high": NO_CLIP}
RELU = {**LINEAR, "clip_low": 0.0}

PRECISIONS = (*({"level": level} for level in LEVELS), {"bits": 3.5}, {"bits": 6.0})
"""Every level, and mixtures: keyword arguments of a Request or a Session."""


def layer(
    name: str,
    operators: str | tuple[str, ...],
    rows: int,
    columns: int,
    chunk_rows: int = 16,
    levels: tuple[Level, ...] = LEVELS,
) -> tuple:
    """A layer of random codes, the same for the same name and shape."""
    has_bias = "Gather" not in operators
    scales = {level: group for level, group in SCALE_COLUMNS.items() if level in levels}
    rng = np.random.default_rng([rows, columns, *name.encode()])
    codes = random_codes(rng, rows, columns, scales, has_bias, levels)
    description = {
        "rows": rows,
        "columns": columns,
        "chunk_rows": chunk_rows,
        "residual_steps": 15,
        "scale_columns": scales,
        "has_bias": has_bias,
    }
    return name, operators, codes, description


def chain_bank(path: Path) -> Path:
    """x (n, 96) through three products, 45 chunks of several sizes, to y (n, 64)."""
    widths = (96, 400, 250, 64)
    layers = [layer(f"fc{i}", "Gemm", widths[i + 1], widths[i]) for i in range(3)]
    nodes = [
        node("Gemm", "x", "h1", layer=0, **RELU),
        node("Gemm", "h1", "h2", layer=1, **RELU),
        node("Gemm", "h2", "y", layer=2, **LINEAR),
    ]
    return write_bank(path, graph_bytes(nodes, ["n", 96], ["n", 64]), layers)


def tied_bank(path: Path) -> Path:
    """Ids (n, m) through a table that the last product reads too, and one that only Gather does."""
    layers = [
        layer("tied", ("Gather", "MatMul"), 150, 64),
        layer("positions", "Gather", 40, 64),
        layer("fc", "MatMul", 64, 64),
    ]
    nodes = [
        node("Gather", "x", "word", layer=0),
        node("Gather", "x", "position", layer=1),
        helper.make_node("Add", ["word", "position"], ["h"]),
        node("MatMul", "h", "f", layer=2, **RELU),
        node("MatMul", "f", "y", layer=0, **{**LINEAR, "use_bias": 0}),
    ]
    graph = graph_bytes(nodes, ["n", "m"], ["n", "m", 150], TensorProto.INT64)
    return write_bank(path, graph, layers)


def branches_bank(path: Path) -> Path:
    """Parallel branches, twice; the bank holds those of one pair in another order than the graph
    runs them in, whichever of a pair the graph engine begins with."""
    layers = [
        layer("left1", "Gemm", 128, 96),
        layer("right1", "Gemm", 200, 96),
        layer("left2", "Gemm", 64, 128),
        layer("right2", "Gemm", 64, 200),
        layer("right3", "Gemm", 100, 64),
        layer("left3", "Gemm", 100, 64),
        layer("last", "Gemm", 64, 100),
    ]
    nodes = [
        node("Gemm", "x", "l1", layer=0, **RELU),
        node("Gemm", "x", "r1", layer=1, **RELU),
        node("Gemm", "l1", "l2", layer=2, **LINEAR),
        node("Gemm", "r1", "r2", layer=3, **LINEAR),
        helper.make_node("Add", ["l2", "r2"], ["h"]),
        node("Gemm", "h", "l3", layer=5, **RELU),
        node("Gemm", "h", "r3", layer=4, **RELU),
        helper.make_node("Add", ["l3", "r3"], ["sum"]),
        node("Gemm", "sum", "y", layer=6, **LINEAR),
    ]
    return write_bank(path, graph_bytes(nodes, ["n", 96], ["n", 64]), layers)


def choice_bank(path: Path) -> Path:
    """x (n, 96): where its sum is positive one branch runs, else another, and then a product."""

    def branch(number: int) -> Any:
        return helper.make_graph(
            [node("Gemm", "x", f"b{number}", layer=number, **RELU)],
            f"branch{number}",
            [],
            [helper.make_tensor_value_info(f"b{number}", TensorProto.FLOAT, ["n", 128])],
        )

    zero = numpy_helper.from_array(np.array(0, np.float32))
    layers = [
        layer("then", "Gemm", 128, 96),
        layer("else", "Gemm", 128, 96),
        layer("last", "Gemm", 64, 128),
    ]
    nodes = [
        helper.make_node("ReduceSum", ["x"], ["sum"], keepdims=0),
        helper.make_node("Constant", [], ["zero"], value=zero),
        helper.make_node("Greater", ["sum", "zero"], ["positive"]),
        helper.make_node("If", ["positive"], ["h"], then_branch=branch(0), else_branch=branch(1)),
        node("Gemm", "h", "y", layer=2, **LINEAR),
    ]
    return write_bank(path, graph_bytes(nodes, ["n", 96], ["n", 64]), layers)


def matrix_bank(path: Path, rows: int, columns: int, levels: tuple[Level, ...]) -> Path:
    """One large product: x (n, columns) -> y (n, rows)."""
    layers = [layer("fc", "MatMul", rows, columns, chunk_rows=64, levels=levels)]
    nodes = [node("MatMul", "x", "y", layer=0, **LINEAR)]
    return write_bank(path, graph_bytes(nodes, ["n", columns], ["n", rows]), layers, levels)


def mobile_bank(path: Path, open_image: bool = False) -> Path:
    """x (n, 48, 7, 6) through an inverted bottleneck: 1x1 up, 3x3 depthwise, 1x1 down.

    Where the image is open, its sides are not told.
    """

    def conv(operator: str, source: str, target: str, layer: int, group: int, size: int) -> Any:
        fields = {"auto_pad": 1, "group": group, "kernel_h": size, "kernel_w": size}
        fields |= {f"pad_{side}": 0 for side in ("top", "left", "bottom", "right")}
        fields |= {f"{what}_{a}": 1 for what in ("stride", "dilation") for a in "hw"}
        return node(operator, source, target, layer=layer, **fields, **RELU)

    layers = [
        layer("up", "Conv", 120, 48),
        layer("depthwise", "DepthwiseConv", 120, 9),
        layer("down", "Conv", 40, 120),
    ]
    nodes = [
        conv("Conv", "x", "h", 0, 1, 1),
        conv("DepthwiseConv", "h", "d", 1, 120, 3),
        conv("Conv", "d", "y", 2, 1, 1),
    ]
    sides = ["h", "w"] if open_image else [7, 6]
    return write_bank(path, graph_bytes(nodes, ["n", 48, *sides], ["n", 40, *sides]), layers)


BANKS = {
    "chain": chain_bank,
    "tied": tied_bank,
    "branches": branches_bank,
    "choice": choice_bank,
    "mobile": mobile_bank,
}


def inputs(kind: str) -> list[np.ndarray]:
    """What the bank of this kind is fed with; "choice" takes either branch in turn."""
    rng = np.random.default_rng(7)
    if kind == "tied":
        return [rng.integers(0, 40, (2, 9)) for _ in range(2)]
    if kind == "mobile":
        return [rng.standard_normal((2, 48, 7, 6)).astype(np.float32) for _ in range(2)]
    x = rng.standard_normal((3, 96)).astype(np.float32)
    return [np.abs(x), -np.abs(x)] if kind == "choice" else [x, 2 * x]


def run(session: Session, x: np.ndarray) -> np.ndarray:
    """The one output."""
    (y,) = session.run(None, {session.get_inputs()[0].name: x})
    return y


def all_resident(costs: ChunkCosts, planned: Plan) -> Plan:
    """The same levels, with everything pinned."""
    return replace(planned, pinned=~costs.row_read, ring_bytes=0, resident_bytes=2**40)


def resident_outputs(
    bank: Path, xs: Iterable[np.ndarray], precisions: Iterable[dict] = PRECISIONS
) -> list[list[np.ndarray]]:
    """What sessions answer that keep all weights in memory: [precision][x]."""
    outputs = []
    for precision in precisions:
        with Session(bank, threads=1, **precision) as session:
            outputs.append([run(session, x) for x in xs])
    return outputs


def limits(costs: ChunkCosts, request: Request) -> list[int]:
    """The smallest limit, one little above it, and one that most chunks fit into."""
    smallest = smallest_limit(costs, request)
    total = plan(costs, request).resident_bytes
    return [smallest, smallest + total // 8, max(smallest, total * 3 // 4)]


def publish(session: Session, request: Request) -> Plan:
    """Run this request from now on, whatever the session was asked for."""
    planned = plan(costs_of(session), request)
    adopt(session, planned)
    return planned


def settled(session: Session) -> Any:
    """The store's statistics once the reader has turned to the published plan.

    On a busy machine the reader's thread may have to wait for its turn.
    """
    deadline = time.monotonic() + 120
    while (stats := store_of(session).stats()).live_plans > 1 and time.monotonic() < deadline:
        time.sleep(0.001)
    return stats
