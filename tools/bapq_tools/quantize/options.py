"""The options of a layer: levels, columns per scale, pruning."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from bapq_edge.bank.layout import Level

SCALE_COLUMNS: dict[Level, int] = {4: 32, 2: 96, 1: 128}
"""Columns per scale: a bf16 scale costs 0.5, 0.17 and 0.125 bits per weight. With 64 instead of
96, level 2 of MiniLM has a cosine of 0.877 instead of 0.868, and a bank of levels 8, 4 and 2 has
1.274 instead of 1.265 times the bytes of one of level 8."""

COMPENSATED_CONV_COLUMNS = 128
"""The same of a convolution at levels 8 and 4, where its codes make up for each other's errors. Its
activations have one scale, so sums run on as integers for as long as the scale of the weights
lasts: a sixth less work for the kernels on CPUs with dot products, and 0.375 bits less a weight."""


@dataclass(frozen=True)
class LayerOptions:
    """The options of one layer, by the build or by its recipe."""

    levels: tuple[Level, ...]
    """Levels that the layer gets, highest first: those of the bank or some of them."""
    scale_columns: Mapping[Level, int] = field(default_factory=dict)
    """Columns per scale, where they are not those of `SCALE_COLUMNS`."""
    prune_tau: float = 0.0
    """Weights smaller than this share of the layer's largest are zeroed."""


def scale_columns_of(options: LayerOptions) -> dict[Level, int]:
    """Columns per scale of levels 4, 2 and 1."""
    return {**SCALE_COLUMNS, **options.scale_columns}
