"""Models that somebody quantized already: taken in as what their integers stand for.

The measure is the file itself in ONNX Runtime, on the 600 test digits.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from onnxruntime import quantization

import bapq_edge
from bapq_edge.bank.reader import Bank
from bapq_edge.errors import NoHeavyLayerError
from bapq_tools import build_bank
from bapq_tools.onnx_graph.importers.integer_operators import spell_integers_out
from bapq_tools.onnx_graph.importers.quantized import resolve_quantization
from benchmarks.zoo.digits import digits_cnn_path, digits_mlp_path, split_of
from support import onnx_models as models
from support.onnx_models import FLOAT, INT32, INT64, weights

pytestmark = pytest.mark.filterwarnings("ignore::bapq_edge.errors.UncalibratedWarning")

MICROSOFT = "com.microsoft"
PATHS = {"cnn": digits_cnn_path, "mlp": digits_mlp_path}
node = helper.make_node


def microsoft(kind, inputs, outputs, name="", **attributes):
    return node(kind, inputs, outputs, name, domain=MICROSOFT, **attributes)


class Samples(quantization.CalibrationDataReader):
    def __init__(self, name: str, samples: np.ndarray) -> None:
        self.samples = iter([{name: samples[at : at + 20]} for at in range(0, 200, 20)])

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.samples, None)


def quantize(kind, which, out):
    """The bundled digits model as a quantizer of ONNX Runtime writes it."""
    source, split = PATHS[which](), split_of(which)
    name = onnx.load_model(source, load_external_data=False).graph.input[0].name
    if kind == "dynamic":
        quantization.quantize_dynamic(source, out, weight_type=quantization.QuantType.QInt8)
        return name, split
    quantization.quantize_static(
        source,
        out,
        Samples(name, split.x_calibration),
        quant_format=quantization.QuantFormat["QDQ" if kind == "QDQ" else "QOperator"],
        per_channel=kind == "QOperator per channel",
        activation_type=quantization.QuantType.QUInt8,
        weight_type=quantization.QuantType.QInt8,
    )
    return name, split


@pytest.mark.parametrize("which", PATHS)
@pytest.mark.parametrize("kind", ["QDQ", "QOperator", "QOperator per channel", "dynamic"])
def test_what_quantizers_write_answers_as_it_does_there(kind, which, tmp_path):
    path, bank = tmp_path / "quantized.onnx", tmp_path / "m.bank"
    name, split = quantize(kind, which, path)
    feeds = {name: split.x_test}
    wanted = models.run(path.read_bytes(), feeds)[-1]
    build_bank(path, bank, levels=[32, 8], workers=1, progress=False)
    manifest = Bank.open(bank).manifest
    assert len(manifest.layers) == (3 if which == "cnn" else 2)
    assert {entry.reason for entry in manifest.kept_in_float} == {"fewer than 1024 weights"}
    with bapq_edge.Session(bank) as session:
        for level in (32, 8):
            session.set_level(level)
            have = session.run(None, feeds)[-1]
            assert np.mean(have.argmax(1) == wanted.argmax(1)) >= 0.998
            assert np.linalg.norm(have - wanted) < 0.02 * np.linalg.norm(wanted)


def test_integers_between_operators_leave_nothing_behind():
    """Chains of QLinear operators and moves become floats with the ranges of their integers."""
    constants = {
        "s": np.float32(0.05),
        "z": np.uint8(100),
        "t": np.float32(0.02),
        "u": np.uint8(30),
        "pads": np.array([0, 0, 1, 1, 0, 0, 1, 1]),
        "shape": np.array([0, -1]),
        "ws": np.full(8, 0.01, np.float32),
        "wz": np.zeros(8, np.int8),
        "w": BYTES[: 8 * 4 * 9].reshape(8, 4, 3, 3),
        "b": np.arange(8, dtype=np.int32) * 100,
    }
    both = ["s", "z"], ["t", "u"]
    last = ["t", "u"]
    nodes = [
        node("QuantizeLinear", ["x", *both[0]], ["x1"]),
        node("Pad", ["x1", "pads", "z"], ["x2"]),
        node("QLinearConv", ["x2", *both[0], "w", "ws", "wz", *last, "b"], ["x3"]),
        node("MaxPool", ["x3"], ["x4"], kernel_shape=[2, 2]),
        node("Split", ["x4"], ["left", "right"], axis=1),
        microsoft("QLinearConcat", [*last, "right", *last, "left", *last], ["swapped"], axis=1),
        node("Transpose", ["swapped"], ["x5"], perm=[0, 2, 3, 1]),
        microsoft("QLinearAdd", ["x5", *last, "x5", *last, *both[0]], ["x6"]),
        microsoft("QLinearLeakyRelu", ["x6", *both[0], *last], ["x7"], alpha=0.1),
        microsoft("QLinearConcat", [*both[0], "x6", *both[0], "x7", *last], ["x8"], axis=1),
        microsoft("QLinearMul", ["x8", *both[0], "x8", *both[0], *both[0]], ["x9"]),
        node("Reshape", ["x9", "shape"], ["x10"]),
        microsoft("QLinearSigmoid", ["x10", *both[0], *last], ["x11"]),
        node("DequantizeLinear", ["x11", *last], ["y"]),
    ]
    source = models.model(
        nodes,
        {"x": (FLOAT, ["n", 4, 6, 6])},
        {"y": (FLOAT, None)},
        constants,
        domains=[(MICROSOFT, 1)],
    )
    x = weights(3, 4, 6, 6)
    (wanted,) = models.run(source, {"x": x})
    spell_integers_out(source)
    resolve_quantization(source)
    left = [name for name in models.operators(source) if "Lin" in name]
    assert left == []
    (have,) = models.run(source, {"x": x})
    assert have.shape == wanted.shape
    assert np.abs(have - wanted).max() < 0.15  # a few steps of the chain


def packed(codes, bits):
    """Numbers of few bits as bytes, the lowest bits first, along the last axis."""
    parts = codes.reshape(*codes.shape[:-1], -1, 8 // bits).astype(np.uint8)
    return np.bitwise_or.reduce(parts << np.arange(0, 8, bits, dtype=np.uint8), -1)


def matmul_bits(bits, block, zeros, bias=False, order=False):
    rows, columns = 40, 96
    rng = np.random.default_rng(bits * block)
    blocks = -(-columns // block)
    codes = rng.integers(0, 1 << bits, (rows, blocks, block))
    constants = {"w": packed(codes, bits), "s": weights(rows, blocks)}
    inputs = ["x", "w", "s", "", "", ""]
    if zeros == "packed":
        of_rows = rng.integers(0, 1 << bits, (rows, -(-blocks * bits // 8) * 8 // bits))
        constants["z"], inputs[3] = packed(of_rows, bits).reshape(-1), "z"
    if zeros == "float":
        constants["z"], inputs[3] = weights(rows, blocks, seed=1), "z"
    if order:
        constants["g"] = rng.integers(0, blocks, columns).astype(np.int32)
        inputs[4] = "g"
    if bias:
        constants["b"], inputs[5] = weights(rows), "b"
    at = {"K": columns, "N": rows, "bits": bits, "block_size": block}
    return microsoft("MatMulNBits", inputs, ["y"], "layer", **at), weights(2, 3, columns), constants


def dynamic_matmul(bias):
    constants = {"w": BYTES[:1280].reshape(32, 40), "s": np.float32(0.02), "z": np.int8(3)}
    constants |= {"b": weights(40)} if bias else {}
    names = [*constants]
    return microsoft("DynamicQuantizeMatMul", ["x", *names], ["y"], "layer"), X, constants


def matmul_to_float():
    constants = {
        "w": BYTES[:1280].reshape(32, 40),
        "s": np.abs(weights(40)),
        "z": BYTES[:40],
        "b": weights(40),
    }
    nodes = [
        node("DynamicQuantizeLinear", ["x"], ["q", "t", "u"]),
        microsoft("MatMulIntegerToFloat", ["q", "w", "t", "s", "u", "z", "b"], ["y"], "layer"),
    ]
    return nodes, X, constants


def gemm(out):
    constants = {
        "t": np.float32(0.03),
        "u": np.uint8(128),
        "w": BYTES[:1280].reshape(40, 32),
        "s": np.abs(weights(40)) * np.float32(0.1) + np.float32(0.01),
        "z": np.zeros(40, np.int8),
        "b": np.arange(40, dtype=np.int32) * 50,
        "r": np.float32(1.0),
        "v": np.uint8(128),
    }
    inputs = ["q", "t", "u", "w", "s", "z", "b"]
    nodes = [
        node("QuantizeLinear", ["x", "t", "u"], ["q"]),
        microsoft("QGemm", inputs, ["y"], "layer", transB=1),
    ]
    if out:
        nodes[-1] = microsoft("QGemm", [*inputs, "r", "v"], ["p"], "layer", transB=1)
        nodes.append(node("DequantizeLinear", ["p", "r", "v"], ["y"]))
    return nodes, X, constants


def conv_integer():
    constants = {"w": BYTES[:2304].reshape(16, 16, 3, 3), "s": np.float32(0.02), "z": np.int8(1)}
    nodes = [
        node("DynamicQuantizeLinear", ["x"], ["q", "t", "u"]),
        node("Mul", ["t", "s"], ["both"]),
        node("ConvInteger", ["q", "w", "u", "z"], ["p"], "layer", pads=[1, 1, 1, 1]),
        node("Cast", ["p"], ["f"], to=FLOAT),
        node("Mul", ["f", "both"], ["y"]),
    ]
    return nodes, weights(2, 16, 5, 5), constants


def gathered():
    constants = {
        "w": BYTES[:1280].reshape(40, 32),
        "s": np.float32(0.02),
        "z": np.int8(3),
    }
    nodes = [
        node("Cast", ["x"], ["i"], to=INT64),
        node("Gather", ["w", "i"], ["q"], "layer"),
        node("DequantizeLinear", ["q", "s", "z"], ["y"]),
    ]
    return nodes, np.array([[3, 0], [39, -1]], np.float32), constants


def gathered_blocks(kind, zeros):
    rng = np.random.default_rng(1)
    if kind == "uint8":
        table = packed(rng.integers(0, 16, (40, 64)), 4)
        zero = packed(rng.integers(0, 16, (40, 2)), 4)
    else:
        low = -8 if kind == "int4" else 0
        make = partial(helper.make_tensor, data_type=TensorProto.DataType.Value(kind.upper()))
        table = make("w", dims=[40, 64], vals=rng.integers(low, low + 16, 2560).tolist())
        zero = make("z", dims=[40, 2], vals=rng.integers(low, low + 16, 80).tolist())
    constants = {"w": table, "s": weights(40, 2)} | ({"z": zero} if zeros else {})
    inputs = ["w", "i", "s", *(["z"] if zeros else [])]
    nodes = [
        node("Cast", ["x"], ["i"], to=INT64),
        microsoft("GatherBlockQuantized", inputs, ["y"], "layer", block_size=32),
    ]
    return nodes, np.array([[3, 0], [39, 7]], np.float32), constants


def blocks_of_4_bits():
    values = helper.make_tensor("w", TensorProto.INT4, [64, 40], (BYTES[:2560] % 8).tolist())
    nodes = [
        node("DequantizeLinear", ["w", "s"], ["f"], axis=0, block_size=32),
        node("MatMul", ["x", "f"], ["y"], "layer"),
    ]
    return nodes, weights(3, 64), {"w": values, "s": weights(2, 40)}


BYTES = np.random.default_rng(0).integers(-100, 100, 4096).astype(np.int8)
X = weights(5, 32)
OPERATORS = {
    **{
        f"MatMulNBits {bits} bits, block {block}, zeros {zeros}": matmul_bits(bits, block, zeros)
        for bits, block, zeros in (
            (2, 16, "packed"),
            (4, 32, "packed"),
            (4, 32, None),
            (4, 64, "packed"),
            (4, 16, "float"),
            (8, 32, None),
            (8, 128, "packed"),
        )
    },
    "MatMulNBits with bias": matmul_bits(4, 32, None, bias=True),
    "MatMulNBits with columns in groups": matmul_bits(4, 32, None, order=True),
    "DynamicQuantizeMatMul": dynamic_matmul(bias=False),
    "DynamicQuantizeMatMul with bias": dynamic_matmul(bias=True),
    "MatMulIntegerToFloat": matmul_to_float(),
    "ConvInteger": conv_integer(),
    "QGemm": gemm(out=False),
    "QGemm to integers": gemm(out=True),
    "Gather of integers": gathered(),
    **{
        f"GatherBlockQuantized {kind}, zeros {zeros}": gathered_blocks(kind, zeros)
        for kind in ("int4", "uint4", "uint8")
        for zeros in (True, False)
    },
    "blocks of 4 bits": blocks_of_4_bits(),
}


@pytest.mark.parametrize("case", OPERATORS)
def test_operators_on_integers_become_layers(case, tmp_path):
    nodes, x, constants = OPERATORS[case]
    nodes = nodes if isinstance(nodes, list) else [nodes]
    tensors = {k: v for k, v in constants.items() if isinstance(v, onnx.TensorProto)}
    arrays = {k: v for k, v in constants.items() if k not in tensors}
    source = models.model(
        nodes,
        {"x": (FLOAT, x.shape)},
        {"y": (FLOAT, None)},
        arrays,
        opset=21,
        domains=[(MICROSOFT, 1)],
    )
    source.graph.initializer.extend(tensors.values())
    (wanted,) = models.run(source, {"x": x})
    bank = tmp_path / "m.bank"
    report = build_bank(source, bank, levels=[32, 8], workers=1, progress=False)
    assert [layer.name for layer in Bank.open(bank).manifest.layers] == ["layer"]
    assert report.kept_in_float == 0
    exact = case.startswith(("MatMulN", "Gather", "blocks"))  # the others round activations, too
    with bapq_edge.Session(bank) as session:
        for level, error in ((32, 1e-6 if exact else 0.02), (8, 0.02)):
            session.set_level(level)
            (have,) = session.run(None, {"x": x})
            assert np.linalg.norm(have - wanted) < error * np.linalg.norm(wanted)


def test_a_quantized_lstm_is_one_of_floats(tmp_path):
    columns, hidden = 24, 16
    constants = {
        "w": BYTES[: columns * 4 * hidden].reshape(1, columns, -1),
        "r": BYTES[: 4 * hidden * hidden].reshape(1, hidden, -1),
        "b": weights(1, 8 * hidden),
        "ws": np.full(1, 0.01, np.float32),
        "wz": np.full(1, 5, np.int8),
        "rs": np.full(1, 0.02, np.float32),
        "rz": np.zeros(1, np.int8),
    }
    inputs = ["x", "w", "r", "b", "", "", "", "", "ws", "wz", "rs", "rz"]
    source = models.model(
        [microsoft("DynamicQuantizeLSTM", inputs, ["y"], hidden_size=hidden)],
        {"x": (FLOAT, [7, 2, columns])},
        {"y": (FLOAT, None)},
        constants,
        domains=[(MICROSOFT, 1)],
    )
    x = weights(7, 2, columns)
    (wanted,) = models.run(source, {"x": x})
    spell_integers_out(source)
    assert models.operators(source) == ["LSTM"]
    (have,) = models.run(source, {"x": x})
    assert np.abs(have - wanted).max() < 0.06  # activations are rounded there


def test_what_a_form_leaves_open_stays(tmp_path):
    """A computed scale of weights, and products that nobody scales."""
    source = models.model(
        [
            node("DynamicQuantizeLinear", ["x"], ["q", "t", "u"]),
            microsoft("DynamicQuantizeMatMul", ["x", "w", "s"], ["y"]),
            node("MatMulInteger", ["q", "w", "u"], ["z"]),
        ],
        {"x": (FLOAT, [5, 32]), "s": (FLOAT, [1])},
        {"y": (FLOAT, None), "z": (INT32, None)},
        {"w": BYTES[:1280].reshape(32, 40)},
        domains=[(MICROSOFT, 1)],
    )
    before = source.SerializeToString(deterministic=True)
    spell_integers_out(source)
    assert source.SerializeToString(deterministic=True) == before


def test_scales_along_an_axis_stay_along_theirs(tmp_path):
    """Rows of a table with a scale each, and one name for two tensors in two branches."""
    table = BYTES[:1280].reshape(40, 32)
    branches = []
    for scale, name in (("s", "then_branch"), ("t", "else_branch")):
        nodes = [
            node("QuantizeLinear", ["x", scale, "z"], ["q"]),
            microsoft("QLinearLeakyRelu", ["q", scale, "z", scale, "z"], ["r"], alpha=0.5),
            node("DequantizeLinear", ["r", scale, "z"], [f"out_{name}"]),
        ]
        out = helper.make_tensor_value_info(f"out_{name}", FLOAT, None)
        branches.append((name, helper.make_graph(nodes, name, [], [out])))
    source = models.model(
        [
            node("Gather", ["w", "i"], ["g"]),
            node("DequantizeLinear", ["g", "row", "zeros"], ["y"], axis=1),
            node("If", ["c"], ["z_out"], **dict(branches)),
        ],
        {"x": (FLOAT, [5, 32]), "i": (INT64, [3]), "c": (TensorProto.BOOL, [])},
        {"y": (FLOAT, None), "z_out": (FLOAT, None)},
        {
            "w": table,
            "row": np.abs(weights(32)),
            "zeros": BYTES[:32],
            "s": np.float32(0.05),
            "t": np.float32(0.01),
            "z": np.uint8(128),
        },
        domains=[(MICROSOFT, 1)],
    )
    cases = [
        {"x": X, "i": np.array([3, 0, 39]), "c": np.array(condition)} for condition in (True, False)
    ]
    wanted = [models.run(source, feeds) for feeds in cases]
    spell_integers_out(source)
    resolve_quantization(source)
    assert "com.microsoft.QLinearLeakyRelu" not in models.operators(source)
    for feeds, (y, z) in zip(cases, wanted, strict=True):
        have_y, have_z = models.run(source, feeds)
        np.testing.assert_array_equal(have_y, y)
        assert np.abs(have_z - z).max() < 0.06


def test_bits_that_do_not_fit_stay_and_are_told(tmp_path):
    layer, x, constants = matmul_bits(4, 32, None)
    constants["w"] = constants["w"][:, :2]
    source = models.model(
        [layer], {"x": (FLOAT, x.shape)}, {"y": (FLOAT, None)}, constants, domains=[(MICROSOFT, 1)]
    )
    with pytest.raises(NoHeavyLayerError, match=r"MatMulNBits 'layer', in a form"):
        build_bank(source, tmp_path / "m.bank", levels=[8], workers=1, progress=False)
