"""The interpreter of TensorFlow Lite, with a bank in it.

    from bapq_edge.compat.tflite import Interpreter

stands in place of `from tflite_runtime.interpreter import Interpreter`, or of the same line for
ai_edge_litert or tensorflow.lite; the rest of a program stays as it is.
"""

from __future__ import annotations

import enum
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..engine.feeds import NUMPY_TYPES
from ..errors import BankNotFoundError, RequestError, RunInputError
from ..session import Session
from ..telemetry import warn_ignored
from .tflite_facts import Quantization, Signature, TFLiteFacts

__all__ = ["Interpreter", "OpResolverType", "SignatureRunner", "load_delegate"]

_CPU_ONLY = "a bank runs on CPUs, with its own operators"


class OpResolverType(enum.Enum):
    """Which operators TensorFlow Lite is to use; a bank has its own."""

    AUTO = 0
    BUILTIN = 1
    BUILTIN_REF = 2
    BUILTIN_WITHOUT_DEFAULT_DELEGATES = 3


class Interpreter:
    """A bank behind the methods of `tflite_runtime.interpreter.Interpreter`.

    For one thread at a time, as there. Inputs and outputs have the names, types, layout and
    quantization of the .tflite file that the bank was built from; a bank of another model has those
    of its graph. There are no tensors but these: `get_tensor` knows no others.
    """

    def __init__(
        self,
        model_path: str | os.PathLike[str] | None = None,
        model_content: bytes | None = None,
        experimental_delegates: Sequence[Any] | None = None,
        num_threads: int | None = None,
        **settings: Any,
    ) -> None:
        """Open the bank.

        Args:
            model_path: the bank's directory. "model.tflite" means "model.bank" beside it.
            model_content: not possible with a bank, which is a directory.
            experimental_delegates: not honoured: an IgnoredSettingWarning.
            num_threads: threads that one operator runs on; None is one per core.
            settings: what `bapq_edge.Session` takes besides, such as `memory_budget="64MiB"` or
                `level=8`. TensorFlow Lite's own, `experimental_...`, are not honoured.

        Raises:
            BankNotFoundError: there is no such bank.
            RequestError and its kinds, BankError and its kinds: as `Session` raises them.
        """
        if model_path is None or model_content is not None:
            raise RequestError("a bank is a directory: give its path as model_path")
        for delegate in experimental_delegates or ():
            warn_ignored(f"delegate {delegate}", _CPU_ONLY)
        for name in [name for name in settings if name.startswith("experimental_")]:
            if settings.pop(name) not in (None, False, OpResolverType.AUTO):
                warn_ignored(name, _CPU_ONLY)
        self.session = Session(_bank_of(model_path), threads=num_threads, **settings)
        """The session inside: precision, memory and statistics are changed and read there."""
        inputs, outputs = self.session.get_inputs(), self.session.get_outputs()
        self._tensors = [_Tensor(index, value) for index, value in enumerate((*inputs, *outputs))]
        self._inputs, self._outputs = self._tensors[: len(inputs)], self._tensors[len(inputs) :]
        metadata = self.session.get_modelmeta().custom_metadata_map
        facts = TFLiteFacts.from_metadata(metadata, os.fspath(model_path))
        for tensor in self._tensors:
            tensor.quantization = facts.quantization.get(tensor.name)
        self._signatures = facts.signatures
        self._allocated = False

    # ---- what there is ----

    def get_input_details(self) -> list[dict[str, Any]]:
        """Name, index, shape, type and quantization of every input, in the order of the file.

        An open axis is -1 in "shape_signature"; its length in "shape" is 1, or as it was resized.
        """
        return [tensor.details() for tensor in self._inputs]

    def get_output_details(self) -> list[dict[str, Any]]:
        """The same of every output; the length of an open axis is that of the last run."""
        return [tensor.details() for tensor in self._outputs]

    def get_tensor_details(self) -> list[dict[str, Any]]:
        """The details of inputs and outputs."""
        return [tensor.details() for tensor in self._tensors]

    def get_signature_list(self) -> dict[str, dict[str, list[str]]]:
        """Names of the inputs and outputs of every signature in the file, by the signature's."""
        return {
            key: {"inputs": [*signature.inputs], "outputs": [*signature.outputs]}
            for key, signature in self._signatures.items()
        }

    def get_signature_runner(self, signature_key: str | None = None) -> SignatureRunner:
        """The model as a function of named arrays.

        The key may be left out where there is one signature. Raises RequestError for another one.
        """
        keys = [*self._signatures]
        if signature_key is None and len(keys) == 1:
            signature_key = keys[0]
        if signature_key not in keys:
            raise RequestError(f"signature {signature_key!r} is not in the bank, which has {keys}")
        return SignatureRunner(self, self._signatures[signature_key])

    # ---- a run ----

    def resize_tensor_input(
        self, input_index: int, tensor_size: Sequence[int], strict: bool = False
    ) -> None:
        """Give an input another shape; `allocate_tensors` comes next.

        Raises RunInputError where an axis differs that the bank's graph fixes, with `strict` or
        without.
        """
        tensor = self._input(input_index)
        shape = tuple(int(size) for size in tensor_size)
        fits = len(shape) == len(tensor.signature) and all(
            size >= 0 and fixed in (-1, size)
            for size, fixed in zip(shape, tensor.signature, strict=True)
        )
        if not fits:
            raise RunInputError(
                f"input {tensor.name} cannot have shape {[*shape]}: it is {[*tensor.signature]}, "
                "and only an axis of -1 can be resized; build the bank of a model that has it open"
            )
        tensor.shape = shape
        self._allocated = False

    def allocate_tensors(self) -> None:
        """Make the inputs' memory, of zeros; where outputs have open axes, a run tells them."""
        for tensor in self._inputs:
            if tensor.value is None or tensor.value.shape != tensor.shape:
                tensor.value = np.zeros(tensor.shape, tensor.dtype)
        self._allocated = True
        if any(-1 in tensor.signature for tensor in self._outputs):
            self.invoke()
        for tensor in self._outputs:
            if tensor.value is None:
                tensor.value = np.zeros(tensor.shape, tensor.dtype)

    def set_tensor(self, tensor_index: int, value: Any) -> None:
        """Copy the value into an input. Raises RunInputError for another type or shape."""
        self._check_allocated()
        tensor, given = self._input(tensor_index), np.asarray(value)
        if given.dtype != tensor.dtype:
            raise RunInputError(
                f"input {tensor.name} is of type {tensor.dtype}, the value is {given.dtype}: "
                "convert it"
            )
        if given.shape != tensor.shape:
            raise RunInputError(
                f"input {tensor.name} has shape {[*tensor.shape]}, the value {[*given.shape]}"
            )
        np.copyto(self.tensor(tensor_index)(), given)

    def invoke(self) -> None:
        """Run on the inputs as they are set. Raises what `Session.run` raises."""
        self._check_allocated()
        feed = {tensor.name: tensor.value for tensor in self._inputs}
        for tensor, value in zip(self._outputs, self.session.run(None, feed), strict=True):
            tensor.value, tensor.shape = value, value.shape

    def get_tensor(self, tensor_index: int) -> NDArray[Any]:
        """A copy of an input or output."""
        return self.tensor(tensor_index)().copy()

    def tensor(self, tensor_index: int) -> Callable[[], NDArray[Any]]:
        """A function that gives the memory of an input or output, to read or to fill.

        What it gives holds until the next `invoke` or `allocate_tensors`.
        """
        tensor = self._tensor(tensor_index)

        def memory() -> NDArray[Any]:
            self._check_allocated()
            assert tensor.value is not None
            return tensor.value

        return memory

    def reset_all_variables(self) -> None:
        """Do nothing: a bank has no variables."""

    # ---- closing ----

    def close(self) -> None:
        """Give all memory back; TensorFlow Lite has no such method."""
        self.session.close()

    def __enter__(self) -> Interpreter:
        """Give the interpreter itself."""
        return self

    def __exit__(self, *raised: object) -> None:
        """Close it."""
        self.close()

    def _check_allocated(self) -> None:
        if not self._allocated:
            raise RequestError("the tensors have no memory yet: call allocate_tensors()")

    def _tensor(self, index: int) -> _Tensor:
        if not 0 <= index < len(self._tensors):
            raise RequestError(
                f"tensor {index} is neither input nor output: a bank has 0 to "
                f"{len(self._tensors) - 1}"
            )
        return self._tensors[index]

    def _input(self, index: int) -> _Tensor:
        tensor = self._tensor(index)
        if tensor not in self._inputs:
            raise RequestError(f"tensor {index}, {tensor.name}, is no input")
        return tensor


