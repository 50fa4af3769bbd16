"""Runs the model on calibration samples and records the moments of every layer's input.

One sample is run at a time, whatever the model's batch axis allows: models whose batch is declared
dynamic but fixed inside work too, and memory holds the activations of one sample per worker. The
result does not depend on the workers: each run has one thread, and samples are added in order.
"""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

from bapq_edge.errors import (
    CalibrationArrayError,
    CalibrationError,
    CalibrationShapeError,
    CalibrationValueError,
    StorageError,
    UnsupportedModelError,
)

from .ir import ColumnStats, ConvGeometry, HeavyLayer, LayerPlan, LayerUse

CalibrationSource = str | os.PathLike[str] | Mapping[str, np.ndarray]
"""An .npz file, or the arrays themselves: one per model input, samples on the first axis."""

_OBSERVED_BYTES = 256 << 20
"""Activations that one run may return; a model with more of them is run several times a sample."""

_PROBED_TENSORS = 8
"""Tensors observed at a time while their sizes are still unknown."""

_SILENT = 4
"""ORT's log severity "fatal": errors reach us as exceptions."""


@dataclass(frozen=True)
class CalibrationData:
    """Checked samples, ready to be fed."""

    arrays: dict[str, np.ndarray]
    rows_per_sample: dict[str, int]
    """Per array: rows of the first axis in one sample; 0 where a sample is one entry without it"""
    samples: int
    blake2b: str
    """BLAKE2b-128 over names, types, shapes and values"""

    def feed(self, sample: int) -> dict[str, np.ndarray]:
        """Model inputs of one sample."""
        feed = {}
        for name, array in self.arrays.items():
            rows = self.rows_per_sample[name]
            feed[name] = array[sample * rows : (sample + 1) * rows] if rows else array[sample]
        return {name: np.asarray(value, order="C") for name, value in feed.items()}


def load_calibration(
    source: CalibrationSource, model_inputs: Iterable[onnx.ValueInfoProto]
) -> CalibrationData:
    """Read and check calibration data against the model's inputs.

    An array has the input's own axes, the first one counting samples (a first axis that the model
    fixes at n takes n rows per sample), or one axis more, in front, that counts whole inputs.

    Raises:
        CalibrationError: not an .npz file of plain arrays, or no samples.
        CalibrationArrayError: an array is missing, or no input has its name.
        CalibrationShapeError: shape or type do not fit, or sample counts differ.
        CalibrationValueError: NaN or infinity.
        StorageError: the file cannot be read.
    """
    inputs = {item.name: item.type.tensor_type for item in model_inputs}
    if isinstance(source, Mapping):
        given = {str(name): np.asarray(array) for name, array in source.items()}
    else:
        given = _read_npz(source)
    _check_names(given, inputs)
    arrays, rows_per_sample, counts = {}, {}, {}
    for name, kind in inputs.items():
        array = _cast(name, given[name], kind)
        rows = _rows_per_sample(name, array, kind)
        _check_finite(name, array, max(rows, 1))
        arrays[name], rows_per_sample[name] = array, rows
        counts[name] = len(array) // max(rows, 1)
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{name} has {count}" for name, count in counts.items())
        raise CalibrationShapeError(
            f"calibration arrays differ in samples: {listed}; give each the same number"
        )
    samples = next(iter(counts.values()), 0)
    if samples == 0:
        raise CalibrationError(
            "the calibration data has 0 samples, at least 1 is needed; 100 or more are better"
        )
    return CalibrationData(arrays, rows_per_sample, samples, _digest(arrays))


