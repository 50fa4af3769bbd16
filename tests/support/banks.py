"""Small banks with random codes, and graphs of our operators around them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto, helper

from bapq_edge.bank.codes import LayerCodes, from_bf16, to_bf16
from bapq_edge.bank.layer import Layer
from bapq_edge.bank.layout import LEVELS, PLANES, SCALED_PLANES, Level, planes_for, scaled_levels
from bapq_edge.bank.manifest import SourceModel
from bapq_edge.bank.writer import BankWriter
from bapq_edge.engine.graph import RUN_INPUT

NO_CLIP = 3.4028234663852886e38
SOURCE = SourceModel(name="test", bytes=0, blake2b="0" * 32, producer="test")


def random_codes(
    rng: np.random.Generator,
    rows: int,
    columns: int,
    scale_columns: dict[Level, int],
    has_bias: bool,
    levels: tuple[Level, ...] = LEVELS,
) -> LayerCodes:
    """Codes drawn over their whole range, scales over two decades."""
    codes = LayerCodes()
    for plane in planes_for(levels):
        if plane == "f32":
            codes.weight = rng.standard_normal((rows, columns)).astype(np.float32)
        else:
            top = 16 if plane in ("p4", "r8") else 2
            codes.codes[plane] = rng.integers(0, top, (rows, columns), dtype=np.uint8)
        level = SCALED_PLANES.get(plane)
        if level in scaled_levels(levels):
            groups = -(-(-(-columns // 32) * 32) // scale_columns[level])
            values = 10 ** rng.uniform(-2, 0, (rows, groups))
            codes.scales[level] = from_bf16(to_bf16(values.astype(np.float32)))
        if has_bias and PLANES[plane] in levels:
            codes.bias[PLANES[plane]] = rng.standard_normal(rows).astype(np.float32)
    return codes


def node(operator: str, source: str, target: str, *residual: str, **attributes: Any) -> Any:
    """One operator of ours, by itself without a function."""
    if operator != "Gather":
        attributes.setdefault("function", 0)
    return helper.make_node(
        operator, [source, RUN_INPUT, *residual], [target], domain="bapq", **attributes
    )


def graph_bytes(
    nodes: list[Any], x_shape: list[Any], y_shape: list[Any], x_type: int = TensorProto.FLOAT
) -> bytes:
    """A model x -> y of these nodes."""
    graph = helper.make_graph(
        nodes,
        "test",
        [
            helper.make_tensor_value_info("x", x_type, x_shape),
            helper.make_tensor_value_info(RUN_INPUT, TensorProto.INT64, []),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, y_shape)],
    )
    model = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", 13), helper.make_opsetid("bapq", 1)],
        ir_version=8,
    )
    data: bytes = model.SerializeToString()
    return data


def write_bank(
    path: Path,
    graph: bytes,
    layers: list[tuple[str, str | tuple[str, ...], LayerCodes, dict[str, Any]]],
    levels: tuple[Level, ...] = LEVELS,
) -> Path:
    """A bank of (name, operators, codes, description) layers; the higher the level, the smaller
    the errors that it states. A description's `levels` are those of its layer, else all.
    """
    shares = np.array([0 if level == 32 else level**-2.0 for level in levels])
    with BankWriter(path, levels=levels, source=SOURCE) as writer:
        for name, operators, codes, description in layers:
            own = description.get("levels", levels)
            tables = {key: description.get(key) for key in ("row_order", "dropped_bias")}
            layer = Layer(
                name=name,
                operators=(operators,) if isinstance(operators, str) else operators,
                method={level: "nearest" for level in own if level != 32},
                relative_error={
                    level: float(np.sqrt(share))
                    for level, share in zip(levels, shares, strict=True)
                    if level in own
                },
                **{"stored_rows": description["rows"]}
                | {k: v for k, v in description.items() if k not in ("levels", *tables)},
            )
            heard = np.where(np.isin(levels, own), shares, 0)
            sensitivity = np.tile(heard / layer.chunk_count, (layer.chunk_count, 1))
            writer.add_layer(layer, codes, sensitivity=sensitivity.astype(np.float32), **tables)
        writer.finish(graph)
    return path
