"""Runs the calibration samples through the model, stage by stage, at several levels side by side.

The float pass runs the model as it was; the pass of a level runs it with the layers that are
already quantized at that level. Comparing the two tells what a layer really meets on the device.

One sample is run at a time, whatever the model's batch axis allows: models whose batch is declared
dynamic but fixed inside work too. Tensors that later stages read are kept, on disk where they are
many. Nothing depends on the number of workers: each run has one thread.
"""

from __future__ import annotations

import functools
import itertools
import re
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import numpy as np
import onnx
import onnxruntime as ort
from onnx import helper

from bapq_edge.bank.layout import Level
from bapq_edge.bank.staging import storage_errors
from bapq_edge.errors import CalibrationError
from bapq_edge.units import counted

from ..onnx_graph.ir import HeavyLayer
from .reference_model import Observation, Reference, Stage
from .samples import CalibrationData

T = TypeVar("T")

FLOAT: Level = 32
"""The level of the float pass."""

_SILENT = 4
"""ORT's log severity "fatal": errors reach us as exceptions."""

_MEMORY_BYTES = 192 << 20
"""Live tensors kept in memory; more go to files."""

Tensors = dict[str, Any]
"""Arrays by name. A sequence is a list of arrays, an optional without a value None."""

WeightSource = Callable[[Level, HeavyLayer], Mapping[str, np.ndarray]]
"""A function of a pass's level and a layer, whose result the reference graph reads as weights."""