class SignatureRunner:
    """The model as a function: arrays by the names of a signature in, arrays by names out."""

    def __init__(self, interpreter: Interpreter, signature: Signature) -> None:
        """`Interpreter.get_signature_runner` makes them."""
        self._interpreter = interpreter
        self._inputs = _by_name(interpreter.get_input_details(), signature.inputs)
        self._outputs = _by_name(interpreter.get_output_details(), signature.outputs)

    def __call__(self, **inputs: Any) -> dict[str, NDArray[Any]]:
        """Run on an array for each input of the signature; open axes take its sizes.

        Raises RunInputError where names, types or shapes do not fit.
        """
        if set(inputs) != set(self._inputs):
            raise RunInputError(
                f"the signature takes {sorted(self._inputs)}, it was given {sorted(inputs)}"
            )
        interpreter = self._interpreter
        arrays = {index: np.asarray(inputs[name]) for name, index in self._inputs.items()}
        for index, array in arrays.items():
            interpreter.resize_tensor_input(index, array.shape)
        interpreter.allocate_tensors()
        for index, array in arrays.items():
            interpreter.set_tensor(index, array)
        interpreter.invoke()
        return {name: interpreter.get_tensor(index) for name, index in self._outputs.items()}

    def get_input_details(self) -> dict[str, dict[str, Any]]:
        """The details of every input, by its name in the signature."""
        details = {each["index"]: each for each in self._interpreter.get_input_details()}
        return {name: details[index] for name, index in self._inputs.items()}

    def get_output_details(self) -> dict[str, dict[str, Any]]:
        """The details of every output, by its name in the signature."""
        details = {each["index"]: each for each in self._interpreter.get_output_details()}
        return {name: details[index] for name, index in self._outputs.items()}


