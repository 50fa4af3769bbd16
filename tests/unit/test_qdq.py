"""QDQ models become float models: constants dequantized, pairs a Clip to their range."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxruntime import quantization

from bapq_tools.onnx_graph.importers.onnx_file import load_model
from support import onnx_models as models
from support.onnx_models import FLOAT, load, weights

node = helper.make_node


class Samples(quantization.CalibrationDataReader):
    def __init__(self, samples: list[np.ndarray]) -> None:
        self.samples = iter([{"x": sample} for sample in samples])

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.samples, None)


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("activation", ["QUInt8", "QInt8", "QUInt16"])
def test_qdq_model_is_a_float_model_again(
    activation: str, per_channel: bool, tmp_path: Path
) -> None:
    source = models.model(
        [
            node("Conv", ["x", "k", "kb"], ["c"], kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
            node("Relu", ["c"], ["r"]),
            node("GlobalAveragePool", ["r"], ["pool"]),
            node("Flatten", ["pool"], ["f"]),
            node("Gemm", ["f", "w", "b"], ["y"]),
        ],
        {"x": (FLOAT, ["batch", 8, 6, 6])},
        {"y": (FLOAT, ["batch", 40])},
        {"k": weights(32, 8, 3, 3), "kb": weights(32), "w": weights(32, 40), "b": weights(40)},
    )
    path, quantized = tmp_path / "float.onnx", tmp_path / "qdq.onnx"
    path.write_bytes(source.SerializeToString())
    samples = [weights(2, 8, 6, 6, seed=seed) for seed in range(4)]
    quantization.quantize_static(
        path,
        quantized,
        Samples(samples),
        quant_format=quantization.QuantFormat.QDQ,
        per_channel=per_channel,
        activation_type=quantization.QuantType[activation],
        weight_type=quantization.QuantType.QInt8,
    )
    if activation != "QInt8":  # zero point 0: the quantizer drops the Relu, the range implies it
        assert "Relu" not in models.operators(onnx.load_model(quantized))
    loaded = load_model(quantized)
    kinds = models.operators(loaded)
    assert not {"QuantizeLinear", "DequantizeLinear"} & set(kinds)
    assert "Clip" in kinds
    for sample in samples:
        want = models.run(source, {"x": sample})[0]
        have = models.run(loaded, {"x": sample})[0]
        assert np.abs(have - want).max() < 0.02 * np.abs(want).max()


def dequantize_model(
    constants: dict[str, np.ndarray | onnx.TensorProto], **attributes: int
) -> onnx.ModelProto:
    source = models.model(
        [
            node("DequantizeLinear", list(constants), ["w"], **attributes),
            node("Mul", ["w", "x"], ["y"]),
        ],
        {"x": (FLOAT, [1])},
        {"y": (FLOAT, None)},
        opset=21,
    )
    for name, value in constants.items():
        tensor = value if isinstance(value, onnx.TensorProto) else numpy_helper.from_array(value)
        tensor.name = name
        source.graph.initializer.append(tensor)
    return source


INT4_VALUES = helper.make_tensor("q", TensorProto.INT4, [5, 3], [*range(-8, 7)])
INT4_ZEROS = helper.make_tensor("z", TensorProto.INT4, [3, 3], [*range(-4, 5)])
BYTES = np.arange(24, dtype=np.uint8).reshape(4, 6) * 10
DEQUANTIZED = {
    "per tensor": ({"q": BYTES, "s": np.float32(0.1), "z": np.uint8(7)}, {}),
    "no zero point": ({"q": BYTES.astype(np.int8), "s": np.float32(0.1)}, {}),
    "per axis": (
        {"q": BYTES, "s": weights(6), "z": np.arange(6, dtype=np.uint8)},
        {"axis": 1},
    ),
    "first axis": ({"q": BYTES, "s": weights(4)}, {"axis": -2}),
    "int16": ({"q": BYTES.astype(np.int16) - 300, "s": np.float32(3), "z": np.int16(-9)}, {}),
    "int32 bias": (
        {"q": np.array([2**24 + 1, -(2**31)], np.int32), "s": weights(2)},
        {"axis": 0},
    ),
    "int4 blocks": ({"q": INT4_VALUES, "s": weights(3, 3), "z": INT4_ZEROS},
                    {"axis": 0, "block_size": 2}),
}  # fmt: skip


@pytest.mark.parametrize("case", DEQUANTIZED)
def test_dequantized_constants(case: str, tmp_path: Path) -> None:
    constants, attributes = DEQUANTIZED[case]
    source = dequantize_model(dict(constants), **attributes)
    loaded = load(source, tmp_path)
    assert models.operators(loaded) == ["Mul"]
    x = np.ones(1, np.float32)
    np.testing.assert_array_equal(models.run(loaded, {"x": x})[0], models.run(source, {"x": x})[0])


@pytest.mark.parametrize("opset", [10, 13])
def test_quantize_pair_keeps_its_range(opset: int, tmp_path: Path) -> None:
    source = models.model(
        [
            node("QuantizeLinear", ["x", "s", "z"], ["q"]),
            node("DequantizeLinear", ["q", "s", "z"], ["y"]),
        ],
        {"x": (FLOAT, [4])},
        {"y": (FLOAT, [4])},
        {"s": np.array(0.5, np.float32), "z": np.array(28, np.uint8)},
        opset=opset,
    )
    loaded = load(source, tmp_path)
    assert models.operators(loaded) == ["Clip"]
    x = np.array([-100, -14, 3, 1000], np.float32)
    np.testing.assert_array_equal(models.run(loaded, {"x": x})[0], [-14, -14, 3, 113.5])


def test_what_is_no_pair_stays(tmp_path: Path) -> None:
    source = models.model(
        [
            node("QuantizeLinear", ["x", "s", "z"], ["q"]),
            node("DequantizeLinear", ["q", "t", "z"], ["y"]),
            node("DequantizeLinear", ["u", "s", "z"], ["v"]),
        ],
        {"x": (FLOAT, [4]), "u": (TensorProto.UINT8, [4])},
        {"y": (FLOAT, [4]), "v": (FLOAT, [4])},
        {
            "s": np.array(0.5, np.float32),
            "t": np.array(0.25, np.float32),
            "z": np.array(28, np.uint8),
        },
    )
    kinds = models.operators(load(source, tmp_path))
    assert kinds == ["QuantizeLinear", "DequantizeLinear", "DequantizeLinear"]
