"""How long a run takes: reading and computing go on side by side, as far as the ring reaches.

Layer by layer, with bytes as a liquid: the reader is never further ahead than the ring is large,
and an operator waits for what has not come yet. Runs follow each other, so the reader begins a run
with what it read ahead in the one before.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Speeds", "hidden_bytes", "run_s"]

_ROUNDS = 2
"""The first run fills the ring, the second is as all that follow."""


@dataclass(frozen=True, eq=False)
class Speeds:
    """How fast this device reads the bank and computes on it."""

    storage_bytes_s: float
    """Read speed."""
    layer_s: NDArray[np.float64]
    """(layers,): time that each takes in a run with all weights in memory; zeros: not known."""
    core_s_per_byte: float = 0.0
    """Time that reading a byte takes away from computing, where they share the cores."""

    @property
    def compute_s(self) -> float:
        """Time of a run with all weights in memory."""
        return float(self.layer_s.sum())

    def readable_bytes(self, least_s: float) -> float:
        """Bytes that can be read while a run computes, or in `least_s` if that is longer."""
        return self.storage_bytes_s * max(self.compute_s, least_s)

    def __str__(self) -> str:
        """Both speeds, for people."""
        mb_s, ms = (
            f"{x:.0f}" if x >= 100 else f"{x:.3g}"
            for x in (self.storage_bytes_s / 1e6, self.compute_s * 1e3)
        )
        return f"storage of {mb_s} MB/s, {ms} ms of computing"


def hidden_bytes(
    layer_bytes: NDArray[np.float64], speeds: Speeds, ring_bytes: int
) -> NDArray[np.float64]:
    """(layers,): most bytes of each layer that can be read without an operator waiting.

    `layer_bytes` (layers,) is what each has.
    """
    hidden = np.zeros(len(layer_bytes))
    ahead = 0.0
    for _ in range(_ROUNDS):
        for i, (size, seconds) in enumerate(_items(layer_bytes, speeds.layer_s)):
            readable = ahead + seconds * speeds.storage_bytes_s
            hidden[i] = min(size, readable)
            ahead = min(readable - hidden[i], ring_bytes)
    return hidden


def run_s(streamed_bytes: NDArray[np.float64], speeds: Speeds, ring_bytes: int) -> float:
    """Time of a run, in a row of runs, that streams these bytes of each layer, (layers,)."""
    layer_s = speeds.layer_s + streamed_bytes * speeds.core_s_per_byte
    ahead, total_s = 0.0, 0.0
    for _ in range(_ROUNDS):
        total_s = 0.0
        for size, seconds in _items(streamed_bytes, layer_s):
            took_s = max(seconds, (size - ahead) / speeds.storage_bytes_s)
            ahead = min(ahead + took_s * speeds.storage_bytes_s - size, ring_bytes)
            total_s += took_s
    return total_s


def _items(
    layer_bytes: NDArray[np.float64], layer_s: NDArray[np.float64]
) -> list[tuple[float, float]]:
    return list(zip(layer_bytes.tolist(), layer_s.tolist(), strict=True))
