"""Reads a .tflite file as an ONNX model, by tf2onnx in a process of its own."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from bapq_edge.compat.tflite_facts import KEY, Quantization, Signature, TFLiteFacts
from bapq_edge.errors import MissingExtraError, ModelFormatError, UnsupportedModelError
from bapq_edge.input_files import check_input_file

__all__ = ["ConvertedModel", "convert_tflite", "is_tflite"]

_CONVERTER = Path(__file__).with_name("tflite_converter.py")
_PACKAGES = ("tf2onnx", "ai_edge_litert")


@dataclass(frozen=True)
class ConvertedModel:
    """A .tflite file as ONNX."""

    model: onnx.ModelProto
    """Inputs and outputs are named and ordered as in the file; what it says of them stands in the
    metadata, see `bapq_edge.compat.tflite_facts`."""
    plain: onnx.ModelProto
    """The same graph, not optimized; what every operator of the file makes is an output, by its
    name in the file."""


def is_tflite(source: object) -> bool:
    """Whether it is the path of a .tflite file, by its name."""
    return isinstance(source, str | os.PathLike) and os.fsdecode(source).endswith(".tflite")


def convert_tflite(path: str | os.PathLike[str]) -> ConvertedModel:
    """Convert the file.

    Raises:
        InputFileError: the file cannot be read.
        MissingExtraError: the extra [tflite] is not installed.
        ModelFormatError: it is no .tflite file, or a broken one.
        UnsupportedModelError: LiteRT or tf2onnx cannot take it; the message says what.
    """
    check_input_file(path)
    for package in _PACKAGES:
        if importlib.util.find_spec(package) is None:
            raise MissingExtraError(
                f"a .tflite file needs {package}, which is not installed: "
                "pip install 'bapq-edge[tflite]'"
            )
    with tempfile.TemporaryDirectory(prefix="bapq-tflite-") as name:
        folder = Path(name)
        process = subprocess.run(
            [sys.executable, str(_CONVERTER), os.fspath(path), name],
            capture_output=True,
            text=True,
            errors="replace",
        )
        if (folder / "error.json").exists():
            error = json.loads((folder / "error.json").read_text(encoding="utf-8"))
            kind = ModelFormatError if error["broken"] else UnsupportedModelError
            raise kind(f"{os.fspath(path)}: {error['message']}")
        if process.returncode:
            raise _crash(os.fspath(path), process)
        facts = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
        model, plain = (onnx.load(folder / file) for file in ("model.onnx", "plain.onnx"))
    for side in ("input", "output"):
        _order(getattr(model.graph, side), facts[f"{side}s"], os.fspath(path))
    model.metadata_props.add(key=KEY, value=_text(facts))
    return ConvertedModel(model, plain)


def _crash(path: str, process: subprocess.CompletedProcess[str]) -> Exception:
    if process.returncode < 0:
        name = signal.Signals(-process.returncode).name
        return ModelFormatError(f"{path}: LiteRT crashes on it ({name}): the file is broken")
    lines = process.stderr.strip().splitlines() or ["no message"]
    return UnsupportedModelError(f"{path}: tf2onnx cannot convert it: {lines[-1]}")


def _order(values: Any, names: list[str], path: str) -> None:
    """Bring graph inputs or outputs into the order of the file."""
    by_name = {value.name: value for value in values}
    if set(by_name) != set(names):
        raise UnsupportedModelError(
            f"{path}: tf2onnx makes {sorted(by_name)} of {sorted(names)}: export ONNX from the "
            "source of the model"
        )
    ordered = [by_name[name] for name in names]
    copies = [onnx.ValueInfoProto.FromString(value.SerializeToString()) for value in ordered]
    del values[:]
    values.extend(copies)


def _text(facts: dict[str, Any]) -> str:
    quantization = {
        name: Quantization(tuple(each["scales"]), tuple(each["zero_points"]), each["axis"])
        for name, each in facts["quantization"].items()
    }
    signatures = {
        key: Signature(each["inputs"], each["outputs"]) for key, each in facts["signatures"].items()
    }
    return TFLiteFacts(quantization, signatures).to_metadata()
