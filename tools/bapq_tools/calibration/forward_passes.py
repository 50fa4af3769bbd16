"""Runs the calibration samples through the model, stage by stage, at several levels side by side.

The float pass runs the model as it was; the pass of a level runs it with the layers that are
already quantized at that level. Comparing the two tells what a layer really meets on the device.

One sample is run at a time, whatever the model's batch axis allows: models whose batch is declared
dynamic but fixed inside work too. Tensors that later stages read are kept, on disk where they are
many. Nothing depends on the number of workers: each run has one thread.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

from bapq_edge.bank.layout import Level
from bapq_edge.bank.staging import storage_errors
from bapq_edge.errors import CalibrationError

from ..onnx_graph.ir import HeavyLayer
from .reference_model import Reference, Stage, observed_use
from .samples import CalibrationData

FLOAT: Level = 32
"""The level of the float pass."""

_SILENT = 4
"""ORT's log severity "fatal": errors reach us as exceptions."""

_MEMORY_BYTES = 192 << 20
"""Live tensors kept in memory; more go to files."""

Tensors = dict[str, Any]
"""Arrays by name. A sequence is a list of arrays."""

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
        for level, sample in itertools.product(self.levels, range(data.samples)):
            self._live.put((level, sample), dict(data.feed(sample)))

    def run(self, stage: Stage) -> None:
        """Compute a stage of every pass, and let go of what nobody reads any more."""
        if not stage.nodes:
            return
        outputs = sorted(stage.writes)
        session = None
        if outputs:
            example = self._live.get((FLOAT, 0))
            session = self.session(stage.nodes, {n: example[n] for n in stage.reads}, outputs)
        for level in self.levels:
            feeds = self.weight_feeds(level, stage.nodes)

            def step(
                sample: int,
                level: Level = level,
                feeds: Mapping[str, np.ndarray] = feeds,
            ) -> None:
                tensors = self._live.get((level, sample))
                if session is not None:
                    inputs = {name: tensors[name] for name in stage.reads}
                    tensors.update(run(session, outputs, {**feeds, **inputs}, sample))
                kept = {name: value for name, value in tensors.items() if name in stage.live}
                self._live.put((level, sample), kept)

            with ThreadPoolExecutor(self.workers) as pool:
                for _ in pool.map(step, range(self.samples)):
                    pass

    def input_of(self, layer: HeavyLayer, level: Level, sample: int) -> np.ndarray:
        """The input that a layer of the latest stage multiplies in the pass of a level."""
        found: np.ndarray = self.tensors(level, sample)[observed_use(layer).activation_input]
        return found

    def tensors(self, level: Level, sample: int) -> Tensors:
        """All live tensors of one pass and sample."""
        return self._live.get((level, sample))

    def weight_feeds(self, level: Level, nodes: Iterable[onnx.NodeProto]) -> dict[str, np.ndarray]:
        """The weights that these nodes read in the pass of a level."""
        feeds: dict[str, np.ndarray] = {}
        for layer in self._reference.weight_inputs(nodes):
            feeds.update(self._weights(level, layer))
        return feeds

    def session(
        self, nodes: Iterable[onnx.NodeProto], examples: Tensors, outputs: list[str]
    ) -> ort.InferenceSession:
        """A session for some nodes."""
        model = self._reference.model_of(nodes, examples, outputs)
        options = ort.SessionOptions()
        options.log_severity_level = _SILENT
        options.intra_op_num_threads = 1
        options.enable_cpu_mem_arena = False  # would keep the largest sample's memory
        return ort.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )


def run(session: ort.InferenceSession, outputs: list[str], feeds: Tensors, sample: int) -> Tensors:
    """Run a part of the model on one sample; CalibrationError when it fails."""
    wanted = {item.name for item in session.get_inputs()}
    try:
        values = session.run(outputs, {n: value for n, value in feeds.items() if n in wanted})
    except Exception as error:  # ORT's exceptions have no common base below Exception
        reason = " ".join(str(error).split())[:300]
        raise CalibrationError(
            f"the model fails on calibration sample {sample}: {reason}; check the sample"
        ) from error
    return dict(zip(outputs, values, strict=True))


class _LiveTensors:
    """Tensors by level and sample; those that do not fit in memory lie in files."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._memory: dict[tuple[Level, int], Tensors] = {}
        self._bytes: dict[tuple[Level, int], int] = {}
        self._total_bytes = 0
        self._lock = threading.Lock()

    def put(self, key: tuple[Level, int], tensors: Tensors) -> None:
        """Keep tensors under a key, in a file if memory is full."""
        size = sum(v.nbytes for v in tensors.values() if isinstance(v, np.ndarray))
        plain = all(isinstance(v, np.ndarray) and v.dtype != object for v in tensors.values())
        with self._lock:
            self._total_bytes -= self._bytes.get(key, 0)
            fits = self._total_bytes + size <= _MEMORY_BYTES or not plain
            self._bytes[key] = size if fits else 0
            self._total_bytes += self._bytes[key]
        with storage_errors(self._file(key)):
            if fits:
                self._file(key).unlink(missing_ok=True)
            else:
                np.savez(self._file(key), **{str(i): v for i, v in enumerate(tensors.values())})
                tensors = dict.fromkeys(tensors)
        self._memory[key] = tensors

    def get(self, key: tuple[Level, int]) -> Tensors:
        """The tensors of a key, in a new dict."""
        tensors = dict(self._memory[key])
        if tensors and all(value is None for value in tensors.values()):
            with np.load(self._file(key), allow_pickle=False) as file:
                return {name: file[str(i)] for i, name in enumerate(tensors)}
        return tensors

    def _file(self, key: tuple[Level, int]) -> Path:
        return self._folder / f"{key[0]}_{key[1]}.npz"
