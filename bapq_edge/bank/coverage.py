"""How much of a model's weights is in planes, and why the rest stays in float."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from .manifest import KeptNode

__all__ = ["Coverage"]


@dataclass(frozen=True)
class Coverage:
    """Numbers of weights; constants of fewer than about a thousand values do not count."""

    in_planes: int
    in_float: dict[str, int]
    """By the reason, most first."""

    @classmethod
    def of(cls, in_planes: int, kept: Iterable[KeptNode]) -> Coverage:
        """Add up what stays in float by its reasons."""
        in_float: dict[str, int] = {}
        for node in kept:
            in_float[node.reason] = in_float.get(node.reason, 0) + node.weights
        return cls(in_planes, dict(sorted(in_float.items(), key=lambda item: -item[1])))

    @property
    def share(self) -> float:
        """The share of the weights that is in planes, 0 to 1."""
        return self.in_planes / max(self._all, 1)

    @property
    def _all(self) -> int:
        return self.in_planes + sum(self.in_float.values())

    def __str__(self) -> str:
        """Say it in one line."""
        parts = [f"{self.share:.1%} of the weights in planes"]
        parts += [
            f"{weights / self._all:.1%} in float: {reason}"
            for reason, weights in self.in_float.items()
        ]
        return "; ".join(parts)
