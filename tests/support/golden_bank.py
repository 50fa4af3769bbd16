"""Writes the golden bank, only when the format changes: `python tests/support/golden_bank.py`.

RandomState is used because NumPy promises that its streams never change.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from bapq_edge.bank.codes import LayerCodes, from_bf16, to_bf16
from bapq_edge.bank.layer import Layer
from bapq_edge.bank.layout import LEVELS, PLANES, SCALED_PLANES, planes_for, scaled_levels
from bapq_edge.bank.manifest import Calibration, KeptNode, SourceModel
from bapq_edge.bank.writer import BankWriter

GOLDEN = Path(__file__).parents[1] / "golden" / "bank_v1"
GRAPH = b"\x122no graph, only a producer: its digest is checked.\n"
assert len(GRAPH) == 2 + 50

# Ragged in rows, columns and scale groups; two chunks; shared by two operators; with and without
# bias; rows reordered and dropped, and all as they are; all levels, and some; both at once; in the
# layout of a depthwise convolution.
LAYERS = {
    "dense.1": {
        "operators": ("Gemm", "MatMul"),
        "rows": 24,
        "stored_rows": 21,
        "columns": 37,
        "chunk_rows": 16,
        "residual_steps": 8,
        "scale_columns": {4: 32, 2: 64, 1: 96},
        "has_bias": True,
    },
    "words": {
        "operators": ("Gather",),
        "rows": 3,
        "stored_rows": 3,
        "columns": 5,
        "chunk_rows": 16,
        "residual_steps": 11,
        "scale_columns": {4: 32, 2: 32, 1: 32},
        "has_bias": False,
    },
    "head": {
        "operators": ("MatMul",),
        "rows": 21,
        "stored_rows": 18,
        "columns": 33,
        "chunk_rows": 16,
        "residual_steps": 16,
        "scale_columns": {4: 64},
        "has_bias": True,
        "levels": (8,),
    },
    "last": {
        "operators": ("Conv",),
        "rows": 4,
        "stored_rows": 4,
        "columns": 40,
        "chunk_rows": 16,
        "residual_steps": 9,
        "scale_columns": {2: 32},
        "has_bias": False,
        "levels": (32, 2),
    },
    "depthwise": {
        "operators": ("DepthwiseConv",),
        "rows": 18,
        "stored_rows": 18,
        "columns": 9,
        "chunk_rows": 16,
        "residual_steps": 13,
        "scale_columns": {4: 32, 2: 96, 1: 128},
        "has_bias": True,
    },
}

METHODS = {8: "compensated", 4: "compensated", 2: "nearest", 1: "nearest"}


def golden_codes(name: str) -> LayerCodes:
    """The codes of a layer of the golden bank."""
    layer = LAYERS[name]
    random = np.random.RandomState(len(name))
    levels = layer.get("levels", LEVELS)
    planes = planes_for(levels)
    rows = layer["stored_rows"]
    shape = rows, layer["columns"]
    weight = random.uniform(-1, 1, shape).astype(np.float32)
    codes = LayerCodes(weight=weight if "f32" in planes else None)
    for plane, level in PLANES.items():
        if plane not in planes:
            continue
        if plane != "f32":
            top = 16 if plane in ("p4", "r8") else 2
            codes.codes[plane] = random.randint(0, top, shape).astype(np.uint8)
        if SCALED_PLANES.get(plane) in scaled_levels(levels):
            groups = -(-layer["columns"] // layer["scale_columns"][level])
            scales = random.uniform(0.001, 1, (rows, groups)).astype(np.float32)
            codes.scales[level] = from_bf16(to_bf16(scales))
        if layer["has_bias"] and level in levels:
            codes.bias[level] = random.uniform(-1, 1, rows).astype(np.float32)
    return codes


def golden_sensitivity(name: str) -> np.ndarray:
    """(chunks, levels) float32 of a layer of the golden bank."""
    layer = LAYERS[name]
    random = np.random.RandomState(100 + len(name))
    shape = -(-layer["stored_rows"] // layer["chunk_rows"]), len(LEVELS)
    table = random.uniform(0, 1, shape).astype(np.float32)
    table[:, LEVELS.index(32)] = 0
    table[:, ~np.isin(LEVELS, layer.get("levels", LEVELS))] = 0
    return table


def golden_rows(name: str) -> dict[str, np.ndarray | None]:
    """Row order (rows,) and bias of dropped rows (dropped rows,) of a layer of the golden bank."""
    layer = LAYERS[name]
    dropped = layer["rows"] - layer["stored_rows"]
    if not dropped:
        return {"row_order": None, "dropped_bias": None}
    random = np.random.RandomState(200 + len(name))
    order = random.permutation(layer["rows"]).astype(np.uint32)
    order[-dropped:].sort()
    return {
        "row_order": order,
        "dropped_bias": random.uniform(-1, 1, dropped).astype(np.float32),
    }


def write_golden(path: Path) -> None:
    """Write the golden bank at `path`."""
    with BankWriter(
        path,
        levels=LEVELS,
        source=SourceModel("golden", 1234, "0123456789abcdef" * 2, "bapq golden"),
        calibration=Calibration(7, "fedcba9876543210" * 2),
    ) as writer:
        for name, layer in LAYERS.items():
            errors = {level: 0.5 / level for level in layer.get("levels", LEVELS)}
            description = Layer(
                name=name,
                method={level: METHODS[level] for level in errors if level != 32},
                relative_error=errors,
                **{key: value for key, value in layer.items() if key != "levels"},
            )
            writer.add_layer(
                description,
                golden_codes(name),
                sensitivity=golden_sensitivity(name),
                **golden_rows(name),
            )
        writer.finish(GRAPH, [KeptNode("/stem/Conv", "Conv", 27, "fewer than 1024 weights")])


if __name__ == "__main__":
    write_golden(GOLDEN)
