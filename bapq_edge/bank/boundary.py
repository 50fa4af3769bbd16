"""Boundary models: what the bank says of an input, from a few features of one tensor.

tap ──pool──► values ──project──► features ──tree or k-means──► region ──point──► precision

Their parameters stand in the manifest, their arrays in boundary/<name>.<array>.npy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray

from .layout import Level
from .strict_json import KEY, Rule

if TYPE_CHECKING:
    from .manifest import Manifest

__all__ = ["Arrays", "Boundary", "Precision", "Stage", "array_file"]

Stage = Literal["start", "gate", "answer"]
"""When the region is found: from an input before the run, from the tensor that the split graph's
head ends in, or from an output. The first two gate, the last escalates."""

Kind = Literal["tree", "kmeans"]
Scores = Literal["none", "logits", "probabilities"]
Agreement = Literal["argmax", "cosine", "tolerance"]
Arrays = dict[str, NDArray[Any]]

MAX_VALUES = 1 << 16
MAX_FEATURES = 256
MAX_REGIONS = 256
MAX_PRECISIONS = 64
MAX_POINTS = 256
MAX_NODES = 2 * MAX_REGIONS - 1

_F4, _F8, _I4, _U1 = (np.dtype(name) for name in ("<f4", "<f8", "<i4", "u1"))


def _count(low: int, high: int) -> Rule:
    return Rule(f"an integer from {low} to {high}", lambda n: low <= n <= high)


def _number(low: float, high: float) -> Rule:
    return Rule(f"a number from {low:g} to {high:g}", lambda x: low <= x <= high)


@dataclass(frozen=True)
class Precision:
    """The precision of a run: one level for all chunks, or the planner's best plan of some bits."""

    level: Level | None = None
    bits: Annotated[float, _number(1, 32)] | None = None
    region: Annotated[int, _count(0, MAX_REGIONS - 1)] | None = None
    """Region whose rows of low contribution are skipped; None: no row is."""

    def __str__(self) -> str:
        """For people."""
        precision = f"level {self.level}" if self.bits is None else f"{self.bits:g} bits"
        return precision if self.region is None else f"{precision}, rows of region {self.region}"


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
    pool: tuple[Annotated[int, _count(1, MAX_VALUES)], ...]
    """Length that every axis of the tap but the first is averaged down to."""
    scores: Scores
    """What the projected values are: "logits" adds their margin and entropy to the features;
    "probabilities" takes their logarithm first."""
    features: Annotated[int, _count(1, MAX_FEATURES)]
    """Projected values; margin and entropy come on top."""
    kind: Kind
    regions: Annotated[int, _count(1, MAX_REGIONS)]
    """Numbered from the one whose answers are most in doubt."""
    nodes: Annotated[int, _count(0, MAX_NODES)]
    """Of the tree; 0 for k-means."""
    precisions: tuple[Precision, ...] = field(metadata={KEY: "wishes"})
    """What a region can be run at."""
    points: Annotated[int, _count(1, MAX_POINTS)]
    """Operating points: each gives every region a precision."""
    samples: Annotated[int, _count(1, 1 << 31)]
    """Held-out samples that losses and bounds were measured on."""
    confidence: Annotated[float, _number(0.5, 1)]
    """Of the bounds."""

    @property
    def values(self) -> int:
        """Values of the tap after pooling."""
        return math.prod(self.pool)

    @property
    def all_features(self) -> int:
        """Features that regions are found from."""
        return self.features + (2 if self.scores != "none" else 0)

    @property
    def skips(self) -> bool:
        """Whether some precision skips rows."""
        return any(precision.region is not None for precision in self.precisions)

    def shapes(self, manifest: Manifest) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
        """Type and shape of every array."""
        regions, precisions = self.regions, len(self.precisions)
        shapes: dict[str, tuple[np.dtype[Any], tuple[int, ...]]] = {
            "center": (_F4, (self.values,)),  # features = (values - center) @ projection + offset
            "projection": (_F4, (self.values, self.features)),
            "offset": (_F4, (self.features,)),
            "mix": (_F4, (regions,)),  # share of the samples
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
            rows = sum(layer.stored_rows for layer in manifest.layers)
            shapes |= {
                "skipped": (_U1, (regions, manifest.chunk_count)),  # 1: the chunk is skipped
                "row_values": (_F4, (regions, rows)),  # what stands in for skipped rows
            }
        return shapes

    def check(self, manifest: Manifest, check: Callable[[bool, str, Any, Any], None]) -> None:
        """Checks that span several fields; `check(good, key, found, expected)`."""
        precisions = [(f"wishes[{i}]", precision) for i, precision in enumerate(self.precisions)]
        for key, precision in [("base", self.base), *precisions]:
            check(
                (precision.level is None) != (precision.bits is None),
                key,
                precision,
                "a level or bits",
            )
            levels = manifest.levels
            check(
                precision.level in (None, *levels), key, precision, f"of the levels {list(levels)}"
            )
            check(
                (precision.region or 0) < self.regions, key, precision, f"of {self.regions} regions"
            )
        count = len(self.precisions)
        check(
            1 <= count <= MAX_PRECISIONS, "wishes", f"{count} precisions", f"1 to {MAX_PRECISIONS}"
        )
        check(len(set(self.precisions)) == count, "wishes", "with one twice", "each once")
        check(self.base.region is None, "base", self.base, "without skipped rows")
        split = manifest.split is not None
        check(split or self.stage != "gate", "stage", "gate", "start or answer without a split")
        answers = self.stage == "answer"
        check(
            not answers or self.precisions[0] == self.base,
            "wishes[0]",
            self.precisions[0],
            self.base,
        )
        fewest = 1 if self.scores == "none" else 2
        check(self.features >= fewest, "features", self.features, f"at least {fewest}")
        check(self.values <= MAX_VALUES, "pool", self.pool, f"at most {MAX_VALUES} values")
        tree = self.kind == "tree"
        check((self.nodes > 0) == tree, "nodes", self.nodes, "above 0 for a tree, else 0")

    def check_arrays(self, arrays: Mapping[str, NDArray[Any]], manifest: Manifest) -> None:
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
            for layer in manifest.layers:
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
