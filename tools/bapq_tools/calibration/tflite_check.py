"""Checks a converted .tflite file against LiteRT, operator by operator.

Every operator of the plain graph is run on the tensors that LiteRT has there, so an error is that
of one operator and does not grow along the graph. The outputs of the optimized graph are those of
the plain one then: against LiteRT's, single steps of integers would have grown to any size.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import helper

from bapq_edge.errors import UnsupportedModelError

from ..onnx_graph.importers.tflite_file import ConvertedModel
from .samples import CalibrationData

__all__ = ["check_conversion"]

_RANDOM_SAMPLES = 2
_CALIBRATION_SAMPLES = 4
_SEED = 0
_FLOAT_ERROR = 1e-3
"""Norm of the difference over that of LiteRT's tensor: float operators sum in another order."""
_HYBRID_ERROR = 0.05
"""LiteRT rounds the inputs of a float operator with int8 weights to int8; ONNX does not."""
_STEPS = 3
"""Integers are rounded at other places: so many steps, or this share of the type's range."""
_SHARE_OF_RANGE = 1e-3
_MADE = "bapq.made."


@dataclass(frozen=True)
class _Operator:
    """The operator that makes a tensor."""

    title: str
    hybrid: bool


def check_conversion(
    path: str | os.PathLike[str], converted: ConvertedModel, samples: CalibrationData | None
) -> None:
    """Compare the converted model with LiteRT on random and on calibration inputs.

    Raises UnsupportedModelError for the first operator that differs, or output that tf2onnx's
    optimizer changed.
    """
    litert = _LiteRT(path)
    operators = _Operators(litert, converted.plain)
    whole, plain = _session(converted.model), _session(converted.plain)
    made_by_operators = {value.name for value in plain.get_outputs()}
    names = [v.name for v in whole.get_outputs() if v.name in made_by_operators]
    answered = False
    for feed in _feeds(litert, samples):
        try:
            litert.run(feed)
        except (RuntimeError, ValueError):  # such as a random index beyond the end of a table
            continue
        answered = True
        for name, made in operators.run():
            _compare(path, litert, name, litert.value(name), made, operators.of[name])
        pairs = zip(names, plain.run(names, feed), whole.run(names, feed), strict=True)
        for name, expected, made in pairs:
            _compare(path, litert, name, expected, made, None)
    if not answered:
        raise UnsupportedModelError(
            f"{os.fspath(path)}: LiteRT runs on no random input, so the conversion cannot be "
            "checked: give calibration samples"
        )


