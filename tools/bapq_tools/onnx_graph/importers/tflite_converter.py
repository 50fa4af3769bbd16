"""Turns a .tflite file into ONNX with tf2onnx: a program of its own, which imports nothing of ours.

    python tflite_converter.py MODEL.tflite FOLDER

FOLDER gets `model.onnx`, `plain.onnx` (the same graph, not optimized, with what every operator of
the file makes as an output) and `facts.json` (quantization and signatures), or `error.json`.

A process of its own, because LiteRT ends its process on some broken files, and because of this:
tf2onnx imports TensorFlow, a gigabyte, and converts a .tflite file without it. What it takes of
TensorFlow on that way is a container for constants and LiteRT's interpreter. `_StandIn` is these.
"""

from __future__ import annotations

import collections
import importlib.abc
import importlib.machinery
import json
import logging
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

OPSET = 17


_STATEFUL = {"ASSIGN_VARIABLE", "CALL_ONCE", "READ_VARIABLE", "VAR_HANDLE"}


class _StandIn(types.ModuleType):
    """In place of TensorFlow and every module and name in it: gives itself for what it lacks."""

    imported = False
    """Whether tf2onnx is there: its modules call some of TensorFlow, a conversion must not."""
    __path__: list[str] = []  # noqa: RUF012  (the import system reads it of a package)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = _StandIn(f"{self.__name__}.{name}")
        setattr(self, name, value)
        return value

    def __mro_entries__(self, bases: tuple[Any, ...]) -> tuple[Any, ...]:
        return ()  # a class that inherits from it inherits nothing

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        if _StandIn.imported:
            raise RuntimeError(f"that takes {self.__name__}, which only TensorFlow has")
        return self


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the stand-in under TensorFlow's name, whether TensorFlow is installed or not."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name.partition(".")[0] != "tensorflow":
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _StandIn(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


_TYPES: dict[str, tuple[int, Any]] = {
    "DT_FLOAT": (1, np.float32),
    "DT_DOUBLE": (2, np.float64),
    "DT_INT32": (3, np.int32),
    "DT_UINT8": (4, np.uint8),
    "DT_INT16": (5, np.int16),
    "DT_INT8": (6, np.int8),
    "DT_STRING": (7, None),
    "DT_COMPLEX64": (8, np.complex64),
    "DT_INT64": (9, np.int64),
    "DT_BOOL": (10, np.bool_),
    "DT_UINT16": (17, np.uint16),
    "DT_COMPLEX128": (18, np.complex128),
    "DT_HALF": (19, np.float16),
    "DT_RESOURCE": (20, None),
    "DT_VARIANT": (21, None),
    "DT_UINT32": (22, np.uint32),
    "DT_UINT64": (23, np.uint64),
}
"""Number in tensorflow.DataType, and the NumPy type."""


class _Constant:
    """What tf2onnx writes of a constant into tensorflow.TensorProto."""

    def __init__(self) -> None:
        self.tensor_content = b""
        self.dtype = 0
        self.tensor_shape = types.SimpleNamespace(dim=_Dims())

    def array(self) -> np.ndarray:
        dtypes = dict(_TYPES.values())
        shape = [dim.size for dim in self.tensor_shape.dim]
        return np.frombuffer(self.tensor_content, dtypes[self.dtype]).reshape(shape)


class _Dims(list[Any]):
    def add(self) -> Any:
        self.append(types.SimpleNamespace(size=0))
        return self[-1]


def _stand_in_for_tensorflow(interpreter: type) -> None:
    sys.meta_path.insert(0, _Finder())
    import tensorflow
    from tensorflow.core.framework import tensor_pb2, types_pb2
    from tensorflow.python.framework import tensor_util

    tensorflow.__version__ = tensorflow.version.VERSION = "2.21.0"
    tensorflow.string = _TYPES["DT_STRING"][0]
    tensorflow.lite.Interpreter = interpreter
    tensor_pb2.TensorProto = _Constant
    tensor_util.MakeNdarray = _Constant.array
    for name, (number, _) in _TYPES.items():
        setattr(types_pb2, name, number)


class _Refused(Exception):
    """The file cannot be converted; the message says why, in one line."""

    def __init__(self, message: str, *, broken: bool = False) -> None:
        super().__init__(message)
        self.broken = broken


class _Errors(logging.Handler):
    """Keeps what tf2onnx logs as errors: it goes on after them."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(" ".join(record.getMessage().split()))


def main(source: str, folder: Path) -> None:
    """Convert the file; the outcome is in the folder."""
    try:
        from ai_edge_litert.interpreter import Interpreter, OpResolverType

        model = _open(Interpreter, source, OpResolverType)
        facts, made = _facts(model), _made(model)
        _stand_in_for_tensorflow(Interpreter)
        _convert(source, folder, made)
        (folder / "facts.json").write_text(json.dumps(facts), encoding="utf-8")
    except _Refused as error:
        outcome = {"message": str(error), "broken": error.broken}
        (folder / "error.json").write_text(json.dumps(outcome), encoding="utf-8")


def _open(interpreter: Any, source: str, resolvers: Any) -> Any:
    resolver = resolvers.BUILTIN_WITHOUT_DEFAULT_DELEGATES
    model = None
    try:
        model = interpreter(source, experimental_op_resolver_type=resolver)
        model.allocate_tensors()
    except (ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise _Refused(f"LiteRT refuses it: {reason}", broken=model is None) from None
    stateful = sorted({each["op_name"] for each in model._get_ops_details()} & _STATEFUL)
    if stateful:
        raise _Refused(
            f"it keeps state from run to run ({', '.join(stateful)}), which an ONNX graph cannot: "
            "export it with its state as inputs and outputs"
        )
    sparse = [each["name"] for each in model.get_tensor_details() if each["sparsity_parameters"]]
    if sparse:
        raise _Refused(
            f"tensor {sparse[0]!r} is stored sparse, which tf2onnx cannot convert: export the "
            "model without sparsity"
        )
    return model


def _facts(model: Any) -> dict[str, Any]:
    inputs, outputs = model.get_input_details(), model.get_output_details()
    quantization = {
        each["name"]: {
            "scales": [float(scale) for scale in each["quantization_parameters"]["scales"]],
            "zero_points": [int(z) for z in each["quantization_parameters"]["zero_points"]],
            "axis": int(each["quantization_parameters"]["quantized_dimension"]),
        }
        for each in (*inputs, *outputs)
        if len(each["quantization_parameters"]["scales"])
    }
    names = {each["index"]: each["name"] for each in (*inputs, *outputs)}
    signatures = {
        key: {
            side: {name: names[index] for name, index in signature[side].items() if index in names}
            for side in ("inputs", "outputs")
        }
        for key, signature in model._get_full_signature_list().items()
    }
    return {
        "inputs": [each["name"] for each in inputs],
        "outputs": [each["name"] for each in outputs],
        "quantization": quantization,
        "signatures": signatures,
    }


def _made(model: Any) -> list[str]:
    """Names of the tensors that operators make; those that two tensors have are left out."""
    names = {each["index"]: each["name"] for each in model.get_tensor_details()}
    once = collections.Counter(names.values())
    indices = [index for each in model._get_ops_details() for index in each["outputs"]]
    made = [names[index] for index in indices if index in names]
    return [name for name in dict.fromkeys(made) if name and once[name] == 1]


def _convert(source: str, folder: Path, made: list[str]) -> None:
    from tf2onnx import optimizer
    from tf2onnx.tfonnx import process_tf_graph

    _StandIn.imported = True
    errors = _Errors()
    logging.getLogger("tf2onnx").addHandler(errors)
    try:
        graph = process_tf_graph(
            None, tflite_path=source, opset=OPSET, output_names=made, continue_on_error=True
        )
        plain = graph.make_model("plain")
        graph = process_tf_graph(None, tflite_path=source, opset=OPSET, continue_on_error=True)
        model = optimizer.optimize_graph(graph).make_model(Path(source).stem)
    except Exception as error:  # tf2onnx asserts, indexes and raises ValueErrors of its own
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise _Refused(f"tf2onnx cannot convert it: {reason}") from None
    left = sorted({n.op_type for n in model.graph.node if n.op_type.startswith("TFL_")})
    if left or errors.lines:
        what = ", ".join(name.removeprefix("TFL_") for name in left) or errors.lines[0]
        raise _Refused(f"tf2onnx cannot convert it: {what}")
    for name, each in (("plain.onnx", plain), ("model.onnx", model)):
        (folder / name).write_bytes(each.SerializeToString())


if __name__ == "__main__":
    sys.path.pop(0)  # the modules beside this one are not for it
    main(sys.argv[1], Path(sys.argv[2]))
