"""The models and data that everything else is judged on."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from bapq_edge.errors import ModelFormatError
from benchmarks.zoo import MODELS, make_model
from benchmarks.zoo.digits import (
    INPUT_NAMES,
    DigitsModel,
    calibration_npz,
    digits_cnn_path,
    digits_mlp_path,
    load_digits_split,
    split_of,
)
from benchmarks.zoo.digits_resnet import digits_resnet_path
from benchmarks.zoo.light_cnns import build_light_cnn
from benchmarks.zoo.minilm import build_minilm, encode, minilm_dir
from benchmarks.zoo.packed_weights import read_packed, round_weights, write_packed
from benchmarks.zoo.safetensors import read_safetensors
from benchmarks.zoo.sentences import load_sentences

TINY_ENCODER = {
    "model_type": "bert",
    "hidden_act": "gelu",
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "hidden_size": 8,
    "layer_norm_eps": 1e-12,
}


def run(path: Path, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, feeds)


@pytest.mark.parametrize("model", ["cnn", "mlp", "resnet"])
def test_bundled_digits_model_is_accurate(model: DigitsModel, tmp_path: Path) -> None:
    split = split_of(model)
    make_model(f"digits_{model}", tmp_path / "model.onnx")
    scores = run(tmp_path / "model.onnx", {INPUT_NAMES[model]: split.x_test})[-1]
    assert scores.shape == (600, 10)
    assert np.mean(scores.argmax(1) == split.y_test) >= 0.989


def test_cnn_keeps_batch_norm_and_bundle_is_small() -> None:
    operators = [node.op_type for node in onnx.load(digits_cnn_path()).graph.node]
    assert operators.count("BatchNormalization") == operators.count("Conv") == 4
    bundle = (digits_cnn_path(), digits_mlp_path(), digits_resnet_path())
    assert sum(path.stat().st_size for path in bundle) < 1_700_000


def test_resnet_has_a_million_weights_in_layers_of_all_kinds(tmp_path: Path) -> None:
    make_model("digits_resnet", tmp_path / "a.onnx")
    make_model("digits_resnet", tmp_path / "b.onnx")
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()
    graph = onnx.load(tmp_path / "a.onnx").graph
    operators = [node.op_type for node in graph.node]
    assert operators.count("BatchNormalization") == operators.count("Conv") == 22
    assert operators.count("Add") == 6
    weights = {x.name: onnx.numpy_helper.to_array(x) for x in graph.initializer}
    convolutions = [weights[node.input[1]] for node in graph.node if node.op_type == "Conv"]
    assert sum(weight.size for weight in convolutions) > 1_000_000
    assert sum(weight.shape[1:] == (1, 3, 3) for weight in convolutions) == 6  # the stem, and 5
    for weight in weights.values():
        np.testing.assert_array_equal(weight, round_weights(weight))


def test_digits_split_is_disjoint_and_scaled() -> None:
    split = load_digits_split()
    parts = (split.x_train, split.x_calibration, split.x_test)
    assert [part.shape for part in parts] == [(997, 1, 8, 8), (200, 1, 8, 8), (600, 1, 8, 8)]
    every = np.concatenate(parts)
    assert every.dtype == np.float32
    assert (every.min(), every.max()) == (0, 1)
    assert len({image.tobytes() for image in every}) == 1797
    flat = load_digits_split(flat=True)
    np.testing.assert_array_equal(flat.x_test, split.x_test.reshape(600, 64))
    assert min(np.bincount(split.y_test)) >= 55


def test_calibration_file_feeds_the_model(tmp_path: Path) -> None:
    calibration_npz(tmp_path / "calibration", "cnn")
    with np.load(tmp_path / "calibration") as data:
        logits = run(digits_cnn_path(), dict(data))[0]
    assert logits.shape == (200, 10)


def test_scaled_digits_are_what_resize_makes(tmp_path: Path) -> None:
    small, large = load_digits_split().x_test, split_of("resnet").x_test
    assert (large.shape, large.dtype) == ((600, 1, 32, 32), np.float32)
    text = """<ir_version: 8, opset_import: ["": 17]>
    g (float[n, 1, 8, 8] x) => (float[n, 1, 32, 32] y) <float[4] scales = {1, 1, 4, 4}> {
        y = Resize <mode = "linear"> (x, , scales)
    }"""
    onnx.save(onnx.parser.parse_model(text), tmp_path / "resize.onnx")
    (expected,) = run(tmp_path / "resize.onnx", {"x": small})
    np.testing.assert_allclose(large, expected, atol=1e-6)


PACKED_SHAPES: dict[str, tuple[int, ...]] = {"a": (3, 4, 5), "b": (6,), "c": (0, 2)}


def packed_samples() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0).standard_normal((3, 4, 5), np.float32)
    edges = np.array([0, -0.0, 1e-40, -1e30, 1 + 1 / 64, 1 + 3 / 64], np.float32)
    return {"a": random, "b": edges, "c": np.empty((0, 2), np.float32)}


def test_packed_weights_round_trip(tmp_path: Path) -> None:
    weights = packed_samples()
    write_packed(tmp_path / "x.xz", weights)
    read = read_packed(tmp_path / "x.xz", PACKED_SHAPES)
    assert list(read) == ["a", "b", "c"]
    for name, weight in weights.items():
        assert read[name].dtype == np.float32
        np.testing.assert_array_equal(read[name], round_weights(weight))
        np.testing.assert_allclose(read[name], weight, rtol=1 / 64, atol=1e-38)
    assert list(read["b"][-2:]) == [1, 1 + 2 / 32]  # ties to even
    assert np.signbit(read["b"][1])


@pytest.mark.parametrize("change", ["cut", "empty", "flipped", "longer", "fewer", "more"])
def test_damaged_packed_weights_are_refused(change: str, tmp_path: Path) -> None:
    path = tmp_path / "x.xz"
    weights = packed_samples()
    if change == "fewer":
        weights.pop("b")
    if change == "more":
        weights["d"] = weights["b"]
    write_packed(path, weights)
    raw = bytearray(path.read_bytes())
    raw[40] ^= change == "flipped"
    end = {"cut": len(raw) - 4, "empty": 0}.get(change, len(raw))
    path.write_bytes(raw[:end] + b"1234" * (change == "longer"))
    with pytest.raises(ModelFormatError, match=r"x\.xz does not hold the weights: "):
        read_packed(path, PACKED_SHAPES)


@pytest.mark.parametrize("name", ["squeezenet", "shufflenet"])
def test_light_cnn_is_deterministic_and_keeps_its_spread(name: str, tmp_path: Path) -> None:
    first, second, other = (tmp_path / file for file in ("a.onnx", "b.onnx", "c.onnx"))
    build_light_cnn(name, first)
    build_light_cnn(name, second)
    build_light_cnn(name, other, seed=1)
    assert first.read_bytes() == second.read_bytes()
    assert first.read_bytes() != other.read_bytes()
    graph = onnx.load(first).graph
    (image,) = graph.input
    assert not [node for node in graph.node if node.op_type == "ConstantOfShape"]
    noise = np.random.default_rng(0).standard_normal((1, 3, 224, 224), np.float32)
    probabilities = run(first, {image.name: noise})[0].ravel()
    assert probabilities.sum() == pytest.approx(1, abs=1e-4)
    assert 2 / 1000 < probabilities.max() < 0.99


def test_unknown_light_cnn_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'resnet18'.*resnet50"):
        build_light_cnn("resnet18", tmp_path / "x.onnx")


def test_sentences_are_distinct_prose() -> None:
    calibration, held_out = load_sentences()
    assert (len(calibration), len(held_out)) == (512, 600)
    assert len({*calibration, *held_out}) == 1112
    assert all(6 <= len(sentence.split()) <= 60 for sentence in calibration + held_out)


def test_minilm_tells_like_from_unlike(tmp_path: Path) -> None:
    files = minilm_dir()
    build_minilm(files, tmp_path / "minilm.onnx")
    feeds = encode(
        [
            "A cat sits on the mat.",
            "A kitten is resting on a rug.",
            "Parliament rejected the quarterly budget after a long and bitter debate.",
        ],
        files,
    )
    embedding, hidden = run(tmp_path / "minilm.onnx", feeds)
    assert hidden.shape == (*feeds["input_ids"].shape, 384)
    np.testing.assert_allclose(np.linalg.norm(embedding, axis=1), 1, atol=1e-5)
    similarity = embedding @ embedding.T
    assert similarity[0, 1] > 0.5
    assert abs(similarity[0, 2]) < 0.2

    (alone,) = run(tmp_path / "minilm.onnx", encode(["A cat sits on the mat."], files))[:1]
    np.testing.assert_allclose(alone[0], embedding[0], atol=1e-5)  # padding changes nothing


def test_encoder_graph_matches_numpy(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    weights = tiny_encoder_weights(random)
    write_safetensors(tmp_path / "model.safetensors", weights)
    (tmp_path / "config.json").write_text(json.dumps(TINY_ENCODER))
    build_minilm(tmp_path, tmp_path / "tiny.onnx")
    ids = random.integers(0, 11, (3, 5))
    mask = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]])
    embedding, hidden = run(tmp_path / "tiny.onnx", {"input_ids": ids, "attention_mask": mask})
    for sample, length in enumerate(mask.sum(1)):
        expected = reference_encoder(weights, ids[sample, :length])
        np.testing.assert_allclose(hidden[sample, :length], expected, atol=1e-4)
        mean = expected.mean(0)
        np.testing.assert_allclose(embedding[sample], mean / np.linalg.norm(mean), atol=1e-4)


def test_encoder_with_a_missing_tensor_is_refused(tmp_path: Path) -> None:
    weights = tiny_encoder_weights(np.random.default_rng(0))
    del weights["encoder.layer.1.output.dense.bias"]
    write_safetensors(tmp_path / "model.safetensors", weights)
    (tmp_path / "config.json").write_text(json.dumps(TINY_ENCODER))
    with pytest.raises(ModelFormatError, match=r"no 'encoder\.layer\.1\.output\.dense\.bias'"):
        build_minilm(tmp_path, tmp_path / "tiny.onnx")


def test_safetensors_round_trip(tmp_path: Path) -> None:
    arrays = {"b": np.arange(6, dtype=np.float32).reshape(2, 3), "empty": np.empty((0, 4), "<f4")}
    write_safetensors(tmp_path / "x.safetensors", arrays)
    read = read_safetensors(tmp_path / "x.safetensors")
    assert sorted(read) == ["b", "empty"]
    np.testing.assert_array_equal(read["b"], arrays["b"])
    assert read["empty"].shape == (0, 4)


GOOD = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"w": GOOD | {"data_offsets": [0, 20], "shape": [5]}}, r"spans 0\.\.20 of 16 data bytes"),
        ({"w": GOOD | {"data_offsets": [16, 0]}}, r"spans 16\.\.0 of 16"),
        ({"w": GOOD | {"data_offsets": [-16, 0]}}, r"offsets \[-16, 0\]"),
        ({"w": GOOD | {"shape": [2, 3]}}, r"spans 16 bytes, its shape needs 24"),
        ({"w": GOOD | {"shape": [True, 4]}}, r"shape \[True, 4\]"),
        ({"w": GOOD | {"dtype": "F8"}}, r"type 'F8'"),
        ({"w": GOOD | {"extra": 1}}, r"or has more"),
        ({"v": GOOD, "w": GOOD}, r"starts at 0, the one before ends 16"),
        ({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, r"cover 8 of 16"),
        ([GOOD], r"a list, not an object"),
        ('{"w": 1, "w": 1}', r"a key appears twice"),
        ("{", r"not valid JSON"),
        ("[" * 100_000, r"not valid JSON"),
    ],
)
def test_broken_safetensors_header_is_refused(header: Any, message: str, tmp_path: Path) -> None:
    text = header if isinstance(header, str) else json.dumps(header)
    raw = text.encode()
    (tmp_path / "x.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(16))
    with pytest.raises(ModelFormatError, match=message):
        read_safetensors(tmp_path / "x.safetensors")


@pytest.mark.parametrize("raw", [b"", b"\x02\0\0", b"\xff" * 8 + b"{}", b"\x03" + bytes(7) + b"{}"])
def test_truncated_safetensors_is_refused(raw: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(raw)
    with pytest.raises(ModelFormatError, match="does not fit a file of"):
        read_safetensors(tmp_path / "x.safetensors")


def test_command_line_writes_and_lists(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.zoo"]
    listed = subprocess.run([*command, "--list"], capture_output=True, text=True, check=True)
    assert tuple(listed.stdout.split()) == MODELS
    out = tmp_path / "cnn.onnx"
    subprocess.run([*command, "digits_cnn", str(out)], capture_output=True, check=True)
    assert out.read_bytes() == digits_cnn_path().read_bytes()


def write_safetensors(path: Path, arrays: dict[str, np.ndarray]) -> None:
    header, data = {}, b""
    for name, array in arrays.items():
        end = len(data) + array.nbytes
        header[name] = {"dtype": "F32", "shape": array.shape, "data_offsets": [len(data), end]}
        data += array.tobytes()
    raw = json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)


def tiny_encoder_weights(random: np.random.Generator) -> dict[str, np.ndarray]:
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (11, 8),
        "embeddings.position_embeddings.weight": (6, 8),
        "embeddings.token_type_embeddings.weight": (2, 8),
        "embeddings.LayerNorm.weight": (8,),
        "embeddings.LayerNorm.bias": (8,),
    }
    for layer in range(2):
        for part, out, columns in (
            ("attention.self.query", 8, 8),
            ("attention.self.key", 8, 8),
            ("attention.self.value", 8, 8),
            ("attention.output.dense", 8, 8),
            ("intermediate.dense", 16, 8),
            ("output.dense", 8, 16),
        ):
            shapes[f"encoder.layer.{layer}.{part}.weight"] = (out, columns)
            shapes[f"encoder.layer.{layer}.{part}.bias"] = (out,)
        for part in ("attention.output", "output"):
            shapes[f"encoder.layer.{layer}.{part}.LayerNorm.weight"] = (8,)
            shapes[f"encoder.layer.{layer}.{part}.LayerNorm.bias"] = (8,)
    return {name: random.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def reference_encoder(weights: dict[str, np.ndarray], ids: np.ndarray) -> np.ndarray:
    """BERT's encoder in float64 on one unpadded sentence: (sequence,) to (sequence, hidden)."""
    from math import erf

    w = {name: array.astype(np.float64) for name, array in weights.items()}
    gauss_error = np.vectorize(erf)

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        centred = x - x.mean(-1, keepdims=True)
        spread = np.sqrt(np.mean(centred**2, -1, keepdims=True) + TINY_ENCODER["layer_norm_eps"])
        return centred / spread * w[f"{name}.weight"] + w[f"{name}.bias"]

    x = w["embeddings.word_embeddings.weight"][ids]
    x = x + w["embeddings.position_embeddings.weight"][: len(ids)]
    x = norm(x + w["embeddings.token_type_embeddings.weight"][0], "embeddings.LayerNorm")
    for layer in range(2):
        name = f"encoder.layer.{layer}"
        query, key, value = (
            linear(x, f"{name}.attention.self.{part}").reshape(len(ids), 2, 4).swapaxes(0, 1)
            for part in ("query", "key", "value")
        )
        scores = np.exp(query @ key.swapaxes(1, 2) / 2)
        mixed = scores / scores.sum(-1, keepdims=True) @ value
        attended = linear(
            mixed.swapaxes(0, 1).reshape(len(ids), 8), f"{name}.attention.output.dense"
        )
        x = norm(x + attended, f"{name}.attention.output.LayerNorm")
        y = linear(x, f"{name}.intermediate.dense")
        y = y / 2 * (1 + gauss_error(y / np.sqrt(2)))
        x = norm(x + linear(y, f"{name}.output.dense"), f"{name}.output.LayerNorm")
    return x
