"""Reads and checks samples of the model's inputs: calibration data, or what is evaluated on."""

from __future__ import annotations

import bisect
import hashlib
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

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

_CHECKED_VALUES = 1 << 20
"""So many are looked at in one go: arrays may be larger than the memory that is free."""

CalibrationPart = str | os.PathLike[str] | Mapping[str, Any]
"""An .npz file, an .npy where the model has one input, or the arrays themselves: one per model
input, samples on the first axis."""

CalibrationSource = CalibrationPart | list[CalibrationPart] | tuple[CalibrationPart, ...]
"""A part, a folder of .npz files, or several of them, where samples differ in size."""


@dataclass(frozen=True)
class _Column:
    """The values of one model input, sample by sample."""

    samples: int | None
    """None where there are as many as of the other inputs."""
    value: Callable[[int], Any]
    array: np.ndarray | None = None
    """The array that holds all values, if one does."""


@dataclass(frozen=True)
class CalibrationData:
    """Checked samples, ready to be fed."""

    parts: tuple[Mapping[str, _Column], ...]
    """Columns by input. Samples of one part are alike in size."""
    ends: tuple[int, ...]
    """The number of samples up to the end of each part."""
    numbers: Sequence[int]
    """The samples that are meant, counted through all parts."""
    blake2b: str
    """BLAKE2b-128 over names, types, shapes and values."""
    padded: frozenset[str] = field(default_factory=frozenset)
    """Arrays (samples, tokens) whose padding `feed` cuts off: see `_padded_arrays`."""

    @property
    def samples(self) -> int:
        """The number of samples."""
        return len(self.numbers)

    def feed(self, sample: int) -> dict[str, Any]:
        """The model inputs of one sample: arrays, lists of them, None for an empty optional."""
        row = self.numbers[sample]
        number = bisect.bisect_right(self.ends, row)
        begin = self.ends[number - 1] if number else 0
        columns = self.parts[number]
        feed = {name: column.value(row - begin) for name, column in columns.items()}
        if self.padded:
            seen = np.flatnonzero(feed[_MASK].any(axis=0))
            if len(seen):
                tokens = slice(int(seen[0]), int(seen[-1]) + 1)
                feed.update({name: feed[name][:, tokens] for name in self.padded})
        return {name: _in_order(value) for name, value in feed.items()}

    def some(self, samples: Sequence[int]) -> CalibrationData:
        """Some of the samples; the digest stays that of all."""
        return replace(self, numbers=tuple(self.numbers[sample] for sample in samples))

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


def _in_order(value: Any) -> Any:
    return np.asarray(value, order="C") if isinstance(value, np.ndarray | np.generic) else value


def check_calibration_source(source: object) -> None:
    """Refuse, before any work, what can be no calibration data.

    Raises CalibrationError for an object of another type, InputFileError for a file that cannot be
    read.
    """
    for part in parts_of(source):
        if isinstance(part, str | os.PathLike):
            check_input_file(part)
        elif not isinstance(part, Mapping):
            raise CalibrationError(
                f"the data is of type {type(part).__name__}: give an .npz file, a "
                "folder of them, a mapping of the model's inputs to arrays, or a list of these"
            )


def parts_of(source: object) -> Iterator[Any]:
    """The files and mappings of a list or folder, in order; another source is one part."""
    if isinstance(source, list | tuple):
        for item in source:
            yield from parts_of(item)
    elif isinstance(source, str | os.PathLike) and os.path.isdir(source):
        files = sorted(file for file in Path(source).iterdir() if file.suffix in (".npz", ".npy"))
        if not files:
            raise CalibrationError(f"{os.fspath(source)} holds no .npz file; write some into it")
        yield from files
    else:
        yield source


def load_calibration(
    source: CalibrationSource, model_inputs: Iterable[onnx.ValueInfoProto]
) -> CalibrationData:
    """Read and check calibration data against the model's inputs.

    An array has the input's own axes, the first one counting samples (a first axis that the model
    fixes at n takes n rows per sample), or one axis more, in front, that counts whole inputs. For
    an input that is a sequence the first axis counts samples and the second the items of each; an
    optional may be left out.

    Raises:
        CalibrationError: not a file of plain arrays, no samples, or an input of a type that cannot
            be given.
        CalibrationArrayError: an array is missing, or no input has its name.
        CalibrationShapeError: shape or type do not fit, or sample counts differ.
        CalibrationValueError: NaN or infinity.
        InputFileError: the file cannot be read.
    """
    check_calibration_source(source)
    inputs = {item.name: item.type for item in model_inputs}
    sources = list(parts_of(source))
    digest = hashlib.blake2b(digest_size=16)
    parts, counts = [], []
    for number, part in enumerate(sources):
        try:
            columns, samples = _columns(part, inputs)
        except CalibrationError as error:
            where = f"part {number}" if isinstance(part, Mapping) else os.fspath(part)
            if len(sources) > 1 and where not in str(error):
                raise type(error)(f"{where}: {error}") from error
            raise
        if samples:
            parts.append(columns)
            counts.append(samples)
            _add_to_digest(digest, columns, samples)
    if not parts:
        raise CalibrationError(
            "the data has 0 samples, at least 1 is needed; 100 or more are better"
        )
    padded = _padded_arrays(inputs, parts)
    ends = tuple(itertools.accumulate(counts))
    return CalibrationData(tuple(parts), ends, range(ends[-1]), digest.hexdigest(), padded)