class ForwardPasses:
    """The live tensors of every pass and sample; `run` computes the next stage of all passes."""

    def __init__(
        self,
        reference: Reference,
        data: CalibrationData,
        levels: Iterable[Level],
        weights: WeightSource,
        workers: int,
        folder: Path,
    ) -> None:
        """Start a float pass and one for each of `levels`.

        `workers` is a number of threads. `folder` is for what does not fit in memory.
        """
        self.samples = data.samples
        self.levels: tuple[Level, ...] = (FLOAT, *levels)
        """The level of each pass, the float pass first."""
        self._reference = reference
        self._weights = weights
        self.workers = max(1, workers)
        self._live = _LiveTensors(folder)
        self._types = reference.input_types()
        self._observations: Mapping[str, Observation] = {}
        for level, sample in itertools.product(self.levels, range(data.samples)):
            self._live.put((level, sample), dict(data.feed(sample)))

    def run(self, stage: Stage) -> None:
        """Compute a stage of every pass, and let go of what nobody reads any more."""
        self._observations = stage.observations
        if not stage.nodes:
            return
        outputs = sorted(stage.writes)
        session = self.session(stage.nodes, stage.reads, outputs) if outputs else None
        for level in self.levels:
            feeds = self.weight_feeds(level, stage.nodes, stage.in_float or frozenset())
            step = functools.partial(self._step, stage, session, feeds, level)
            on_samples(step, range(self.samples), self.workers)

    def _step(
        self,
        stage: Stage,
        session: ort.InferenceSession | None,
        feeds: Mapping[str, np.ndarray],
        level: Level,
        sample: int,
    ) -> None:
        """Run a stage on one sample."""
        key = level, sample
        if session is not None:
            inputs = self._live.get(key, stage.reads)
            found = run(session, sorted(stage.writes), {**feeds, **inputs}, sample)
            self._live.put(key, found)
        self._live.keep(key, stage.live)

    def observation(self, layer: HeavyLayer) -> Observation | None:
        """Where the input of a layer of the latest stage is seen; None where it cannot be."""
        return self._observations.get(layer.name)

    def inputs_of(self, layer: HeavyLayer, level: Level, sample: int) -> list[np.ndarray]:
        """The inputs that a layer of the latest stage multiplies in the pass of a level.

        There is one for each time that the layer runs: in a body that may be any number. Where the
        pass of the level goes another way through the model than the float pass, they are those of
        the float pass.
        """
        seen = self._observations[layer.name]
        exact = seen.inputs(self._live.get((FLOAT, sample), seen.tensors))
        if level == FLOAT:
            return exact
        found = seen.inputs(self._live.get((level, sample), seen.tensors))
        alike = [x.shape for x in found] == [x.shape for x in exact]
        return found if alike else exact

    def multiplications(self, layers: Iterable[HeavyLayer]) -> int:
        """How many the layers outside of bodies make on the first sample; before any stage is run.

        It is 0 where the model fails on it.
        """
        nodes = list(self._reference.graph.node)
        columns = {
            use.output: layer.weight.shape[1]
            for layer in layers
            for use in layer.uses
            if not use.is_body and use.operator != "Gather"
        }
        if not columns:
            return 0
        sizes = {name: f"bapq.size.{name}" for name in columns}
        asked = [helper.make_node("Size", [name], [size]) for name, size in sizes.items()]
        session = self.session([*nodes, *asked], self.live(), list(sizes.values()))
        feeds = {**self.weight_feeds(FLOAT, nodes), **self.tensors(FLOAT, 0, self.live())}
        try:
            found = run(session, list(sizes.values()), feeds, 0)
        except CalibrationError:
            return 0
        return sum(int(found[sizes[name]]) * width for name, width in columns.items())

    def tensors(self, level: Level, sample: int, names: Iterable[str]) -> Tensors:
        """Some live tensors of one pass and sample."""
        return self._live.get((level, sample), names)

    def live(self) -> set[str]:
        """The names of the live tensors."""
        return self._live.names((FLOAT, 0))

    def weight_feeds(
        self,
        level: Level,
        nodes: Iterable[onnx.NodeProto],
        in_float: frozenset[str] = frozenset(),
    ) -> dict[str, np.ndarray]:
        """The weights that these nodes read in the pass of a level, some layers' in float."""
        feeds: dict[str, np.ndarray] = {}
        for layer in self._reference.layers_of(nodes):
            feeds.update(self._weights(FLOAT if layer.name in in_float else level, layer))
        return feeds

    def session(
        self,
        nodes: Iterable[onnx.NodeProto],
        inputs: Iterable[str],
        outputs: list[str],
        constants: Mapping[str, np.ndarray] = MappingProxyType({}),
    ) -> ort.InferenceSession:
        """A session for some nodes, which reads live tensors, and weights that are not constant."""
        types = {name: self._types[name] for name in sorted(inputs)}
        model = self._reference.model_of(nodes, types, outputs, constants)
        options = ort.SessionOptions()
        options.log_severity_level = _SILENT
        options.intra_op_num_threads = 1
        options.enable_cpu_mem_arena = False  # would keep the largest sample's memory
        session = ort.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        self._types.update({item.name: _type_of(item.type) for item in session.get_outputs()})
        return session


def _type_of(words: str) -> onnx.TypeProto:
    """Read ONNX Runtime's words for a type, such as `seq(tensor(float))`; shapes are not told."""
    found = onnx.TypeProto()
    kind, inner = re.fullmatch(r"(\w+)\((.*)\)", words).groups()  # type: ignore[union-attr]
    if kind in ("tensor", "sparse_tensor"):
        element = onnx.TensorProto.DataType.Value(inner.upper())
        getattr(found, f"{kind}_type").elem_type = element
    elif kind == "map":
        key, value = inner.split(",", 1)
        found.map_type.key_type = onnx.TensorProto.DataType.Value(key.upper())
        found.map_type.value_type.CopyFrom(_type_of(value))
    else:
        whole = {"seq": "sequence_type", "optional": "optional_type"}[kind]
        getattr(found, whole).elem_type.CopyFrom(_type_of(inner))
    return found


