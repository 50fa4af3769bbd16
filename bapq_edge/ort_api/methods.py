"""The methods of `onnxruntime.InferenceSession` besides `run`: the base of `bapq_edge.Session`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from typing import TYPE_CHECKING, Any

from ..engine.graph import Graphs
from ..errors import RequestError
from ..runs_in_flight import RunsInFlight
from .arguments import check_providers

if TYPE_CHECKING:  # only those who bind load it
    from .io_binding import IOBinding

__all__ = ["InferenceSessionMethods"]

_CPU = "CPUExecutionProvider"


class InferenceSessionMethods(ABC):
    """What programs for ONNX Runtime call, on top of `run` and `submit`."""

    _runs: RunsInFlight

    @property
    @abstractmethod
    def _graphs(self) -> Graphs:
        """The open graphs; none of the methods below asks for them but of an open session."""

    @abstractmethod
    def run(
        self,
        output_names: Sequence[str] | None,
        input_feed: Mapping[str, Any],
        run_options: Any = None,
    ) -> list[Any]:
        """Run the model."""

    @abstractmethod
    def submit(
        self,
        output_names: Sequence[str] | None,
        input_feed: Mapping[str, Any],
        run_options: Any = None,
    ) -> Future[list[Any]]:
        """Run the model on another thread."""

    # ---- other ways to run ----

    def run_async(
        self,
        output_names: Sequence[str] | None,
        input_feed: Mapping[str, Any],
        callback: Callable[[list[Any], Any, str], object],
        user_data: Any,
        run_options: Any = None,
    ) -> None:
        """Run the model as `submit` does, then call `callback(outputs, user_data, error)` there.

        `error` is empty, or else says in one line why there are no outputs. Raises RunInputError
        where the feed or the output names do not fit the model.
        """

        def tell(future: Future[list[Any]]) -> None:
            outputs: list[Any] = []
            try:
                outputs, error = future.result(), ""
            except CancelledError:
                error = "the session was closed before this run began"
            except Exception as failure:  # whatever it is, who waits is told
                error = str(failure)
            callback(outputs, user_data, error)

        if not callable(callback):
            kind = type(callback).__name__
            raise RequestError(f"callback is of type {kind}: give a function of three arguments")
        self.submit(output_names, input_feed, run_options).add_done_callback(tell)

    def io_binding(self) -> IOBinding:
        """Bind inputs and outputs once, for `run_with_iobinding`; as `onnxruntime.IOBinding`."""
        from .io_binding import IOBinding

        self._runs.check_open()
        names = [[value.name for value in values] for values in self._values()]
        return IOBinding(*names)

    def run_with_iobinding(self, iobinding: IOBinding, run_options: Any = None) -> None:
        """Run on what is bound. Raises what `run` raises."""
        from .io_binding import IOBinding

        if not isinstance(iobinding, IOBinding):
            raise RequestError(
                f"iobinding is of type {type(iobinding).__name__}: give what io_binding() returned"
            )
        iobinding.run(self.run, run_options)

    def run_with_ort_values(
        self,
        output_names: Sequence[str] | None,
        input_dict_ort_values: Mapping[str, Any],
        run_options: Any = None,
    ) -> list[Any]:
        """Run on `onnxruntime.OrtValue` inputs, which are read in place; the outputs are such, too.

        Raises what `run` raises.
        """
        from .io_binding import run_on_ort_values

        return run_on_ort_values(self.run, output_names, input_dict_ort_values, run_options)

    # ---- what ONNX Runtime tells of a session ----

    def get_inputs(self) -> list[Any]:
        """The model's inputs, as `onnxruntime.NodeArg` (name, shape, type)."""
        return list(self._values()[0])

    def get_outputs(self) -> list[Any]:
        """The model's outputs, as `onnxruntime.NodeArg` (name, shape, type)."""
        return list(self._values()[1])

    def get_overridable_initializers(self) -> list[Any]:
        """Initializers that a feed may replace: those that stayed with the graph."""
        return list(self._engine().get_overridable_initializers())

    def get_modelmeta(self) -> Any:
        """The source model's `onnxruntime.ModelMetadata`, its custom metadata included."""
        return self._engine().get_modelmeta()

    def get_session_options(self) -> Any:
        """The `onnxruntime.SessionOptions` in force, a copy."""
        return self._engine().get_session_options()

    def get_providers(self) -> list[str]:
        """The execution providers: the CPU's."""
        self._runs.check_open()
        return [_CPU]

    def get_provider_options(self) -> dict[str, dict[str, str]]:
        """The options of each provider: none."""
        self._runs.check_open()
        return {_CPU: {}}

    def set_providers(self, providers: Any = None, provider_options: Any = None) -> None:
        """Stay on the CPU; another provider is an IgnoredSettingWarning."""
        self._runs.check_open()
        check_providers(providers, provider_options)

    def enable_fallback(self) -> None:
        """Change nothing: a bank runs on CPUs, there is nothing to fall back to."""
        self._runs.check_open()

    def disable_fallback(self) -> None:
        """Change nothing: a bank runs on CPUs, there is nothing to fall back from."""
        self._runs.check_open()

    def end_profiling(self) -> str:
        """End ONNX Runtime's profiling, which `SessionOptions.enable_profiling` began.

        Returns the file's name, empty where there was none. `bapq profile` shows more.
        """
        return str(self._engine().end_profiling())

    def get_profiling_start_time_ns(self) -> int:
        """When ONNX Runtime's profiling began, in nanoseconds."""
        return int(self._engine().get_profiling_start_time_ns())

    def _values(self) -> tuple[list[Any], list[Any]]:
        self._runs.check_open()
        return self._graphs.inputs, self._graphs.outputs

    def _engine(self) -> Any:
        """ONNX Runtime's session of the graph that gives the outputs."""
        self._runs.check_open()
        return self._graphs[self._graphs.parts[-1]].session
