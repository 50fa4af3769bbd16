"""Reads an ONNX file into one plain float32 model that the passes understand.

Weights end up in initializers, local functions are inlined, other floats than float32 are converted
and QDQ pairs resolved, so that no later stage meets these forms.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import onnx
import onnx.inliner
import onnx.version_converter
from google.protobuf.message import DecodeError
from onnx import TensorProto

from bapq_edge.errors import FrozenInputWarning, ModelFormatError, UnsupportedModelError
from bapq_edge.input_files import check_input_file, input_file_errors
from bapq_edge.units import counted

from .. import graphs
from .constants import constants_to_initializers, drop_initializers_from_inputs
from .integer_operators import spell_integers_out
from .other_floats import to_float32
from .quantized import resolve_quantization

OLDEST_OPSET = 9

_LOWERED_OPSET = 13
"""No opset is lowered further: every ONNX Runtime that runs banks knows it, and what the build adds
to a graph need not be written in the older ways."""

_LAYOUTS = frozenset({"com.microsoft.nchwc", "com.ms.internal.nhwc"})
"""Domains of operators whose tensors lie as one kind of CPU reads them best."""


def check_model_source(source: object) -> None:
    """Refuse, before any work, what can be no model.

    Raises ModelFormatError for an object of another type, InputFileError for a file that cannot be
    read.
    """
    if isinstance(source, str | os.PathLike):
        check_input_file(source)
    elif not isinstance(source, onnx.ModelProto):
        raise ModelFormatError(
            f"the model is of type {type(source).__name__}: give an .onnx file or an "
            "onnx.ModelProto"
        )


def load_model(
    path: str | os.PathLike[str], external_data: str | os.PathLike[str] | None = None
) -> onnx.ModelProto:
    """Read an ONNX file, with its external data, and bring it into plain form.

    `external_data` is a folder that external data may lie in besides the model's own.

    Raises:
        ModelFormatError: not an ONNX model, broken, or its external data is missing or in no folder
            where it may lie.
        UnsupportedModelError: an opset that cannot be converted.
        InputFileError: the file cannot be read.
    """
    path = Path(path)
    model = _inline_functions(_parse(path))
    # Caches keep files under their digest, and link to them by name: a model's data then lies
    # beside the file that the model's own name leads to.
    others = [] if external_data is None else [Path(external_data)]
    load_external_data(model, path.parent, path.resolve().parent, others)
    _check_sizes(model, path)
    _check_layouts(model)
    open_dimensions(model)
    model = _convert_opset(model)
    _warn_of_frozen(drop_initializers_from_inputs(model))
    constants_to_initializers(model)
    to_float32(model)
    spell_integers_out(model)
    resolve_quantization(model)
    lower_versions(model)
    return model


def _warn_of_frozen(names: list[str]) -> None:
    if names:
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        warnings.warn(
            f"{counted(len(names), 'initializer')} that a caller may override as an input of the "
            f"model become constants of the bank: {shown}; where one is to be an input, remove its "
            "initializer from the model",
            FrozenInputWarning,
            stacklevel=5,
        )


def _parse(path: Path) -> onnx.ModelProto:
    data = _read(path)
    try:
        model: onnx.ModelProto = onnx.ModelProto.FromString(data)
    except DecodeError as error:
        raise ModelFormatError(
            f"{path} ({len(data)} bytes) is not an ONNX model, or a truncated one; export it again"
        ) from error
    if not model.HasField("graph") or not model.opset_import:
        raise ModelFormatError(
            f"{path} ({len(data)} bytes) is not a whole ONNX model: it lacks a graph or the list "
            "of opsets; export it again"
        )
    return model


def _read(path: Path, offset: int = 0, size: int = -1) -> bytes:
    with input_file_errors(path), open(path, "rb") as file:
        file.seek(offset)
        return file.read(size)


def load_external_data(
    model: onnx.ModelProto,
    folder: Path,
    linked: Path | None = None,
    others: Sequence[Path] = (),
) -> None:
    """Read tensors kept in files beside the model into the model.

    A name in `folder` may be a link to a file in `linked`. In `others` data may lie by any name.
    """
    for tensor in graphs.tensors(model.graph):
        if tensor.data_location == TensorProto.EXTERNAL:
            _load_tensor(tensor, folder, linked or folder, others)


def _load_tensor(tensor: TensorProto, folder: Path, linked: Path, others: Sequence[Path]) -> None:
    entries = {item.key: item.value for item in tensor.external_data}
    path = _external_path(tensor, entries.get("location", ""), folder, linked, others)
    expected = _data_bytes(tensor)
    try:
        offset = int(entries.get("offset", 0))
        size = int(entries.get("length", expected))
    except ValueError:
        offset = size = -1
    if offset < 0 or size != expected:
        raise ModelFormatError(
            f"tensor {tensor.name!r} needs {expected} bytes, but its external data is described as "
            f"offset {entries.get('offset', 0)}, length {entries.get('length')}; export it again"
        )
    data = _read(path, offset, size)
    if len(data) < size:
        raise ModelFormatError(
            f"{path} is truncated: tensor {tensor.name!r} needs bytes {offset} to {offset + size}, "
            f"the file has {path.stat().st_size}; copy it again"
        )
    tensor.raw_data = data
    tensor.data_location = TensorProto.DEFAULT
    del tensor.external_data[:]


def _external_path(
    tensor: TensorProto, location: str, folder: Path, linked: Path, others: Sequence[Path]
) -> Path:
    name = Path(location)
    plain = bool(location) and not name.is_absolute() and ".." not in name.parts
    allowed = [*others, folder, linked] if plain else others
    path = folder if "\0" in location else (folder / name).resolve()
    if not location or not any(path.is_relative_to(root.resolve()) for root in allowed):
        raise ModelFormatError(
            f"tensor {tensor.name!r} keeps its data in {location!r}, outside of the model's "
            f"folder {folder}; put both into one folder, or name the data's with external_data "
            "(--external-data)"
        )
    if not path.is_file():
        raise ModelFormatError(
            f"{folder / location} is missing: it holds the data of tensor {tensor.name!r}; "
            "copy it beside the model"
        )
    return path


def _data_bytes(tensor: TensorProto) -> int:
    """Bytes of the tensor's values as raw data."""
    name = TensorProto.DataType.Name(tensor.data_type)
    bits = {"INT4": 4, "UINT4": 4, "FLOAT4E2M1": 4, "INT2": 2, "UINT2": 2}.get(name)
    if bits is None:
        bits = 8 * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    return -(-graphs.tensor_size(tensor) * bits // 8)


def _check_sizes(model: onnx.ModelProto, path: Path) -> None:
    types = set(TensorProto.DataType.values()) - {TensorProto.UNDEFINED}
    for tensor in graphs.tensors(model.graph):
        if tensor.data_type not in types or min(tensor.dims, default=0) < 0:
            raise ModelFormatError(
                f"{path}: tensor {tensor.name!r} has type {tensor.data_type} and shape "
                f"{list(tensor.dims)}, which ONNX does not know; export the model again"
            )
        if tensor.HasField("raw_data") and len(tensor.raw_data) != _data_bytes(tensor):
            raise ModelFormatError(
                f"{path}: tensor {tensor.name!r} of shape {list(tensor.dims)} needs "
                f"{_data_bytes(tensor)} bytes and has {len(tensor.raw_data)}; export it again"
            )


def _check_layouts(model: onnx.ModelProto) -> None:
    for part in graphs.walk(model.graph):
        for node in part.node:
            if node.domain in _LAYOUTS:
                raise UnsupportedModelError(
                    f"{node.op_type} {node.name or node.output[0]!r} is of domain {node.domain}: "
                    "ONNX Runtime has optimized the model for one kind of CPU; give the model as "
                    "it was before, or optimize it no further than ORT_ENABLE_EXTENDED"
                )


def open_dimensions(model: onnx.ModelProto) -> None:
    """Sizes of -1 or 0, as some exporters write them, become open dimensions."""
    for part in graphs.walk(model.graph):
        for info in (*part.input, *part.output, *part.value_info):
            _open_dimensions(info.type)


def _open_dimensions(kind: onnx.TypeProto) -> None:
    name = kind.WhichOneof("value")
    if name in ("tensor_type", "sparse_tensor_type"):
        for dim in getattr(kind, name).shape.dim:
            if dim.HasField("dim_value") and dim.dim_value <= 0:
                dim.ClearField("dim_value")
    elif name in ("sequence_type", "optional_type"):
        _open_dimensions(getattr(kind, name).elem_type)


def _convert_opset(model: onnx.ModelProto) -> onnx.ModelProto:
    opset = graphs.standard_opset(model)
    if opset >= OLDEST_OPSET:
        return model
    if opset == 0:
        domains = ", ".join(sorted(item.domain for item in model.opset_import))
        raise UnsupportedModelError(
            f"the model imports no opset of the ONNX standard domain, only {domains}; "
            "build a bank from a network of MatMul, Gemm, Conv or Gather nodes"
        )
    light = graphs.without_weights(model)
    try:
        converted = onnx.version_converter.convert_version(light, OLDEST_OPSET)
    except Exception as error:  # the converter raises whatever its C++ side threw
        raise UnsupportedModelError(
            f"the model has opset {opset}, and ONNX cannot convert it to {OLDEST_OPSET}: "
            f"{' '.join(str(error).split())}; export it with opset {OLDEST_OPSET} or newer"
        ) from error
    graphs.attach_weights(converted, model)
    return converted


def _inline_functions(model: onnx.ModelProto) -> onnx.ModelProto:
    if not model.functions:
        return model
    try:
        return onnx.inliner.inline_local_functions(model, convert_version=True)
    except Exception as error:  # the inliner raises whatever its C++ side threw
        raise UnsupportedModelError(
            f"the model's {len(model.functions)} local functions cannot be inlined: "
            f"{' '.join(str(error).split())}; export it without functions"
        ) from error


def lower_versions(model: onnx.ModelProto) -> None:
    """Declare the oldest opset, and format, in which every node means the same.

    Exporters stamp the newest they know; an engine refuses what is newer than itself even where
    nothing changed for the operators in use.
    """
    opset = graphs.standard_opset(model)
    if opset > onnx.defs.onnx_opset_version():
        return  # what changed since is unknown here
    oldest = min(opset, _LOWERED_OPSET)
    for part in graphs.walk(model.graph):
        for node in part.node:
            if graphs.is_standard(node):
                try:
                    schema = onnx.defs.get_schema(node.op_type, opset, "")
                except onnx.defs.SchemaError:
                    return
                oldest = max(oldest, schema.since_version)
    for item in model.opset_import:
        if item.domain in ("", "ai.onnx"):
            item.version = oldest
    # Below 4, initializers must also be graph inputs.
    minimum = onnx.helper.find_min_ir_version_for(model.opset_import, ignore_unknown=True)
    model.ir_version = max(4, minimum)
