"""Boundary models: what the bank says of an input, from a few features of one tensor.

tap ──pool──► values ──project──► features ──tree or k-means──► region ──point──► precision

Their parameters stand in the manifest, their arrays in boundary/<name>.<array>.npy.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..errors import RequestError
from .fields import integer, number
from .layer import Layer
from .layout import Level
from .strict_json import KEY, Rule

__all__ = [
    "MAX_PRECISIONS",
    "MAX_VALUES",
    "Boundary",
    "BoundaryArrays",
    "Precision",
    "Stage",
    "StaticPoint",
    "array_file",
]

Stage = Literal["start", "gate", "answer"]
"""When the region is found: from an input before the run, from the tensor that the split graph's
head ends in, or from an output. The first two gate, the last escalates."""

Kind = Literal["tree", "kmeans"]
Scores = Literal["none", "logits", "probabilities"]
Agreement = Literal["argmax", "cosine", "tolerance"]
BoundaryArrays = dict[str, NDArray[Any]]

MAX_VALUES = 1 << 16
MAX_FEATURES = 256
MAX_REGIONS = 256
MAX_PRECISIONS = 64
MAX_POINTS = 256
MAX_NODES = 2 * MAX_REGIONS - 1

_F4, _F8, _I4, _U1 = (np.dtype(name) for name in ("<f4", "<f8", "<i4", "u1"))


@dataclass(frozen=True)
class Precision:
    """The precision of a run: one level for all chunks, or the planner's best plan of some bits."""

    level: Level | None = None
    bits: Annotated[float, number(1, 32)] | None = None
    region: Annotated[int, integer(0, MAX_REGIONS - 1)] | None = None
    """Region whose rows of low contribution are skipped; None: no row is."""

    def __post_init__(self) -> None:
        """Refuse what is no number; whether a bank can run at it, its planner says."""
        for name, value, kind in (("bits", self.bits, Real), ("region", self.region, Integral)):
            if value is not None and not isinstance(value, kind):
                raise RequestError(f"{name} of a Precision is {value!r}: give a number, or None")

    def __str__(self) -> str:
        """The precision as a message names it."""
        precision = f"level {self.level}" if self.bits is None else f"{self.bits:g} bits"
        return precision if self.region is None else f"{precision}, rows of region {self.region}"


@dataclass(frozen=True)
class StaticPoint:
    """One precision for all inputs, as a fit has measured it on samples that it held out."""

    precision: Precision
    bits: Annotated[float, number(1, 32)]
    """Weight bits read per weight and run."""
    agreement: Annotated[float, number(-1, 1)]
    """Mean agreement with the float model."""
    agreement_bound: Annotated[float, number(-1, 1)]
    """Lower bound of the agreement, at the fit's confidence."""