def calibrate(
    model: onnx.ModelProto,
    plan: LayerPlan,
    data: CalibrationData,
    workers: int = 1,
    advance: Callable[[], None] = lambda: None,
) -> dict[str, ColumnStats]:
    """Moments of the layers' inputs, by layer name, over all samples.

    A layer has none, and is quantized unweighted, if it is only reached inside If, Loop or Scan
    bodies, or if a Gather reads it: a gathered row meets no activations. `advance` is called once
    per sample.

    Raises:
        CalibrationError: the model fails on a sample, or a layer's input is not finite there.
        UnsupportedModelError: the model is too large for ONNX Runtime to load from memory.
    """
    observed = _observed_uses(model, plan)
    names = sorted({use.activation_input for uses in observed.values() for use in uses})
    if not names:
        return {}
    session = _session(model, names)
    bunches = _bunches(session, data, names)

    def moments_of(sample: int) -> dict[str, _Moments]:
        found: dict[str, _Moments] = {}
        for bunch in bunches:
            tensors = _run(session, bunch, data, sample)
            for layer, uses in observed.items():
                for use in uses:
                    if use.activation_input in tensors:
                        moments = _moments(tensors[use.activation_input], use.conv)
                        found[layer] = found[layer] + moments if layer in found else moments
        return found

    totals: dict[str, _Moments] = {}
    with ThreadPoolExecutor(max_workers=max(1, workers)) as pool:
        for sample, found in enumerate(pool.map(moments_of, range(data.samples))):
            for layer, moments in found.items():
                if not moments.is_finite():
                    raise CalibrationError(
                        f"calibration sample {sample} gives layer {layer} an input with NaN or "
                        "infinity; remove the sample or check the model in float32"
                    )
                totals[layer] = totals[layer] + moments if layer in totals else moments
            advance()
    return {layer: moments.stats() for layer, moments in totals.items() if moments.rows}


# ---- checks ----