def on_samples(function: Callable[[int], T], samples: Sequence[int], workers: int) -> list[T]:
    """What a function that runs the model gives for samples, in order, by several threads.

    Raises CalibrationError where the model fails: on a sample, or on every one, which is hardly the
    samples' fault.
    """

    def attempt(sample: int) -> T | CalibrationError:
        try:
            return function(sample)
        except CalibrationError as error:
            return error

    results: list[T] = []
    failed: list[CalibrationError] = []
    for result in _on_threads(attempt, samples, workers):
        if isinstance(result, CalibrationError):
            failed.append(result)
        else:
            results.append(result)
    if failed and not results:
        raise CalibrationError(
            f"ONNX Runtime {ort.__version__} runs the model on none of the "
            f"{counted(len(samples), 'calibration sample')}: {_reason(failed[0].__cause__)}; "
            "check that it runs the model itself on them"
        ) from failed[0]
    if failed:
        raise failed[0]
    return results


def _on_threads(function: Callable[[int], T], numbers: Sequence[int], workers: int) -> list[T]:
    """The results for all numbers, in order. A thread gets several at a time: each may be short."""
    if workers == 1:
        return [function(number) for number in numbers]
    size = -(-len(numbers) // (4 * workers))
    parts = [numbers[begin : begin + size] for begin in range(0, len(numbers), size)]
    with ThreadPoolExecutor(workers) as pool:
        results = pool.map(lambda part: [function(number) for number in part], parts)
        return [result for part in results for result in part]


def run(session: ort.InferenceSession, outputs: list[str], feeds: Tensors, sample: int) -> Tensors:
    """Run a part of the model on one sample; CalibrationError when it fails."""
    wanted = {item.name for item in session.get_inputs()}
    try:
        values = session.run(outputs, {n: value for n, value in feeds.items() if n in wanted})
    except Exception as error:  # ORT's exceptions have no common base below Exception
        raise CalibrationError(
            f"the model fails on calibration sample {sample}: {_reason(error)}; check the sample"
        ) from error
    return dict(zip(outputs, values, strict=True))


def _reason(error: BaseException | None) -> str:
    return " ".join(str(error).split())[:300]


class _LiveTensors:
    """Tensors by level and sample; those that do not fit in memory lie in a file each."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._held: dict[tuple[Level, int], Tensors] = {}
        self._numbers = itertools.count()
        self._memory_bytes = 0
        self._lock = threading.Lock()

    def put(self, key: tuple[Level, int], tensors: Tensors) -> None:
        """Add tensors under a key."""
        held = self._held.setdefault(key, {})
        for name, value in tensors.items():
            if name in held:
                self._forget(held[name])
            held[name] = self._stored(value)

    def get(self, key: tuple[Level, int], names: Iterable[str]) -> Tensors:
        """Some tensors of a key."""
        held = self._held[key]
        return {name: _loaded(held[name]) for name in names}

    def names(self, key: tuple[Level, int]) -> set[str]:
        """The names of the tensors under a key."""
        return set(self._held[key])

    def keep(self, key: tuple[Level, int], names: Iterable[str]) -> None:
        """Let go of all tensors of a key but these."""
        held = self._held[key]
        for name in held.keys() - set(names):
            self._forget(held.pop(name))

    def _stored(self, value: Any) -> Any:
        if not isinstance(value, np.ndarray) or value.dtype == object:
            return value
        with self._lock:
            fits = self._memory_bytes + value.nbytes <= _MEMORY_BYTES
            self._memory_bytes += value.nbytes if fits else 0
            path = self._folder / f"live_{next(self._numbers)}.npy"
        if fits:
            return value
        with storage_errors(path):
            np.save(path, value)
        return path

    def _forget(self, stored: Any) -> None:
        if isinstance(stored, Path):
            stored.unlink(missing_ok=True)
        elif isinstance(stored, np.ndarray) and stored.dtype != object:
            with self._lock:
                self._memory_bytes -= stored.nbytes


def _loaded(stored: Any) -> Any:
    if not isinstance(stored, Path):
        return stored
    with storage_errors(stored):
        return np.load(stored, allow_pickle=False)
