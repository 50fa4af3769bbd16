"""The float model in ONNX Runtime: what a bank's answers are compared with."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import onnx
import onnxruntime
from numpy.typing import NDArray

from bapq_edge.errors import ExecutionError, ModelFormatError, RequestError

__all__ = ["name_of", "open_float_model", "run_graph"]

FloatModel = str | os.PathLike[str] | onnx.ModelProto


def name_of(model: FloatModel) -> str:
    """What messages call it."""
    return "the reference model" if isinstance(model, onnx.ModelProto) else os.fspath(model)


def open_float_model(model: FloatModel, inputs: Iterable[str], outputs: Iterable[str]) -> Any:
    """An `onnxruntime.InferenceSession` of the model, on one thread.

    Raises ModelFormatError where ONNX Runtime refuses it, RequestError where it has not the inputs
    and outputs of the bank.
    """
    where = name_of(model)
    if isinstance(model, onnx.ModelProto):
        source: str | bytes = model.SerializeToString()
    else:
        source = os.fspath(model)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    try:
        session = onnxruntime.InferenceSession(source, options, ["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime raises classes of its own
        reason = str(error).splitlines()[0]
        raise ModelFormatError(f"{where}: ONNX Runtime refuses it: {reason}") from error
    for kind, own, of_bank in (
        ("inputs", session.get_inputs(), inputs),
        ("outputs", session.get_outputs(), outputs),
    ):
        found, wanted = sorted(item.name for item in own), sorted(of_bank)
        if found != wanted:
            raise RequestError(
                f"{where} has the {kind} {', '.join(found)}, the bank {', '.join(wanted)}: "
                "give the model that the bank was built from"
            )
    return session


def run_graph(
    session: Any, outputs: Sequence[str], feed: Mapping[str, Any], where: str
) -> list[NDArray[Any]]:
    """One run of an ONNX Runtime session; raises ExecutionError."""
    try:
        return list(session.run(outputs, dict(feed)))
    except Exception as error:  # ONNX Runtime raises classes of its own, without a common base
        reason = " ".join(str(error).split())
        raise ExecutionError(f"{where}: ONNX Runtime: {reason}") from error