def load_delegate(library: str, options: Mapping[Any, Any] | None = None) -> str:
    """Stand in for a library of an accelerator, which a bank does not use: give its name."""
    return library


class _Tensor:
    """An input or an output."""

    def __init__(self, index: int, value: Any) -> None:
        """Take its onnxruntime.NodeArg."""
        if value.type not in NUMPY_TYPES:
            raise RequestError(
                f"{value.name} is {value.type}, which the interpreter cannot carry: use Session"
            )
        self.index = index
        self.name: str = value.name
        self.dtype = np.dtype(NUMPY_TYPES[value.type])
        self.signature = tuple(
            size if isinstance(size, int) and size > 0 else -1 for size in value.shape
        )
        self.shape = tuple(max(size, 1) for size in self.signature)
        self.value: NDArray[Any] | None = None
        self.quantization: Quantization | None = None

    def details(self) -> dict[str, Any]:
        quantization = self.quantization or Quantization((), ())
        whole = len(quantization.scales) == 1
        return {
            "name": self.name,
            "index": self.index,
            "shape": np.array(self.shape, np.int32),
            "shape_signature": np.array(self.signature, np.int32),
            "dtype": self.dtype.type,
            "quantization": (
                (float(np.float32(quantization.scales[0])), quantization.zero_points[0])
                if whole
                else (0.0, 0)
            ),
            "quantization_parameters": {
                "scales": np.array(quantization.scales, np.float32),
                "zero_points": np.array(quantization.zero_points, np.int32),
                "quantized_dimension": quantization.axis,
            },
            "sparsity_parameters": {},
        }


def _bank_of(model_path: str | os.PathLike[str]) -> Path:
    path = Path(model_path)
    if path.suffix != ".tflite" or path.is_dir():
        return path
    bank = path.with_suffix(".bank")
    if not bank.exists():
        raise BankNotFoundError(f"{bank} is not there: build it with 'bapq build {path}'")
    return bank


def _by_name(details: Sequence[Mapping[str, Any]], names: Mapping[str, str]) -> dict[str, int]:
    """Index of the tensor that every name of a signature means."""
    indices = {each["name"]: int(each["index"]) for each in details}
    lacking = [tensor for tensor in names.values() if tensor not in indices]
    if lacking:
        raise RequestError(f"the signature names {lacking[0]!r}, the bank has {[*indices]}")
    return {name: indices[tensor] for name, tensor in names.items()}
