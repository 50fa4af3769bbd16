"""What int8 activations cost MiniLM: one scale per row against one per row and block of 32 columns.

    PYTHONPATH=tools python -m benchmarks.activation_scales [--sentences N] [--format table|md]

The bank's graph is written out in ONNX's own operators: weights dequantized at a level, activations
of every matrix rounded to int8 and back. So nothing but the scales differs between two rows.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import helper, numpy_helper

import bapq_tools
from bapq_edge.bank.codes import dequantize
from bapq_edge.bank.layout import BLOCK_COLUMNS, Level
from bapq_edge.bank.reader import Bank
from bapq_edge.engine.graph import RUN_INPUT
from bapq_tools.build_support.progress import Progress
from benchmarks.zoo import make_model

from .cases import Case, judge, load_case
from .tables import add_format, print_table

SCALES: dict[str, int | None] = {
    "float": None,
    "int8, a scale per row": 0,
    f"int8, a scale per row and block of {BLOCK_COLUMNS} columns": BLOCK_COLUMNS,
}
"""Columns that share a scale; 0 is the whole row, None keeps float32"""
LEVELS: tuple[Level, ...] = (32, 8)


def main() -> int:
    """Measure and print the mean cosines."""
    parser = argparse.ArgumentParser(description="Mean cosine of MiniLM by activation scales.")
    parser.add_argument("--sentences", type=int, default=600, metavar="N", help="of 600 held out")
    add_format(parser)
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(prefix="bapq-scales-") as folder:
        model, bank_path = Path(folder) / "minilm.onnx", Path(folder) / "minilm.bank"
        make_model("minilm", model)
        case = load_case("minilm", model)
        feeds = case.held_out[: arguments.sentences]
        bapq_tools.build_bank(model, bank_path, calibration=case.calibration, levels=LEVELS)
        bank = Bank.open(bank_path)
        progress = Progress(True)
        reference = embeddings(model.read_bytes(), case, feeds, progress, "float32")
        for name, scale_columns in SCALES.items():
            cosines = []
            for level in LEVELS:
                written = write_out(bank, level, scale_columns)
                found = embeddings(written, case, feeds, progress, f"{name}, level {level}")
                cosines.append(f"{judge(case, found, reference)['cosine']:.5f}")
            rows.append([name, *cosines])
    heads = ["activations of matrices", *(f"weights at level {level}" for level in LEVELS)]
    title = f"MiniLM, mean cosine to float32 over {len(feeds)} held-out sentences"
    print_table(title, heads, rows, arguments.format)
    return 0


def embeddings(
    model: bytes, case: Case, feeds: list[dict[str, np.ndarray]], progress: Progress, stage: str
) -> list[np.ndarray]:
    """Run every feed with ONNX Runtime; (1, hidden) each."""
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    found = []
    with progress.stage(stage, len(feeds)) as advance:
        for feed in feeds:
            found += session.run([case.judged_output], feed)
            advance()
    return found


def write_out(bank: Bank, level: Level, scale_columns: int | None) -> bytes:
    """The bank's graph at a level as a plain ONNX model, with its activations rounded."""
    model = onnx.load_from_string(bank.graph_bytes())
    nodes = list(model.graph.node)
    del model.graph.node[:]
    for node in nodes:
        if node.domain == "bapq":
            model.graph.node.extend(_plain_nodes(model.graph, bank, node, level, scale_columns))
        else:
            model.graph.node.append(node)
    for value in [value for value in model.graph.input if value.name == RUN_INPUT]:
        model.graph.input.remove(value)
    return model.SerializeToString()


def _plain_nodes(
    graph: onnx.GraphProto,
    bank: Bank,
    node: onnx.NodeProto,
    level: Level,
    scale_columns: int | None,
) -> Iterator[onnx.NodeProto]:
    """One operator of ours, Gather or MatMul without clipping, in ONNX's."""
    (index,) = (a.i for a in node.attribute if a.name == "layer")
    layer = bank.manifest.layers[index]
    codes = bank.layer_codes(layer)
    weight = dequantize(codes, level, layer.residual_steps, layer.scale_columns)
    source, (output,) = node.input[0], node.output

    def constant(part: str, value: np.ndarray) -> str:
        name = f"{output}.{part}"
        graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    if node.op_type == "Gather":
        yield helper.make_node("Gather", [constant("table", weight), source], [output])
        return
    if scale_columns is not None:
        blocks = constant("blocks", np.array([0, 0, -1, scale_columns or layer.columns], np.int64))
        whole = constant("whole", np.array([0, 0, layer.columns], np.int64))
        steps = constant("steps", np.array(127, np.float32))
        least = constant("least", np.array(np.finfo(np.float32).tiny))

        def step(operator: str, inputs: list[str], to: str, **attributes: object) -> onnx.NodeProto:
            return helper.make_node(operator, inputs, [f"{output}.{to}"], **attributes)

        yield step("Reshape", [source, blocks], "x")
        yield step("Abs", [f"{output}.x"], "abs")
        yield step("ReduceMax", [f"{output}.abs"], "amax", axes=[-1], keepdims=1)
        yield step("Max", [f"{output}.amax", least], "range")
        yield step("Div", [f"{output}.range", steps], "scale")
        yield step("Div", [f"{output}.x", f"{output}.scale"], "scaled")
        yield step("Round", [f"{output}.scaled"], "int8")
        yield step("Mul", [f"{output}.int8", f"{output}.scale"], "rounded_blocks")
        yield step("Reshape", [f"{output}.rounded_blocks", whole], "rounded")
        source = f"{output}.rounded"
    product = f"{output}.product"
    yield helper.make_node("MatMul", [source, constant("weight", weight.T)], [product])
    yield helper.make_node("Add", [product, constant("bias", codes.bias[level])], [output])


if __name__ == "__main__":
    sys.exit(main())
