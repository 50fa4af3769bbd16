"""Fused blocks of transformers: their weights become layers, and the numbers stay."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import helper

import bapq_edge
from bapq_edge.bank.reader import Bank
from bapq_tools import build_bank
from support import onnx_models as models
from support.onnx_models import FLOAT, INT32, weights

pytestmark = pytest.mark.filterwarnings("ignore::bapq_edge.errors.UncalibratedWarning")

node = helper.make_node
BATCH, LENGTH, HEADS, HIDDEN = 2, 6, 4, 32
X = weights(BATCH, LENGTH, HIDDEN)
BYTES = np.random.default_rng(0).integers(-100, 100, 4096).astype(np.int8)
MASKS = {
    "none": None,
    "lengths": np.array([4, 6], np.int32),
    "tokens": np.array([[0, 1, 1, 0, 1, 0], [1] * 6], np.int32),
    "pairs": np.tril(np.ones((BATCH, LENGTH, LENGTH), np.int32)),
}


def microsoft(kind, inputs, outputs, **attributes):
    return node(kind, inputs, outputs, "block", domain="com.microsoft", **attributes)


def built(nodes, feeds, constants, tmp_path, *, opset=17, outputs=("y",)):
    """The names of the layers, what ONNX Runtime answers with the model, and with the bank."""
    types = {np.float32: FLOAT, np.int32: INT32}
    model = models.model(
        nodes,
        {key: (types[array.dtype.type], [None] * array.ndim) for key, array in feeds.items()},
        {name: (INT32 if name == "lengths" else FLOAT, None) for name in outputs},
        constants,
        opset=opset,
        domains=[("com.microsoft", 1)],
    )
    bank = tmp_path / "m.bank"
    build_bank(model, bank, levels=[32, 8], workers=1, progress=False)
    with bapq_edge.Session(bank, level=32) as session:
        have = session.run(None, feeds)
    names = [layer.name for layer in Bank.open(bank).manifest.layers]
    return names, models.run(model, feeds), have


def close(have, wanted, error=1e-5):
    for a, b in zip(have, wanted, strict=True):
        assert np.linalg.norm(a - b) <= error * np.linalg.norm(b)


@pytest.mark.parametrize("causal", [0, 1])
@pytest.mark.parametrize("opset", [12, 17])
@pytest.mark.parametrize("mask", MASKS)
def test_attention_is_a_product_and_heads(mask, opset, causal, tmp_path):
    feeds = {"x": X} | ({} if MASKS[mask] is None else {"m": MASKS[mask]})
    inputs = ["x", "w", "b", *(["m"] if "m" in feeds else [])]
    attend = microsoft("Attention", inputs, ["y"], num_heads=HEADS, unidirectional=causal)
    constants = {"w": weights(HIDDEN, 3 * HIDDEN) * 0.2, "b": weights(3 * HIDDEN)}
    names, wanted, have = built([attend], feeds, constants, tmp_path, opset=opset)
    assert names == ["block"]
    close(have, wanted)


def test_attention_of_other_sizes_and_with_scores_added(tmp_path):
    feeds = {"x": X, "a": weights(BATCH, HEADS, LENGTH, LENGTH)}
    sizes = [24, 24, 40]
    attend = microsoft(
        "Attention",
        ["x", "w", "b", "", "", "a"],
        ["y"],
        num_heads=HEADS,
        qkv_hidden_sizes=sizes,
        scale=0.3,
    )
    constants = {"w": weights(HIDDEN, sum(sizes)) * 0.2, "b": weights(sum(sizes))}
    names, wanted, have = built([attend], feeds, constants, tmp_path)
    assert names == ["block"]
    close(have, wanted)


def test_quantized_attention_is_a_product_and_heads(tmp_path):
    constants = {
        "t": np.float32(0.03),
        "u": np.uint8(128),
        "w": BYTES[: HIDDEN * 96].reshape(HIDDEN, 96),
        "s": np.float32(0.004),
        "z": np.int8(0),
        "b": weights(96),
    }
    nodes = [
        node("QuantizeLinear", ["x", "t", "u"], ["q"]),
        microsoft("QAttention", ["q", "w", "b", "t", "s", "m", "u", "z"], ["y"], num_heads=HEADS),
    ]
    feeds = {"x": X, "m": MASKS["lengths"]}
    names, wanted, have = built(nodes, feeds, constants, tmp_path)
    assert names == ["block"]
    close(have, wanted, 0.02)


@pytest.mark.parametrize("opset", [12, 17])
@pytest.mark.parametrize("segments", [True, False])
@pytest.mark.parametrize("mask", [True, False])
@pytest.mark.parametrize("positions", [True, False])
def test_tables_of_embeddings_become_layers(segments, mask, positions, opset, tmp_path):
    rng = np.random.default_rng(0)
    feeds = {"ids": rng.integers(0, 50, (BATCH, LENGTH)).astype(np.int32)}
    if segments:
        feeds["kind"] = rng.integers(0, 40, (BATCH, LENGTH)).astype(np.int32)
    if mask:
        feeds["mask"] = MASKS["tokens"]
    if positions:
        feeds["at"] = rng.integers(0, 40, (BATCH, LENGTH)).astype(np.int32)
    constants = {
        "words": weights(50, HIDDEN),
        "places": weights(40, HIDDEN),
        "kinds": weights(40, HIDDEN, seed=1),
        "gamma": weights(HIDDEN),
        "beta": weights(HIDDEN, seed=1),
    }
    if not segments:
        del constants["kinds"]
    wanted_names = ["ids", "kind", "words", "places", "kinds", "gamma", "beta", "mask", "at"]
    inputs = [name if name in feeds or name in constants else "" for name in wanted_names]
    outputs = ["y", "lengths", "sum"]
    embed = microsoft("EmbedLayerNormalization", inputs, outputs, epsilon=1e-6)
    names, wanted, have = built([embed], feeds, constants, tmp_path, opset=opset, outputs=outputs)
    assert sorted(names) == [
        "block_positions",
        *(["block_segments"] if segments else []),
        "block_words",
    ]
    close(have, wanted)


def test_lengths_from_embeddings_are_a_mask_of_attention(tmp_path):
    ids = np.array([[1, 2, 3], [4, 5, 0]], np.int32)
    constants = {
        "words": weights(50, HIDDEN),
        "places": weights(40, HIDDEN),
        "gamma": weights(HIDDEN),
        "beta": weights(HIDDEN, seed=1),
        "w": weights(HIDDEN, 3 * HIDDEN) * 0.2,
        "b": weights(3 * HIDDEN),
    }
    inputs = ["ids", "", "words", "places", "", "gamma", "beta", "mask"]
    nodes = [
        microsoft("EmbedLayerNormalization", inputs, ["e", "m"]),
        microsoft("Attention", ["e", "w", "b", "m"], ["y"], num_heads=HEADS),
    ]
    nodes[1].name = "attention"
    feeds = {"ids": ids, "mask": np.array([[1, 1, 1], [1, 1, 0]], np.int32)}
    names, wanted, have = built(nodes, feeds, constants, tmp_path)
    assert sorted(names) == ["attention", "block_positions", "block_words"]
    close(have, wanted)


def test_quantized_tables_of_embeddings_become_layers(tmp_path):
    ids = np.array([[1, 2, 3], [4, 5, 49]], np.int32)
    tables = {"words": (50, HIDDEN), "places": (40, HIDDEN), "kinds": (40, HIDDEN)}
    tables |= {"gamma": (HIDDEN,), "beta": (HIDDEN,)}
    constants = {name: BYTES[: np.prod(shape)].reshape(shape) for name, shape in tables.items()}
    constants |= {f"{name}_scale": np.float32(0.01 + 0.001 * i) for i, name in enumerate(tables)}
    constants |= {f"{name}_zero": np.int8(i) for i, name in enumerate(tables)}
    inputs = ["ids", "kind", *tables, ""]
    inputs += [f"{name}_{part}" for part in ("scale", "zero") for name in tables]
    embed = microsoft("QEmbedLayerNormalization", inputs, ["y", "lengths"])
    feeds = {"ids": ids, "kind": np.zeros_like(ids)}
    names, wanted, have = built([embed], feeds, constants, tmp_path)
    assert len(names) == 3
    close(have, wanted)


@pytest.mark.parametrize("kind", ["BiasGelu", "FastGelu"])
def test_a_bias_inside_an_activation_becomes_the_layers(kind, tmp_path):
    nodes = [node("MatMul", ["x", "w"], ["p"], "layer"), microsoft(kind, ["p", "b"], ["y"])]
    constants = {"w": weights(HIDDEN, 48), "b": weights(48)}
    names, wanted, have = built(nodes, {"x": X}, constants, tmp_path)
    assert names == ["layer"]
    assert Bank.open(tmp_path / "m.bank").manifest.layers[0].has_bias
    close(have, wanted, 1e-4)


@pytest.mark.parametrize("length", [3, 0])
def test_attention_keeps_its_past(length, tmp_path):
    constants = {"w": weights(HIDDEN, 3 * HIDDEN) * 0.2, "b": weights(3 * HIDDEN)}
    outputs = ["y", "present"]
    attend = microsoft(
        "Attention", ["x", "w", "b", "", "p"], outputs, num_heads=HEADS, unidirectional=1
    )
    feeds = {"x": X, "p": weights(2, BATCH, HEADS, length, HIDDEN // HEADS)}
    names, wanted, have = built([attend], feeds, constants, tmp_path, outputs=outputs)
    assert names == ["block"]
    close(have, wanted)


def test_attention_with_part_of_a_past_stays_with_its_reason(tmp_path):
    constants = {
        "w": weights(HIDDEN, 3 * HIDDEN),
        "b": weights(3 * HIDDEN),
        "v": weights(HIDDEN, 48),
    }
    attend = microsoft("Attention", ["x", "w", "b"], ["a", "present"], num_heads=HEADS)
    nodes = [attend, node("MatMul", ["a", "v"], ["y"], "layer")]
    names, wanted, have = built(nodes, {"x": X}, constants, tmp_path, outputs=("y", "present"))
    assert names == ["layer"]
    (kept,) = Bank.open(tmp_path / "m.bank").manifest.kept_in_float
    assert kept.reason.startswith("attention with rotary positions")
    close(have, wanted)