@dataclass(frozen=True)
class Boundary:
    """One boundary model, as the manifest describes it."""

    name: Annotated[
        str,
        Rule(
            "1 to 60 small letters, digits and '-'",
            lambda s: 0 < len(s) <= 60 and set(s) <= set("abcdefghijklmnopqrstuvwxyz0123456789-"),
        ),
    ]
    stage: Stage
    tap: Annotated[str, Rule("1 to 1024 characters", lambda s: 0 < len(s) <= 1024)]
    """Tensor that the features are taken from: an input, the head's output, or an output."""
    base: Precision
    """What the tap is computed at. Of an answer it is the first precision: the answer may stand."""
    pool: tuple[Annotated[int, integer(1, MAX_VALUES)], ...]
    """Length that every axis of the tap but the first is averaged down to."""
    scores: Scores
    """What the projected values are: "logits" adds their margin and entropy to the features;
    "probabilities" takes their logarithm first."""
    features: Annotated[int, integer(1, MAX_FEATURES)]
    """Number of projected values; margin and entropy come on top."""
    kind: Kind
    regions: Annotated[int, integer(1, MAX_REGIONS)]
    """Number of regions; region 0 is the one whose answers are most in doubt."""
    nodes: Annotated[int, integer(0, MAX_NODES)]
    """Number of the tree's nodes; 0 for k-means."""
    precisions: tuple[Precision, ...] = field(metadata={KEY: "wishes"})
    """The precisions that a region can be run at; the format keeps an older word for them."""
    points: Annotated[int, integer(1, MAX_POINTS)]
    """Number of operating points: each gives every region a precision."""
    samples: Annotated[int, integer(1, 1 << 31)]
    """Number of held-out samples that losses and bounds were measured on."""
    confidence: Annotated[float, number(0.5, 1)]
    """Confidence level of the bounds."""

    @property
    def values(self) -> int:
        """Number of values of the tap after pooling."""
        return math.prod(self.pool)

    @property
    def all_features(self) -> int:
        """Number of features that regions are found from."""
        return self.features + (2 if self.scores != "none" else 0)

    @property
    def skips(self) -> bool:
        """Whether some precision skips rows."""
        return any(precision.region is not None for precision in self.precisions)

    def shapes(self, layers: Sequence[Layer]) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
        """Type and shape of every array, in a bank of these layers."""
        regions, precisions = self.regions, len(self.precisions)
        shapes: dict[str, tuple[np.dtype[Any], tuple[int, ...]]] = {
            "center": (_F4, (self.values,)),  # features = (values - center) @ projection + offset
            "projection": (_F4, (self.values, self.features)),
            "offset": (_F4, (self.features,)),
            "mix": (_F4, (regions,)),  # shares of the samples
            "loss": (_F4, (regions, precisions)),  # 1 - mean agreement with the reference
            "loss_bound": (_F4, (regions, precisions)),
            "assignment": (_U1, (self.points, regions)),  # precision of every region
            "outlook": (_F4, (self.points, 3)),  # mean bits, mean agreement, its lower bound
        }
        if self.kind == "tree":
            shapes |= {
                "node_feature": (_I4, (self.nodes,)),  # -1: a leaf
                "node_threshold": (_F8, (self.nodes,)),  # to the first child where not above it
                "node_children": (_I4, (self.nodes, 2)),
                "node_region": (_I4, (self.nodes,)),
            }
        else:
            shapes |= {
                "scale": (_F4, (self.all_features,)),  # features are multiplied by it
                "centers": (_F8, (regions, self.all_features)),
            }
        if self.skips:
            chunks = sum(layer.chunk_count for layer in layers)
            rows = sum(layer.stored_rows for layer in layers)
            shapes |= {
                "skipped": (_U1, (regions, chunks)),  # 1: the chunk is skipped
                "row_values": (_F4, (regions, rows)),  # what stands in for skipped rows
            }
        return shapes

    def check_arrays(self, arrays: Mapping[str, NDArray[Any]], layers: Sequence[Layer]) -> None:
        """Raise ValueError where the arrays, of the right types and shapes, make no model."""
        for name, array in arrays.items():
            if array.dtype.kind == "f" and not np.isfinite(array).all():
                raise ValueError(f"{name} holds a value that is no finite number")
        _within("mix", arrays["mix"], 0, 1)
        if abs(float(arrays["mix"].sum()) - 1) > 1e-3:
            raise ValueError(f"mix adds up to {float(arrays['mix'].sum()):g}, must be 1")
        _within("assignment", arrays["assignment"], 0, len(self.precisions) - 1)
        if self.kind == "tree":
            _check_tree(arrays, self.all_features, self.regions)
        if self.skips:
            _within("skipped", arrays["skipped"], 0, 1)
            for layer in layers:
                if "Gather" in layer.operators and arrays["skipped"][:, layer.chunk_range].any():
                    raise ValueError(f"skipped: layer {layer.name} is gathered, none may be")


def array_file(boundary: str, array: str) -> str:
    """Path of an array in the bank."""
    return f"boundary/{boundary}.{array}.npy"


def _within(name: str, array: NDArray[Any], low: float, high: float) -> None:
    if array.size and not (low <= array.min() and array.max() <= high):
        raise ValueError(
            f"{name} has values from {array.min()} to {array.max()}, allowed are {low} to {high}"
        )


def _check_tree(arrays: Mapping[str, NDArray[Any]], features: int, regions: int) -> None:
    feature, children = arrays["node_feature"], arrays["node_children"]
    nodes = len(feature)
    _within("node_feature", feature, -1, features - 1)
    inner = np.flatnonzero(feature >= 0)
    _within("node_region", arrays["node_region"][feature < 0], 0, regions - 1)
    below = children[inner]
    # Children come after their parent, so every walk ends.
    if ((below <= inner[:, None]) | (below >= nodes)).any():
        raise ValueError(f"node_children must be after their node, and below {nodes}")
