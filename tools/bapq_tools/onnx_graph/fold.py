"""Constant folding and batch-norm folding, by ONNX Runtime's own offline optimizer."""

from __future__ import annotations

import re
import shutil
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

import onnx
import onnxruntime as ort
from onnx import TensorProto

from bapq_edge.errors import StorageError, UnsupportedModelError

from . import graphs
from .importers.onnx_file import load_external_data
from .spell_out import spell_out

_SILENT = 4
"""ORT's log severity "fatal": errors reach us as exceptions."""

_DISABLED_OPTIMIZERS = [
    "MatMulAddFusion",  # would wrap Gemm in Reshapes; the layers stage fuses the bias itself
]

_EXTERNAL_ALIGNMENT = 4096


def fold(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with constants computed, batch norms folded and products in standard form.

    Raises:
        UnsupportedModelError: ONNX Runtime cannot load the model.
        StorageError: no room for the temporary copies.
    """
    with TemporaryDirectory(prefix="bapq-fold-") as name:
        folder = Path(name)
        _save(model, folder)
        _optimize(folder)
        folded = onnx.load_model(folder / "folded.onnx", load_external_data=False)
        load_external_data(folded, folder)
    _check_operators(model, folded)
    _restore_borders(model, folded)
    spell_out(folded)
    graphs.remove_dead(folded.graph)
    return folded


def _save(model: onnx.ModelProto, folder: Path) -> None:
    """Write the model with its weights in a file of their own: protobuf ends at 2 GiB."""
    needed = 2 * sum(len(tensor.raw_data) for tensor in graphs.tensors(model.graph))
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise StorageError(
            f"folding needs {needed} bytes of temporary space, {folder.parent} has {free}; "
            "free some, or name another folder in TMPDIR"
        )
    light = graphs.without_weights(model)
    with open(folder / "weights.bin", "wb") as file:
        for source, target in zip(model.graph.initializer, light.graph.initializer, strict=True):
            if len(source.raw_data) > len(target.raw_data):
                file.seek(-file.tell() % _EXTERNAL_ALIGNMENT, 1)
                target.data_location = TensorProto.EXTERNAL
                place = {
                    "location": "weights.bin",
                    "offset": file.tell(),
                    "length": len(source.raw_data),
                }
                for key, value in place.items():
                    target.external_data.add(key=key, value=str(value))
                file.write(source.raw_data)
    try:
        (folder / "model.onnx").write_bytes(light.SerializeToString())
    except ValueError as error:
        raise UnsupportedModelError(
            "the model holds more than 2 GiB outside of its initializers; export it with weights "
            "in initializers"
        ) from error


def _optimize(folder: Path) -> None:
    options = ort.SessionOptions()
    options.log_severity_level = _SILENT
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(folder / "folded.onnx")
    options.add_session_config_entry(
        "session.optimized_model_external_initializers_file_name", "folded.bin"
    )
    options.add_session_config_entry("session.disable_prepacking", "1")
    options.enable_cpu_mem_arena = False
    try:
        ort.InferenceSession(
            str(folder / "model.onnx"),
            options,
            providers=["CPUExecutionProvider"],
            disabled_optimizers=_DISABLED_OPTIMIZERS,
        )
    except Exception as error:  # ORT's exceptions have no common base below Exception
        raise UnsupportedModelError(
            f"ONNX Runtime {ort.__version__} cannot load the model: {_reason(error)}; "
            "check that it runs there first"
        ) from error


def _reason(error: Exception) -> str:
    """ORT's message on one line, without its source positions and our temporary path."""
    text = " ".join(str(error).split())
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", text)
    text = re.sub(r"Load model from \S+ failed: ?", "", text)
    text = re.sub(r"/\S*onnxruntime\S*\.(?:cc|h):\d+ .*?\) (?=[A-Z])", "", text)
    return text[:300].rstrip(" .")


def _check_operators(model: onnx.ModelProto, folded: onnx.ModelProto) -> None:
    new = _foreign_operators(folded) - _foreign_operators(model)
    if new:
        domain, op_type = next(iter(new))
        raise UnsupportedModelError(
            f"ONNX Runtime {ort.__version__} folds the model into its own operator "
            f"{domain}.{op_type}, which no other version need know; use another version"
        )


def _foreign_operators(model: onnx.ModelProto) -> Counter[tuple[str, str]]:
    return Counter(
        (node.domain, node.op_type)
        for part in graphs.walk(model.graph)
        for node in part.node
        if not graphs.is_standard(node)
    )


def _restore_borders(model: onnx.ModelProto, folded: onnx.ModelProto) -> None:
    """Give inputs, outputs and metadata the words of the source; ORT rewrites some of them."""
    for name in ("input", "output"):
        source = {item.name: item for item in getattr(model.graph, name)}
        for item in getattr(folded.graph, name):
            declared = source[item.name].type
            if declared.WhichOneof("value") != "tensor_type" or declared.tensor_type.HasField(
                "shape"
            ):
                item.CopyFrom(source[item.name])
    del folded.metadata_props[:]
    folded.metadata_props.extend(model.metadata_props)
    used = {node.domain for part in graphs.walk(folded.graph) for node in part.node}
    graphs.delete_where(folded.opset_import, lambda item: item.domain and item.domain not in used)
