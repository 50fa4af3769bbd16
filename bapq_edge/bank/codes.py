"""Codes of a layer and the bytes of its tile records: pack, unpack, dequantize. NumPy only."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from .layout import Level, Plane

__all__ = ["LayerCodes"]


@dataclass
class LayerCodes:
    """A quantized layer (or a run of its rows), before packing and after unpacking."""

    weight: NDArray[np.float32] | None = None
    """(rows, columns): plane f32"""
    codes: dict[Plane, NDArray[np.uint8]] = field(default_factory=dict)
    """(rows, columns) of p4, r8 (0..15), s1, m1 (0..1), as far as the bank holds the plane"""
    scales: dict[Level, NDArray[np.float32]] = field(default_factory=dict)
    """(rows, scale groups) of levels 4, 2, 1; each value exactly a bf16"""
    bias: dict[Level, NDArray[np.float32]] = field(default_factory=dict)
    """(rows,) of every level that a plane completes; empty when the layer has none"""
