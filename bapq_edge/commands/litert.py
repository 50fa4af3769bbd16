"""A .tflite file in LiteRT, for `bapq bench --against`: nothing else on a device needs LiteRT."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..engine.feeds import NUMPY_TYPES
from ..errors import ExecutionError, MissingExtraError, ModelFormatError, RunInputError

__all__ = ["LiteRTModel"]

_PACKAGES = ("ai_edge_litert", "tflite_runtime")
"""The newer one first."""


@dataclass(frozen=True)
class _Tensor:
    """In the shape of `onnxruntime.NodeArg`."""

    name: str
    shape: list[int]
    """-1 on an open axis."""
    type: str


class LiteRTModel:
    """The model in the shape of a session: `get_inputs`, `get_outputs` and `run`."""

    def __init__(self, path: Path, threads: int | None) -> None:
        """Open the file; None is one thread per core, as for a bank.

        Raises MissingExtraError, or ModelFormatError for what LiteRT refuses.
        """
        cores = len(os.sched_getaffinity(0))
        try:
            self._interpreter = _interpreter_class()(str(path), num_threads=threads or cores)
            self._interpreter.allocate_tensors()
        except (ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise ModelFormatError(f"{path}: LiteRT refuses it: {reason}") from None
        self._path = path
        self._details = self._interpreter.get_input_details()
        self._output_details = self._interpreter.get_output_details()

    def get_inputs(self) -> list[_Tensor]:
        """The inputs, by their names in the file."""
        return [_tensor(each) for each in self._details]

    def get_outputs(self) -> list[_Tensor]:
        """The outputs, by their names in the file."""
        return [_tensor(each) for each in self._output_details]

    def run(self, output_names: None, input_feed: Mapping[str, Any]) -> list[Any]:
        """Run on an array for each input. Raises RunInputError or ExecutionError."""
        names = {each["name"] for each in self._details}
        if set(input_feed) != names:
            raise RunInputError(
                f"the feed has {sorted(input_feed)}, the model needs {sorted(names)}"
            )
        interpreter = self._interpreter
        try:
            for each in self._details:
                value = np.asarray(input_feed[each["name"]])
                if value.shape != tuple(each["shape"]):
                    interpreter.resize_tensor_input(each["index"], value.shape)
                    interpreter.allocate_tensors()
                    each["shape"] = value.shape
                interpreter.set_tensor(each["index"], value)
            interpreter.invoke()
        except (ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise ExecutionError(f"{self._path.name}: LiteRT: {reason}") from None
        return [interpreter.get_tensor(each["index"]) for each in self._output_details]


def _tensor(details: Mapping[str, Any]) -> _Tensor:
    types = {np.dtype(dtype): name for name, dtype in NUMPY_TYPES.items()}
    return _Tensor(
        details["name"],
        [int(size) for size in details["shape_signature"]],
        types.get(np.dtype(details["dtype"]), "none"),
    )


def _interpreter_class() -> Any:
    for package in _PACKAGES:
        try:
            return importlib.import_module(f"{package}.interpreter").Interpreter
        except ImportError:
            continue
    raise MissingExtraError(
        "a .tflite file runs in LiteRT, which is not installed: pip install ai-edge-litert"
    )
