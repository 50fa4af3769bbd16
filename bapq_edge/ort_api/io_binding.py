"""Inputs and outputs that are bound once and run often: the shape of `onnxruntime.IOBinding`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnxruntime import OrtValue

from ..errors import RequestError, RunInputError
from ..telemetry import warn_ignored
from .memory import array_at, array_of, numpy_type

__all__ = ["IOBinding", "run_on_ort_values"]

Run = Callable[[Sequence[str] | None, Mapping[str, Any], Any], Sequence[Any]]


class IOBinding:
    """What a run reads and where its outputs go, as `Session.io_binding` gives it.

    Inputs are read in place, at every run. An output that is bound to memory is written there; any
    other is an array of its own from run to run.
    """

    def __init__(self, inputs: Sequence[str], outputs: Sequence[str]) -> None:
        """Bind nothing yet; the names are those of the model."""
        self._names = {"input": inputs, "output": outputs}
        self._feed: dict[str, Any] = {}
        self._targets: dict[str, NDArray[Any] | None] = {}
        self._results: list[Any] = []

    def bind_cpu_input(self, name: str, arr_on_cpu: Any) -> None:
        """Read the input from this array, which may get other values between runs."""
        self._feed[self._checked("input", name)] = arr_on_cpu

    def bind_input(
        self,
        name: str,
        device_type: str,
        device_id: int,
        element_type: Any,
        shape: Sequence[int],
        buffer_ptr: int,
    ) -> None:
        """Read the input from memory of the caller's, which must stay; `buffer_ptr` is its address.

        Raises RequestError for memory that is not the CPU's.
        """
        _check_device(device_type)
        self._feed[self._checked("input", name)] = array_at(
            buffer_ptr, shape, numpy_type(element_type)
        )

    def bind_ortvalue_input(self, name: str, ortvalue: OrtValue) -> None:
        """Read the input from this value."""
        self._feed[self._checked("input", name)] = array_of(ortvalue)

    def bind_output(
        self,
        name: str,
        device_type: str = "cpu",
        device_id: int = 0,
        element_type: Any = None,
        shape: Sequence[int] | None = None,
        buffer_ptr: int | None = None,
    ) -> None:
        """Ask for the output: in memory of the caller's, or without an address in an array.

        Raises RequestError for memory that is not the CPU's; without an address another device than
        the CPU is an IgnoredSettingWarning.
        """
        self._checked("output", name)
        if buffer_ptr is None:
            if device_type != "cpu":
                warn_ignored(f"bind_output(device_type={device_type!r})", "a bank runs on CPUs")
            self._targets[name] = None
            return
        _check_device(device_type)
        if element_type is None or shape is None:
            raise RequestError(f"output {name} is bound to an address: give element_type and shape")
        self._targets[name] = array_at(buffer_ptr, shape, numpy_type(element_type))

    def bind_ortvalue_output(self, name: str, ortvalue: OrtValue) -> None:
        """Write the output into this value."""
        target = array_of(ortvalue)
        if not isinstance(target, np.ndarray) or target.dtype == object:
            raise RequestError(f"output {name} is bound to a value that is no tensor of numbers")
        self._targets[self._checked("output", name)] = target

    def synchronize_inputs(self) -> None:
        """Do nothing: all is on the CPU."""

    def synchronize_outputs(self) -> None:
        """Do nothing: all is on the CPU."""

    def run(self, run: Run, run_options: Any) -> None:
        """Run on what is bound; `run` is that of a session.

        Raises what it raises, and RunInputError where an output does not fit its memory.
        """
        if not self._targets:
            raise RunInputError("no output is bound: call bind_output for each that you need")
        results = [*run([*self._targets], self._feed, run_options)]
        for index, (name, target) in enumerate(self._targets.items()):
            if target is None:
                continue
            made = results[index]
            if (made.shape, made.dtype) != (target.shape, target.dtype):
                raise RunInputError(
                    f"output {name} is {made.dtype} {[*made.shape]}, it is bound to memory of "
                    f"{target.dtype} {[*target.shape]}"
                )
            np.copyto(target, made)
            results[index] = target
        self._results = results

    def get_outputs(self) -> list[OrtValue]:
        """The outputs of the last run, in the order in which they were bound."""
        return [_ort_value(value) for value in self._results]

    def copy_outputs_to_cpu(self) -> list[Any]:
        """The outputs of the last run as arrays of their own, in the order of binding."""
        bound = zip(self._results, self._targets.values(), strict=True)
        return [value if target is None else value.copy() for value, target in bound]

    def clear_binding_inputs(self) -> None:
        """Bind no inputs."""
        self._feed.clear()

    def clear_binding_outputs(self) -> None:
        """Bind no outputs, and let go of those of the last run."""
        self._targets.clear()
        self._results = []

    def _checked(self, kind: str, name: str) -> str:
        if name not in self._names[kind]:
            raise RunInputError(f"the model has no {kind} {name!r}, it has {[*self._names[kind]]}")
        return name


def run_on_ort_values(
    run: Run, names: Sequence[str] | None, values: Mapping[str, OrtValue], run_options: Any
) -> list[OrtValue]:
    """Run on OrtValues, which are read in place; the outputs are OrtValues, too."""
    feed = {name: array_of(value) for name, value in values.items()}
    return [_ort_value(value) for value in run(names, feed, run_options)]


def _ort_value(value: Any) -> OrtValue:
    if not isinstance(value, np.ndarray):
        raise RequestError(
            f"an output is of type {type(value).__name__}, which cannot become an OrtValue: call "
            "run, or copy_outputs_to_cpu"
        )
    return OrtValue.ortvalue_from_numpy(value)


def _check_device(device_type: str) -> None:
    if device_type != "cpu":
        raise RequestError(f"memory of device {device_type!r} is bound: a bank runs on CPUs")