class _LiteRT:
    """LiteRT on the file, with all its tensors kept."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        from ai_edge_litert.interpreter import Interpreter, OpResolverType

        self._interpreter = Interpreter(
            os.fspath(path),
            experimental_op_resolver_type=OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES,
            experimental_preserve_all_tensors=True,
        )
        self._interpreter.allocate_tensors()
        self.inputs = self._interpreter.get_input_details()
        details = self._interpreter.get_tensor_details()
        seen: dict[str, list[dict[str, Any]]] = {}
        for each in details:
            seen.setdefault(each["name"], []).append(each)
        self.tensors = {name: same[0] for name, same in seen.items() if name and len(same) == 1}
        """Details of every tensor that has a name of its own."""
        self.operators: dict[str, _Operator] = {}
        by_index = {each["index"]: each for each in details}
        for operator in self._interpreter._get_ops_details():
            dtypes = [by_index[i]["dtype"] for i in operator["inputs"] if i in by_index]
            for index in operator["outputs"]:
                made = by_index.get(index)
                if made is None:
                    continue
                hybrid = made["dtype"] == np.float32 and np.int8 in dtypes
                hybrid = hybrid and operator["op_name"] != "DEQUANTIZE"
                title = f"operator {operator['index']} ({operator['op_name']})"
                self.operators[made["name"]] = _Operator(title, hybrid)

    def run(self, feed: dict[str, np.ndarray]) -> None:
        for each in self.inputs:
            self._interpreter.resize_tensor_input(each["index"], feed[each["name"]].shape)
        self._interpreter.allocate_tensors()
        for each in self.inputs:
            self._interpreter.set_tensor(each["index"], feed[each["name"]])
        self._interpreter.invoke()

    def value(self, name: str) -> np.ndarray:
        value: np.ndarray = self._interpreter.get_tensor(self.tensors[name]["index"])
        return value


class _Operators:
    """The converted graph, cut behind every operator of the file."""

    def __init__(self, litert: _LiteRT, plain: onnx.ModelProto) -> None:
        self._litert = litert
        model = onnx.ModelProto()
        model.CopyFrom(plain)
        graph = model.graph
        kinds = {value.name: value.type.tensor_type.elem_type for value in graph.output}
        ends = {
            node.output[0]: node
            for node in graph.node
            if node.op_type == "Identity" and node.output[0] in kinds
        }
        self.of = {name: litert.operators[name] for name in ends if name in litert.operators}
        sources = {ends[name].input[0]: name for name in self.of}
        for node in graph.node:
            for index, name in enumerate(node.input):
                if name in sources:
                    node.input[index] = sources[name]
        for source, name in sources.items():
            ends[name].input[0], ends[name].output[0] = source, _MADE + name
        self._inputs = [*(value.name for value in graph.input), *self.of]
        del graph.output[:], graph.value_info[:]
        for name in self.of:
            graph.input.append(helper.make_tensor_value_info(name, kinds[name], None))
            graph.output.append(helper.make_tensor_value_info(_MADE + name, kinds[name], None))
        self._session = _session(model)

    def run(self) -> Iterator[tuple[str, np.ndarray]]:
        """What every operator makes of LiteRT's tensors, by the tensor's name."""
        feed = {name: self._litert.value(name) for name in self._inputs}
        outputs = self._session.run([_MADE + name for name in self.of], feed)
        yield from zip(self.of, outputs, strict=True)


def _session(model: onnx.ModelProto) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    # ONNX Runtime's own fusions of Q/DQ pairs round once where the file rounds twice.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        return onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # ONNX Runtime raises classes of its own, without a common base
        reason = " ".join(str(error).split())
        raise UnsupportedModelError(f"ONNX Runtime refuses what tf2onnx made: {reason}") from error


def _feeds(litert: _LiteRT, samples: CalibrationData | None) -> Iterator[dict[str, np.ndarray]]:
    random = np.random.default_rng(_SEED)
    for _ in range(_RANDOM_SAMPLES):
        yield {each["name"]: _random(random, each) for each in litert.inputs}
    if samples is not None:
        step = max(1, samples.samples // _CALIBRATION_SAMPLES)
        for index in range(0, samples.samples, step)[:_CALIBRATION_SAMPLES]:
            yield samples.feed(index)


def _random(random: np.random.Generator, details: dict[str, Any]) -> np.ndarray:
    shape, dtype = tuple(details["shape"]), np.dtype(details["dtype"])
    if dtype.kind == "f":
        return random.standard_normal(shape).astype(dtype)
    if dtype.kind in "iu" and _steps(details):
        limits = np.iinfo(dtype)
        return random.integers(limits.min, limits.max, shape, dtype, endpoint=True)
    return random.integers(0, 2, shape).astype(dtype)  # indices, flags


def _steps(details: dict[str, Any]) -> bool:
    """Whether integers stand for steps of a quantized range."""
    return bool(len(details["quantization_parameters"]["scales"]))


def _compare(
    path: str | os.PathLike[str],
    litert: _LiteRT,
    name: str,
    expected: np.ndarray,
    made: np.ndarray,
    operator: _Operator | None,
) -> None:
    """Refuse what an operator made, or an output of the optimized model."""
    where = f"output {name}" if operator is None else f"{operator.title}, tensor {name}"
    if made.shape != expected.shape:
        error = f"the shape {[*made.shape]} in place of {[*expected.shape]}"
    else:
        hybrid = operator is not None and operator.hybrid
        measured, limit, unit = _error(expected, made, litert.tensors[name], hybrid)
        if measured <= limit:
            return
        error = f"an error of {measured:.3g}{unit}, {limit:.3g} is allowed"
    raise UnsupportedModelError(
        f"{os.fspath(path)}: {where}: what tf2onnx makes of it has {error}: export ONNX from the "
        "source of the model"
    )


def _error(
    expected: np.ndarray, made: np.ndarray, details: dict[str, Any], hybrid: bool
) -> tuple[float, float, str]:
    """How far it is off, how far it may be, and in what unit."""
    if expected.dtype.kind in "iub":
        if not _steps(details):
            return float((made != expected).sum()), 0.0, " values"
        most = np.abs(made.astype(np.int64) - expected.astype(np.int64)).max(initial=0)
        limits = np.iinfo(expected.dtype)
        share = _SHARE_OF_RANGE * (int(limits.max) - int(limits.min))
        return float(most), max(_STEPS, share), " steps"
    wide, found = expected.astype(np.float64), made.astype(np.float64)
    bad = ~np.isfinite(wide)
    if not np.array_equal(wide[bad], found[bad], equal_nan=True):
        return float("inf"), 0.0, " in what is not finite"
    size = np.linalg.norm(np.where(bad, 0, wide))
    error = np.linalg.norm(np.where(bad, 0, found - wide))
    relative = float(error / max(size, np.finfo(np.float32).tiny))
    return relative, _HYBRID_ERROR if hybrid else _FLOAT_ERROR, ""
