"""Where chunks are during a run: pinned in memory, or passing through the ring."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..bank.layout import CHUNK_ALIGNMENT
from .timing import Speeds, hidden_bytes, run_s

__all__ = [
    "Placement",
    "aligned",
    "fits",
    "pin_evenly",
    "place",
    "ring_bytes_for",
    "smallest_for",
]

_RING_CHUNKS = 3
"""One chunk being computed on, one ready, one being read: reading and computing never wait for a
free place, only for each other."""

_LEAST_RING_CHUNKS = 2
"""One being computed on, one being read."""

_RING_SHARE = 8
"""Where an eighth of the limit is more than `_RING_CHUNKS`, the ring takes that much."""

_RING_BYTES = 4 << 20
"""No ring is larger: this one rides out 100 ms of a slow card (40 MB/s). More memory is better
spent on pinned chunks: a larger ring reads no byte less."""


@dataclass(frozen=True, eq=False)
class Placement:
    """How much of each layer is pinned within a limit, and what that costs in time."""

    ring_bytes: int
    """Size of the ring; 0 when nothing is streamed."""
    pinned_share: NDArray[np.float64]
    """(layers,): share of the layer's bytes that is pinned."""
    run_s: float
    """Predicted time of a run; 0 where nothing is known of it."""


def place(
    layer_bytes: NDArray[np.float64], largest: int, limit: int | None, speeds: Speeds | None
) -> Placement:
    """Share the limit out over layers, (layers,) bytes, such that operators wait the least.

    What is streamed of a layer is what the time of computing up to there can hide, as far as that
    goes; `largest` is the largest chunk in the ring.
    """
    total = float(layer_bytes.sum())
    if limit is None or total <= limit:
        compute_s = 0.0 if speeds is None else speeds.compute_s
        return Placement(0, np.ones(len(layer_bytes)), compute_s)
    ring_bytes = ring_bytes_for(limit, largest)
    wanted = total - (limit - ring_bytes)
    if speeds is None:
        return Placement(ring_bytes, np.full(len(layer_bytes), 1 - wanted / total), 0.0)
    hidden = hidden_bytes(layer_bytes, speeds, ring_bytes)
    if (most := float(hidden.sum())) >= wanted:
        streamed = hidden * (wanted / most)
    else:
        left = layer_bytes - hidden
        streamed = hidden + left * ((wanted - most) / float(left.sum()))
    share = 1 - np.divide(streamed, layer_bytes, out=np.ones(len(streamed)), where=layer_bytes > 0)
    return Placement(ring_bytes, share, run_s(streamed, speeds, ring_bytes))


def fits(total: int, largest: int, limit: int) -> bool:
    """Whether chunks of so many bytes in all can run in the limit."""
    return total <= limit or _LEAST_RING_CHUNKS * aligned(largest) <= limit


def pin_evenly(
    sizes: NDArray[np.int64],
    pinned_bytes: int,
    resident: NDArray[np.bool_] | None,
    share: NDArray[np.float64] | None = None,
) -> NDArray[np.bool_]:
    """Chunks to pin, spread evenly over the execution order: (chunks,).

    `share` (chunks,) is what is to be pinned of each, in all `pinned_bytes`; None: the same of all.

    Error diffusion: a chunk is pinned where that brings the pinned bytes so far nearer to what is
    due of all bytes so far. The result has `pinned_bytes` or less by under one chunk.
    """
    due = np.cumsum(sizes * (pinned_bytes / int(sizes.sum()) if share is None else share))
    # A chunk that is pinned now stays until it is ahead of the share, another one waits until it is
    # wholly due: a plan made again is the same plan.
    threshold = sizes / 2 if resident is None else np.where(resident, 0, sizes)
    pinned = np.zeros(len(sizes), np.bool_)
    done = 0
    items = zip(sizes.tolist(), due.tolist(), threshold.tolist(), strict=True)
    for i, (size, due_bytes, least) in enumerate(items):
        if due_bytes - done >= least and done + size <= pinned_bytes:
            pinned[i] = True
            done += size
    return pinned


def smallest_for(sizes: NDArray[np.int64]) -> int:
    """Smallest limit for chunks of these sizes."""
    if not len(sizes):
        return 0
    return min(int(sizes.sum()), _LEAST_RING_CHUNKS * aligned(int(sizes.max())))


def ring_bytes_for(limit: int, largest: int) -> int:
    """Ring for chunks of up to `largest` bytes, within a limit."""
    share = min(limit // _RING_SHARE, _RING_BYTES)
    return min(max(_RING_CHUNKS * largest, share), limit) // CHUNK_ALIGNMENT * CHUNK_ALIGNMENT


def aligned(size: int) -> int:
    """What a chunk of this size takes in the ring."""
    return -(-size // CHUNK_ALIGNMENT) * CHUNK_ALIGNMENT
