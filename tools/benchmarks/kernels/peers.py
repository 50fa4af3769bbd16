"""ONNX Runtime's kernels for the job that ours do: a layer's matrix times m rows of floats."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

__all__ = ["BLOCK", "PEERS", "Shape", "open_peer"]

PEERS = {
    "fp32": "MatMul",
    "nbits_8": "MatMulNBits 8",
    "nbits_4": "MatMulNBits 4",
    "nbits_2": "MatMulNBits 2",
    "int8": "DynamicQuantizeLinear, MatMulInteger",
}
"""name of a peer -> ONNX Runtime's operators"""
BLOCK = 32
"""columns that share a scale in MatMulNBits"""
_ACCURACY_LEVEL = 4  # int8 products
_MICROSOFT = "com.microsoft"

Shape = tuple[int, int, int]
"""rows and columns of a layer, and rows of its input"""


def open_peer(peer: str, shape: Shape, copies: int) -> Callable[[], object]:
    """What runs as many layers of that shape once, on one thread, each on an input of its own."""
    rows, columns, m = shape
    random = np.random.default_rng(0)
    nodes: list[onnx.NodeProto] = []
    weights: list[onnx.TensorProto] = []
    for index in range(copies):
        made, arrays = _layer(peer, rows, columns, index, random)
        nodes += made
        weights += [numpy_helper.from_array(array, name) for name, array in arrays.items()]
    graph = helper.make_graph(
        nodes,
        peer,
        [_floats(f"x{index}", m, columns) for index in range(copies)],
        [_floats(f"y{index}", m, rows) for index in range(copies)],
        weights,
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(_MICROSOFT, 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    x = random.uniform(-1, 1, (m, columns)).astype(np.float32)
    binding = session.io_binding()
    for index in range(copies):
        binding.bind_cpu_input(f"x{index}", x)
        binding.bind_output(f"y{index}")
    return lambda: session.run_with_iobinding(binding)


def _floats(name: str, *shape: int) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


def _layer(
    peer: str, rows: int, columns: int, index: int, random: np.random.Generator
) -> tuple[list[onnx.NodeProto], dict[str, np.ndarray]]:
    x, y, w = f"x{index}", f"y{index}", f"w{index}"
    if peer == "fp32":
        values = random.standard_normal((columns, rows), np.float32)
        return [helper.make_node("MatMul", [x, w], [y])], {w: values}
    if peer == "int8":
        names = [f"{part}{index}" for part in ("q", "scale", "zero", "sums", "floats", "both")]
        q, scale, zero, sums, floats, both = names
        nodes = [
            helper.make_node("DynamicQuantizeLinear", [x], [q, scale, zero]),
            helper.make_node("MatMulInteger", [q, w, zero], [sums]),
            helper.make_node("Cast", [sums], [floats], to=TensorProto.FLOAT),
            helper.make_node("Mul", [scale, f"step{index}"], [both]),
            helper.make_node("Mul", [floats, both], [y]),
        ]
        codes = random.integers(-127, 128, (columns, rows), np.int8)
        return nodes, {w: codes, f"step{index}": np.array([0.01], np.float32)}
    bits = int(peer.rpartition("_")[2])
    blocks = columns // BLOCK
    node = helper.make_node(
        "MatMulNBits",
        [x, w, f"scales{index}"],
        [y],
        domain=_MICROSOFT,
        K=columns,
        N=rows,
        bits=bits,
        block_size=BLOCK,
        accuracy_level=_ACCURACY_LEVEL,
    )
    codes = random.integers(0, 256, (rows, blocks, BLOCK * bits // 8), np.uint8)
    scales = np.full((rows, blocks), 0.01, np.float32)
    return [node], {w: codes, f"scales{index}": scales}
