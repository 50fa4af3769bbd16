"""Runs the calibration samples through the model, stage by stage, in several chains at once.

The float chain runs the model as it was; the chain of a level runs it with the layers that are
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

from bapq_edge.bank.staging import storage_errors
from bapq_edge.errors import CalibrationError

from ..onnx_graph.ir import HeavyLayer
from .reference_model import Reference, Stage, observed_use
from .samples import CalibrationData

FLOAT = 32
"""Name of the float chain; the others are named by their level."""

_SILENT = 4
"""ORT's log severity "fatal": errors reach us as exceptions."""

_MEMORY_BYTES = 192 << 20
"""Live tensors kept in memory; more go to files."""

Tensors = dict[str, Any]
"""Arrays by name; a sequence is a list of arrays"""

WeightSource = Callable[[int, HeavyLayer], Mapping[str, np.ndarray]]
"""(chain, layer) -> what the reference graph reads for the layer"""


class Chains:
    """Live tensors of every chain and sample, moved on by `run`."""

    def __init__(
        self,
        reference: Reference,
        data: CalibrationData,
        chains: Iterable[int],
        weights: WeightSource,
        workers: int,
        folder: Path,
    ) -> None:
        """`workers` are threads; `folder` holds what does not fit in memory."""
        self.samples = data.samples
        self.chains = (FLOAT, *chains)
        self._reference = reference
        self._weights = weights
        self.workers = max(1, workers)
        self._shelf = _Shelf(folder)
        for chain, sample in itertools.product(self.chains, range(data.samples)):
            self._shelf.put((chain, sample), dict(data.feed(sample)))

    def run(self, stage: Stage) -> None:
        """Compute a stage in every chain, and let go of what nobody reads any more."""
        if not stage.nodes:
            return
        outputs = sorted(stage.writes)
        session = None
        if outputs:
            example = self._shelf.get((FLOAT, 0))
            session = self.session(stage.nodes, {n: example[n] for n in stage.reads}, outputs)
        for chain in self.chains:
            feeds = self.weight_feeds(chain, stage.nodes)

            def step(
                sample: int,
                chain: int = chain,
                feeds: Mapping[str, np.ndarray] = feeds,
            ) -> None:
                tensors = self._shelf.get((chain, sample))
                if session is not None:
                    inputs = {name: tensors[name] for name in stage.reads}
                    tensors.update(run(session, outputs, {**feeds, **inputs}, sample))
                kept = {name: value for name, value in tensors.items() if name in stage.live}
                self._shelf.put((chain, sample), kept)

            with ThreadPoolExecutor(self.workers) as pool:
                for _ in pool.map(step, range(self.samples)):
                    pass

    def input_of(self, layer: HeavyLayer, chain: int, sample: int) -> np.ndarray:
        """What a layer of the latest stage multiplies in one chain."""
        return self._shelf.get((chain, sample))[observed_use(layer).activation_input]

    def tensors(self, chain: int, sample: int) -> Tensors:
        """All live tensors of one chain and sample."""
        return self._shelf.get((chain, sample))

    def weight_feeds(self, chain: int, nodes: Iterable[onnx.NodeProto]) -> dict[str, np.ndarray]:
        """Weights that these nodes read in a chain."""
        feeds: dict[str, np.ndarray] = {}
        for layer in self._reference.weight_inputs(nodes):
            feeds.update(self._weights(chain, layer))
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


class _Shelf:
    """Tensors by key; those that do not fit in memory lie in files."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._memory: dict[tuple[int, int], Tensors] = {}
        self._bytes: dict[tuple[int, int], int] = {}
        self._total_bytes = 0
        self._lock = threading.Lock()

    def put(self, key: tuple[int, int], tensors: Tensors) -> None:
        """Keep tensors under a key; each array is put in a file if memory is full."""
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

    def get(self, key: tuple[int, int]) -> Tensors:
        """Tensors of a key, in a new dict."""
        tensors = dict(self._memory[key])
        if tensors and all(value is None for value in tensors.values()):
            with np.load(self._file(key), allow_pickle=False) as file:
                return {name: file[str(i)] for i, name in enumerate(tensors)}
        return tensors

    def _file(self, key: tuple[int, int]) -> Path:
        return self._folder / f"{key[0]}_{key[1]}.npz"
