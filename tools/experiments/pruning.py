"""Boundary pruning at one threshold, measured in a process of its own."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime

from bapq_edge import Session
from bapq_edge.profiling import Meter
from bapq_tools import build_bank
from bapq_tools.onnx_graph.fold import fold
from bapq_tools.onnx_graph.layers import find_layers
from bapq_tools.quantize.prune import prune
from experiments.results import forget_peak

__all__ = ["prune_once", "pruned_accuracy"]


def prune_once(model: bytes, threshold: float) -> dict[str, Any]:
    """Time, peak memory and share of the weights left, of pruning the layers of a serialised model.

    The window takes the model in, finds its layers and prunes them. `peak_mem_mb` is what the
    process's peak resident memory grows by meanwhile, in units of 10^6 bytes.
    """
    prune_loaded(onnx.load_from_string(model), threshold)  # what loads late is there now
    forget_peak()
    with Meter() as meter:
        meter.measure_idle()
        with meter.window("prune"):
            kept, weights = prune_loaded(onnx.load_from_string(model), threshold)
    (window,) = meter.windows
    peak = window.peak_growth_bytes
    return {
        "time_s": window.wall_s,
        "peak_mem_mb": None if peak is None else peak / 1e6,
        "param_ratio": kept / weights,
        "energy_j": window.net_energy_j,
    }


def prune_loaded(model: onnx.ModelProto, threshold: float) -> tuple[int, int]:
    """(weights that are left, weights) of the model's layers."""
    reports = [prune(layer, threshold) for layer in find_layers(fold(model)).layers]
    return sum(each.remaining for each in reports), sum(each.weights for each in reports)


def accuracy_of(session: Any, images: np.ndarray, labels: np.ndarray, batch_size: int) -> float:
    """Share of the images that a session of one input and one output answers right."""
    (name,) = [value.name for value in session.get_inputs()]
    answers = [
        session.run(None, {name: images[begin : begin + batch_size]})[0].argmax(1)
        for begin in range(0, len(images), batch_size)
    ]
    return float(np.mean(np.concatenate(answers) == labels))


def pruned_accuracy(
    model: onnx.ModelProto,
    threshold: float,
    images: np.ndarray,
    labels: np.ndarray,
    batch_size: int,
) -> tuple[float, float]:
    """(accuracy of the model in ONNX Runtime, that of its pruned bank at level 32)."""
    float_session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    with tempfile.TemporaryDirectory() as folder:
        bank = Path(folder) / "pruned.bank"
        build_bank(model, bank, levels=(32,), prune_tau=threshold, progress=False)
        with Session(bank, level=32) as session:
            after = accuracy_of(session, images, labels, batch_size)
    return accuracy_of(float_session, images, labels, batch_size), after
