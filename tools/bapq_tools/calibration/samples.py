"""Reads and checks calibration data: samples of the model's inputs."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import onnx

from bapq_edge.array_files import read_arrays
from bapq_edge.errors import (
    CalibrationArrayError,
    CalibrationError,
    CalibrationShapeError,
    CalibrationValueError,
)
from bapq_edge.input_files import check_input_file

_MASK = "attention_mask"
"""The input by which language models are told which tokens are padding, by common convention."""

_HELD_OUT_SHARE = 8
_MOST_HELD_OUT = 64
"""More would tell errors hardly better, and codes need them."""

CalibrationSource = str | os.PathLike[str] | Mapping[str, np.ndarray]
"""An .npz file, an .npy where the model has one input, or the arrays themselves: one per model
input, samples on the first axis."""


@dataclass(frozen=True)
class CalibrationData:
    """Checked samples, ready to be fed."""

    arrays: dict[str, np.ndarray]
    rows_per_sample: dict[str, int]
    """Rows of the first axis in one sample, by array; 0 where a sample is one entry without it."""
    samples: int
    blake2b: str
    """BLAKE2b-128 over names, types, shapes and values."""
    padded: frozenset[str] = field(default_factory=frozenset)
    """Arrays (samples, tokens) whose padding `feed` cuts off: see `_padded_arrays`."""

    def feed(self, sample: int) -> dict[str, np.ndarray]:
        """The model inputs of one sample."""
        feed = {}
        for name, array in self.arrays.items():
            rows = self.rows_per_sample[name]
            feed[name] = array[sample * rows : (sample + 1) * rows] if rows else array[sample]
        if self.padded:
            seen = np.flatnonzero(feed[_MASK].any(axis=0))
            if len(seen):
                tokens = slice(int(seen[0]), int(seen[-1]) + 1)
                feed.update({name: feed[name][:, tokens] for name in self.padded})
        return {name: np.asarray(value, order="C") for name, value in feed.items()}

    def some(self, samples: Sequence[int]) -> CalibrationData:
        """Some of the samples; the digest stays that of all."""
        arrays = {}
        for name, array in self.arrays.items():
            rows = self.rows_per_sample[name] or 1
            arrays[name] = array[(np.array(samples)[:, None] * rows + np.arange(rows)).ravel()]
        return replace(self, arrays=arrays, samples=len(samples))

    def spread(self, most: int) -> CalibrationData:
        """At most so many of the samples, evenly spread."""
        count = min(most, self.samples)
        return self.some([i * self.samples // count for i in range(count)])

    def split(self) -> tuple[CalibrationData, CalibrationData]:
        """What codes are chosen with, and what is held out for measuring; the same every time.

        An eighth is held out, up to 64, evenly spread. A single sample has to serve both.
        """
        if self.samples < 2:
            return self, self
        count = min(max(self.samples // _HELD_OUT_SHARE, 1), _MOST_HELD_OUT)
        held = {(2 * i + 1) * self.samples // (2 * count) for i in range(count)}
        rest = [sample for sample in range(self.samples) if sample not in held]
        return self.some(rest), self.some(sorted(held))


def check_calibration_source(source: object) -> None:
    """Refuse, before any work, what can be no calibration data.

    Raises CalibrationError for an object of another type, InputFileError for a file that cannot be
    read.
    """
    if isinstance(source, str | os.PathLike):
        check_input_file(source)
    elif not isinstance(source, Mapping):
        raise CalibrationError(
            f"the calibration data is of type {type(source).__name__}: give an .npz file, or a "
            "mapping of the model's inputs to arrays"
        )


def load_calibration(
    source: CalibrationSource, model_inputs: Iterable[onnx.ValueInfoProto]
) -> CalibrationData:
    """Read and check calibration data against the model's inputs.

    An array has the input's own axes, the first one counting samples (a first axis that the model
    fixes at n takes n rows per sample), or one axis more, in front, that counts whole inputs.

    Raises:
        CalibrationError: not a file of plain arrays, or no samples.
        CalibrationArrayError: an array is missing, or no input has its name.
        CalibrationShapeError: shape or type do not fit, or sample counts differ.
        CalibrationValueError: NaN or infinity.
        InputFileError: the file cannot be read.
    """
    check_calibration_source(source)
    inputs = {item.name: item.type.tensor_type for item in model_inputs}
    if isinstance(source, Mapping):
        given = {str(name): np.asarray(array) for name, array in source.items()}
    else:
        given = _read(source, list(inputs))
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
    padded = _padded_arrays(inputs, rows_per_sample)
    return CalibrationData(arrays, rows_per_sample, samples, _digest(arrays), padded)


def _padded_arrays(
    inputs: Mapping[str, onnx.TypeProto.Tensor], rows_per_sample: Mapping[str, int]
) -> frozenset[str]:
    """The inputs whose second axis is the free token axis of an `attention_mask`.

    An application gives one sentence without padding, or masks the padding: either way it is no
    activation that matters, and statistics must not count it.
    """

    def token_axis(name: str) -> str:
        dims = inputs[name].shape.dim
        return dims[1].dim_param if len(dims) == 2 and rows_per_sample[name] else ""

    if _MASK not in inputs or not token_axis(_MASK):
        return frozenset()
    return frozenset(name for name in inputs if token_axis(name) == token_axis(_MASK))


# ---- checks ----


def _read(path: str | os.PathLike[str], inputs: list[str]) -> dict[str, np.ndarray]:
    try:
        arrays = read_arrays(path)
    except ValueError as error:
        raise CalibrationError(str(error)) from error
    if isinstance(arrays, dict):
        return arrays
    if len(inputs) != 1:
        raise CalibrationArrayError(
            f"{os.fspath(path)} holds one array, the model has {len(inputs)} inputs, "
            f"{', '.join(inputs)}; write an .npz with an array for each"
        )
    return {inputs[0]: arrays}


def _check_names(given: Iterable[str], needed: Iterable[str]) -> None:
    there, wanted = sorted(given), sorted(needed)
    if there != wanted:
        raise CalibrationArrayError(
            f"the calibration data has the arrays {', '.join(there) or 'none'}, the model needs "
            f"{', '.join(wanted)}; give one array per model input under its name"
        )


def _cast(name: str, array: np.ndarray, kind: onnx.TypeProto.Tensor) -> np.ndarray:
    """Cast the array to the input's type, from another size of the same kind, if it fits."""
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
    """The rows of one sample; 0 where every entry of the first axis is a whole input."""
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
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