def _columns(
    part: CalibrationPart, inputs: Mapping[str, onnx.TypeProto]
) -> tuple[dict[str, _Column], int]:
    """Read one part: a column for each input, and the number of samples."""
    given = dict(part) if isinstance(part, Mapping) else _read(part, list(inputs))
    optional = {name for name, kind in inputs.items() if kind.HasField("optional_type")}
    _check_names(given, inputs, optional)
    columns = {name: _column(name, given.get(name), kind) for name, kind in inputs.items()}
    counts = {
        name: column.samples for name, column in columns.items() if column.samples is not None
    }
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{name} has {count}" for name, count in counts.items())
        raise CalibrationShapeError(
            f"arrays differ in samples: {listed}; give each the same number"
        )
    return columns, next(iter(counts.values()), 0)


def _column(name: str, values: Any, kind: onnx.TypeProto) -> _Column:
    if kind.HasField("optional_type"):
        if values is None:
            return _Column(None, lambda sample: None)
        return _column(name, values, kind.optional_type.elem_type)
    if kind.HasField("sequence_type") and kind.sequence_type.elem_type.HasField("tensor_type"):
        element = kind.sequence_type.elem_type.tensor_type
        lists = [[_cast(name, np.asarray(item), element) for item in items] for items in values]
        for sample, item in ((n, item) for n, items in enumerate(lists) for item in items):
            _check_finite(name, item[None], 1, sample)
        return _Column(len(lists), lists.__getitem__)
    if not kind.HasField("tensor_type"):
        raise CalibrationError(
            f"input {name} is of a type that samples cannot give, "
            f"{kind.WhichOneof('value')}; build without calibration"
        )
    array = _cast(name, np.asarray(values), kind.tensor_type)
    rows = _rows_per_sample(name, array, kind.tensor_type)
    _check_finite(name, array, max(rows, 1))

    def value(sample: int) -> Any:
        return array[sample * rows : (sample + 1) * rows] if rows else array[sample]

    return _Column(len(array) // max(rows, 1), value, array)


def _padded_arrays(
    inputs: Mapping[str, onnx.TypeProto], parts: Iterable[Mapping[str, _Column]]
) -> frozenset[str]:
    """The inputs whose second axis is the free token axis of an `attention_mask`.

    An application gives one sentence without padding, or masks the padding: either way it is no
    activation that matters, and statistics must not count it.
    """

    def token_axis(name: str) -> object:
        """What is equal for inputs with the same token axis: its name, or its sizes."""
        dims = inputs[name].tensor_type.shape.dim
        if len(dims) != 2 or dims[1].HasField("dim_value"):
            return None
        arrays = [columns[name].array for columns in parts]
        # A first axis of whole inputs, in front of the model's own, has no padding to cut.
        if any(array is None or array.ndim != 2 for array in arrays):
            return None
        return dims[1].dim_param or [array.shape[1] for array in arrays if array is not None]

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


def _check_names(given: Iterable[str], needed: Iterable[str], optional: set[str]) -> None:
    there, wanted = sorted(given), sorted(needed)
    if {*there, *optional} != set(wanted):
        raise CalibrationArrayError(
            f"the data has the arrays {', '.join(there) or 'none'}, the model needs "
            f"{', '.join(wanted)}; give one array per model input under its name"
        )


def _cast(name: str, array: np.ndarray, kind: onnx.TypeProto.Tensor) -> np.ndarray:
    """Cast the array to the input's type, from another size of the same kind, if it fits."""
    if kind.elem_type == onnx.TensorProto.STRING and array.dtype.kind in "UO":
        return array.astype(object)
    wanted = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)
    if array.dtype == wanted:
        return array
    same_kind = array.dtype.kind == wanted.kind or (array.dtype.kind + wanted.kind) in ("iu", "ui")
    if array.dtype.kind not in "iuf" or not same_kind:
        raise CalibrationShapeError(
            f"array {name} has type {array.dtype}, the model needs {wanted}; "
            "convert it the way the application will"
        )
    if wanted.kind in "iu" and array.size:
        low, high, limits = array.min(), array.max(), np.iinfo(wanted)
        if int(low) < limits.min or int(high) > limits.max:
            raise CalibrationShapeError(
                f"array {name} holds {low} to {high}, the model's {wanted} reaches "
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
        f"array {name} has shape {array.shape}, the model's input is {wanted}; {step}"
    )


def _check_finite(name: str, array: np.ndarray, rows: int, sample: int = 0) -> None:
    """Refuse what is not finite; `sample` is the number of the first sample in the array."""
    step = max(_CHECKED_VALUES * len(array) // max(array.size, 1), 1)
    blocks = (array[first : first + step] for first in range(0, len(array), step))
    if array.dtype.kind != "f" or all(np.isfinite(block).all() for block in blocks):
        return
    bad = ~np.isfinite(array)
    first = sample + int(np.argmax(bad.reshape(len(array), -1).any(axis=1))) // rows
    raise CalibrationValueError(
        f"array {name} holds {int(bad.sum())} values that are NaN or infinity, the "
        f"first in sample {first}; remove those samples"
    )


def _add_to_digest(digest: Any, columns: Mapping[str, _Column], samples: int) -> None:
    for name in sorted(columns):
        whole = columns[name].array
        values = [columns[name].value(sample) for sample in range(samples)]
        for array in values if whole is None else [whole]:
            for item in array if isinstance(array, list) else [array]:
                _add_array(digest, name, np.asarray(item))


def _add_array(digest: Any, name: str, array: np.ndarray) -> None:
    digest.update(f"{name}\0{array.dtype.str}\0{array.shape}\0".encode())
    if array.dtype == object:  # strings, or nothing
        digest.update(repr(array.tolist()).encode())
    else:
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
