"""What a .tflite file says of its inputs and outputs and an ONNX graph cannot.

The host writes it into the custom metadata of the bank's graph, under `KEY`; only the Interpreter
reads it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

from ..bank.strict_json import Place, decode, encode, parse_json

__all__ = ["KEY", "Quantization", "Signature", "TFLiteFacts"]

KEY = "bapq.tflite"
_MAX_BYTES = 1 << 20


@dataclass(frozen=True)
class Quantization:
    """How integers of a tensor stand for numbers: (integer - zero point) * scale."""

    scales: tuple[float, ...]
    """One, or one per index of the axis."""
    zero_points: tuple[int, ...]
    axis: int = 0


@dataclass(frozen=True)
class Signature:
    """Names that a program calls inputs and outputs by; values are names of tensors."""

    inputs: dict[str, str]
    outputs: dict[str, str]


@dataclass(frozen=True)
class TFLiteFacts:
    """Quantization by name of a tensor, and signatures by key."""

    quantization: dict[str, Quantization] = field(default_factory=dict)
    signatures: dict[str, Signature] = field(default_factory=dict)

    def to_metadata(self) -> str:
        """The text for the metadata."""
        return json.dumps(encode(self), sort_keys=True)

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str], bank: str) -> TFLiteFacts:
        """Read them, or nothing where the bank was not built from a .tflite file.

        Raises BankFormatError for what is malformed.
        """
        if KEY not in metadata:
            return cls()
        where = f"{bank}: metadata {KEY}"
        document = parse_json(metadata[KEY].encode() + b"\n", where, _MAX_BYTES)
        facts: TFLiteFacts = decode(cls, document, Place(where, ""))
        return facts