def _read_npz(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    problem = f"{os.fspath(path)} is not an .npz file of plain arrays; write it with numpy.savez"
    try:
        with open(path, "rb") as file:  # np.load leaves a damaged file open
            archive = np.load(file, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise CalibrationError(problem)
            return {name: archive[name] for name in archive.files}
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise CalibrationError(problem) from error
    except OSError as error:
        reason = error.strerror or str(error)
        raise StorageError(
            f"calibration file {os.fspath(path)} cannot be read: {reason}; check the path"
        ) from error


def _check_names(given: Iterable[str], needed: Iterable[str]) -> None:
    there, wanted = sorted(given), sorted(needed)
    if there != wanted:
        raise CalibrationArrayError(
            f"the calibration data has the arrays {', '.join(there) or 'none'}, the model needs "
            f"{', '.join(wanted)}; give one array per model input under its name"
        )


def _cast(name: str, array: np.ndarray, kind: onnx.TypeProto.Tensor) -> np.ndarray:
    """The array in the input's type, from another size of the same kind if no value changes."""
    wanted = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)
    if array.dtype == wanted:
        return array
    same_kind = array.dtype.kind == wanted.kind or (array.dtype.kind + wanted.kind) in ("iu", "ui")
    if array.dtype.kind not in "iuf" or not same_kind:
        raise CalibrationShapeError(
            f"calibration array {name} has type {array.dtype}, the model needs {wanted}; "
            "convert it the way the application will"
        )
    if wanted.kind in "iu" and array.size:
        low, high, limits = array.min(), array.max(), np.iinfo(wanted)
        if int(low) < limits.min or int(high) > limits.max:
            raise CalibrationShapeError(
                f"calibration array {name} holds {low} to {high}, the model's {wanted} reaches "
                f"from {limits.min} to {limits.max}; check the data"
            )
    with np.errstate(over="ignore"):  # an overflow is found as infinity
        return array.astype(wanted)


def _rows_per_sample(name: str, array: np.ndarray, kind: onnx.TypeProto.Tensor) -> int:
    """Rows of one sample, 0 where every entry of the first axis is a whole input."""
    if not kind.HasField("shape"):
        if array.ndim:
            return 1
        raise _shape_error(name, array, "any with samples on the first axis", "add that axis")
    dims = [dim.dim_value if dim.HasField("dim_value") else None for dim in kind.shape.dim]
    words = [str(dim.dim_value) if dim.HasField("dim_value") else "?" for dim in kind.shape.dim]
    text = f"({', '.join(words)})"

    def fits(shape: tuple[int, ...], wanted: list[int | None]) -> bool:
        return len(shape) == len(wanted) and all(
            expected is None or found == expected
            for found, expected in zip(shape, wanted, strict=True)
        )

    if array.ndim == len(dims) + 1 and fits(array.shape[1:], dims):
        return 0
    if array.ndim == 0 or not dims or not fits(array.shape[1:], dims[1:]):
        raise _shape_error(name, array, text, "put samples on the first axis")
    rows = 1 if dims[0] is None else dims[0]
    if rows == 0 or len(array) % rows:
        raise _shape_error(name, array, text, f"make the first axis a multiple of {rows}")
    return rows


def _shape_error(name: str, array: np.ndarray, wanted: str, step: str) -> CalibrationShapeError:
    return CalibrationShapeError(
        f"calibration array {name} has shape {array.shape}, the model's input is {wanted}; {step}"
    )


def _check_finite(name: str, array: np.ndarray, rows: int) -> None:
    if array.dtype.kind != "f" or np.isfinite(array).all():
        return
    bad = ~np.isfinite(array)
    first = int(np.argmax(bad.reshape(len(array), -1).any(axis=1))) // rows
    raise CalibrationValueError(
        f"calibration array {name} holds {int(bad.sum())} values that are NaN or infinity, the "
        f"first in sample {first}; remove those samples"
    )


def _digest(arrays: dict[str, np.ndarray]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(arrays):
        array = arrays[name]
        digest.update(f"{name}\0{array.dtype.str}\0{array.shape}\0".encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
    return digest.hexdigest()


# ---- runs ----


def _observed_uses(model: onnx.ModelProto, plan: LayerPlan) -> dict[str, list[LayerUse]]:
    """Per layer the uses whose input can be seen from outside."""
    computed = {name for node in model.graph.node for name in node.output}
    computed.update(item.name for item in model.graph.input)
    observed = {}
    for layer in plan.layers:
        uses = [u for u in layer.uses if not u.is_body and u.activation_input in computed]
        if uses and not _is_gathered(layer) and _group_count(layer) is not None:
            observed[layer.name] = uses
    return observed


def _is_gathered(layer: HeavyLayer) -> bool:
    return any(use.operator == "Gather" for use in layer.uses)


def _group_count(layer: HeavyLayer) -> int | None:
    """Groups of the layer's columns; None where uses that share the weights disagree."""
    counts = {1 if use.conv is None else use.conv.group for use in layer.uses}
    return counts.pop() if len(counts) == 1 else None


def _session(model: onnx.ModelProto, names: list[str]) -> ort.InferenceSession:
    """A session whose outputs include these tensors; the model is as before afterwards."""
    outputs = model.graph.output
    declared = {item.name for item in outputs} | {item.name for item in model.graph.input}
    count = len(outputs)
    outputs.extend(onnx.ValueInfoProto(name=name) for name in names if name not in declared)
    try:
        serialized = model.SerializeToString()
    except ValueError as error:
        raise UnsupportedModelError(
            f"the model has {model.ByteSize()} bytes, calibration can load 2147483647; "
            "build without calibration data"
        ) from error
    finally:
        del outputs[count:]
    options = ort.SessionOptions()
    options.log_severity_level = _SILENT
    options.intra_op_num_threads = 1
    options.enable_cpu_mem_arena = False  # would keep the largest sample's memory
    return ort.InferenceSession(serialized, options, providers=["CPUExecutionProvider"])


def _bunches(
    session: ort.InferenceSession, data: CalibrationData, names: list[str]
) -> list[list[str]]:
    """Names in bunches whose tensors together stay below `_OBSERVED_BYTES`, by the first sample."""
    bunches: list[list[str]] = [[]]
    bunch_bytes = 0
    for begin in range(0, len(names), _PROBED_TENSORS):
        tensors = _run(session, names[begin : begin + _PROBED_TENSORS], data, 0)
        for name, tensor in tensors.items():
            if bunches[-1] and bunch_bytes + tensor.nbytes > _OBSERVED_BYTES:
                bunches.append([])
                bunch_bytes = 0
            bunches[-1].append(name)
            bunch_bytes += tensor.nbytes
    return bunches


def _run(
    session: ort.InferenceSession, names: list[str], data: CalibrationData, sample: int
) -> dict[str, np.ndarray]:
    feed = data.feed(sample)
    outputs = [name for name in names if name not in feed]
    found = {name: feed[name] for name in names if name in feed}
    if not outputs:
        return found
    try:
        values: list[Any] = session.run(outputs, feed)
    except Exception as error:  # ORT's exceptions have no common base below Exception
        reason = " ".join(str(error).split())[:300]
        raise CalibrationError(
            f"the model fails on calibration sample {sample}: {reason}; check the sample"
        ) from error
    return found | dict(zip(outputs, values, strict=True))


# ---- moments ----


@dataclass(frozen=True)
class _Moments:
    total: np.ndarray
    """(groups, columns) float64: sum of x"""
    square: np.ndarray
    """(groups, columns) float64: sum of x squared"""
    rows: int

    def __add__(self, other: _Moments) -> _Moments:
        return _Moments(
            self.total + other.total, self.square + other.square, self.rows + other.rows
        )

    def is_finite(self) -> bool:
        return bool(np.isfinite(self.total).all() and np.isfinite(self.square).all())

    def stats(self) -> ColumnStats:
        return ColumnStats(
            (self.total / self.rows).astype(np.float32),
            (self.square / self.rows).astype(np.float32),
            self.rows,
        )


def _moments(x: np.ndarray, conv: ConvGeometry | None) -> _Moments:
    with np.errstate(over="ignore", invalid="ignore"):  # the sums tell
        if conv is not None:
            return _conv_moments(x, conv)
        rows = x.reshape(-1, x.shape[-1])
        total = rows.sum(0, dtype=np.float64)
        square = np.square(rows).sum(0, dtype=np.float64)
        return _Moments(total[None], square[None], len(rows))


def _conv_moments(x: np.ndarray, conv: ConvGeometry) -> _Moments:
    """Moments of a convolution's columns, in the order (ky, kx, channel of the group).

    Each kernel position sees its own part of the input, and zeros where it reaches into the
    padding: the moments are those of the matrix that an im2col would build. x: (n, c, [h,] w).
    """
    if x.ndim == 3:
        x = x[:, :, None, :]
    squared = np.square(x)
    count, channels = x.shape[:2]
    vertical, horizontal = _windows(x.shape[2], conv, 0), _windows(x.shape[3], conv, 1)
    shape = (len(vertical.slices), len(horizontal.slices), channels)
    total, square = np.zeros(shape), np.zeros(shape)
    for ky, rows in enumerate(vertical.slices):
        for kx, columns in enumerate(horizontal.slices):
            total[ky, kx] = x[:, :, rows, columns].sum((0, 2, 3), dtype=np.float64)
            square[ky, kx] = squared[:, :, rows, columns].sum((0, 2, 3), dtype=np.float64)

    def by_group(values: np.ndarray) -> np.ndarray:
        split = values.reshape(*shape[:2], conv.group, channels // conv.group)
        return split.transpose(2, 0, 1, 3).reshape(conv.group, -1)

    outputs = count * vertical.outputs * horizontal.outputs
    return _Moments(by_group(total), by_group(square), outputs)


@dataclass(frozen=True)
class _Windows:
    outputs: int
    slices: list[slice]
    """Per kernel position along this axis: the inputs that it meets"""


def _windows(size: int, conv: ConvGeometry, axis: int) -> _Windows:
    kernel, stride, dilation = conv.kernel[axis], conv.strides[axis], conv.dilations[axis]
    reach = (kernel - 1) * dilation + 1
    before, after = conv.pads[axis], conv.pads[axis + 2]
    if conv.auto_pad != "NOTSET":
        pad = max(0, (-(-size // stride) - 1) * stride + reach - size)
        small, large = pad // 2, pad - pad // 2
        before, after = (small, large) if conv.auto_pad == "SAME_UPPER" else (large, small)
    outputs = max(0, (size + before + after - reach) // stride + 1)
    slices = []
    for position in range(kernel):
        offset = position * dilation - before
        first = -(min(offset, 0) // stride)  # first output whose input is not padding
        last = min(outputs - 1, (size - 1 - offset) // stride)
        begin = offset + first * stride
        end = offset + last * stride + 1
        slices.append(slice(begin, end, stride) if last >= first else slice(0))
    return _Windows(outputs, slices)
