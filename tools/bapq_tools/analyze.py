"""Finds the layers that lose most for the bytes a level saves, and writes them as a recipe.

It asks the question of the planner, for whole layers: where would a few more bytes take away most
error? Its answer is a bank in which these layers lack the level, so that even a run at that level
takes the next higher one there.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from bapq_edge.bank.layout import (
    PLANES_OF_LEVEL,
    Level,
    TileGeometry,
    level_within,
    tiles_of,
)
from bapq_edge.bank.reader import Bank

__all__ = ["Analysis", "LevelChange", "SensitiveLayer", "analyze", "to_yaml"]

_EXTRA_SHARE = 0.1
"""Largest share of bytes that the recipe may add to a run at any level: beyond a tenth, running all
layers a level higher, or letting the planner choose chunk by chunk, is the better use of bytes."""

_OUTSTANDING = 1.2
"""A layer is sensitive if it loses this many times what the median layer does per byte saved: in a
model whose layers are much alike none is."""


@dataclass(frozen=True)
class SensitiveLayer:
    """A layer that is better off without a level."""

    layer: str
    level: Level
    error_share: float
    """Share of the error that all layers have at this level."""
    extra_bytes: int
    """Bytes that a run at this level then reads more."""
    error_per_mib: float
    """Error that the level adds to the next higher one, per MiB saved."""


@dataclass(frozen=True)
class LevelChange:
    """The change that the recipe makes to a run at one level."""

    level: Level
    error_before: float
    """Sum of the bank's sensitivity table."""
    error_after: float
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True)
class Analysis:
    """The sensitive layers of a bank, and the recipe that spares them."""

    findings: tuple[SensitiveLayer, ...]
    """The worst first."""
    changes: tuple[LevelChange, ...]
    """Levels that the recipe changes, highest first."""
    recipe: dict[str, Any]
    """The recipe as `bapq build --recipe` takes it."""


def analyze(bank: Bank) -> Analysis:
    """Find the sensitive layers by the bank's sensitivity table; all planes must be there."""
    table = _Table(bank)
    levels = bank.manifest.levels
    before = {name: layer.levels for name, layer in table.layers.items()}
    left = dict(before)
    findings: list[SensitiveLayer] = []
    for upper, level in itertools.pairwise(levels):
        if upper == 32:
            continue  # four times the bytes for an error that hardly counts
        found = _outstanding(table, left, level)
        findings += found
        for finding in found:
            # What is too coarse at this level is so at all below.
            left[finding.layer] = tuple(n for n in left[finding.layer] if n > level)
    findings.sort(key=lambda finding: -finding.error_share)
    names = dict.fromkeys(finding.layer for finding in findings)
    names.update(dict.fromkeys(name for name in left if left[name] != levels))
    changes = []
    for level in levels:
        if any(level_within(left[n], level) != level_within(before[n], level) for n in left):
            error_before, bytes_before = table.total(before, level)
            error_after, bytes_after = table.total(left, level)
            changes.append(LevelChange(level, error_before, error_after, bytes_before, bytes_after))
    recipe = {"layers": {name: {"levels": list(left[name])} for name in names}}
    return Analysis(tuple(findings), tuple(changes), recipe)


def to_yaml(analysis: Analysis, name: str) -> str:
    """Write the recipe, with figures that speak for it as comments; `name` is the model's."""
    lines = [f"# {name}: layers that lose most for the bytes that a level saves."]
    if not analysis.findings:
        lines.append("# None stands out.")
    for change in analysis.changes:
        error = change.error_after / change.error_before - 1 if change.error_before else 0.0
        size = change.bytes_after / change.bytes_before - 1
        lines.append(
            f"# A run at level {change.level}: error {change.error_before:.4g} -> "
            f"{change.error_after:.4g} ({error:+.0%}), bytes {change.bytes_before:,} -> "
            f"{change.bytes_after:,} ({size:+.1%})"
        )
    entries = analysis.recipe["layers"]
    lines.append("layers:" if entries else "layers: {}")
    for layer, settings in entries.items():
        for finding in analysis.findings:
            if finding.layer == layer:
                lines.append(
                    f"  # level {finding.level}: {finding.error_share:.1%} of its error, "
                    f"{finding.error_per_mib:.3g} per MiB saved"
                )
        # A name in quotes is text, also where it looks like a number.
        lines.append(f"  {json.dumps(layer)}: {{levels: {settings['levels']}}}")
    return "\n".join(lines) + "\n"


class _Table:
    """The error and the bytes of every layer at every level that it has."""

    def __init__(self, bank: Bank) -> None:
        sensitivity = bank.sensitivity().astype(np.float64)
        self.layers = {layer.name: layer for layer in bank.manifest.layers}
        self._error = {}
        for name, layer in self.layers.items():
            chunks = layer.chunk_range
            for level in layer.levels:
                column = bank.manifest.levels.index(level)
                self._error[name, level] = float(sensitivity[chunks, column].sum())

    def error(self, name: str, own: tuple[Level, ...], level: Level) -> float:
        """The error of a layer that has the levels `own`, where `level` is asked for."""
        return self._error[name, level_within(own, level)]

    def total(self, layers: Mapping[str, tuple[Level, ...]], level: Level) -> tuple[float, int]:
        """The error and the bytes of all layers, where `level` is asked for."""
        errors = sum(self.error(name, own, level) for name, own in layers.items())
        return errors, sum(self.bytes(name, own, level) for name, own in layers.items())

    def bytes(self, name: str, own: tuple[Level, ...], level: Level) -> int:
        """The bytes of the same layer; a plane's share depends on all levels of the layer."""
        layer = self.layers[name]
        record_bytes = sum(
            TileGeometry.of_layer(
                plane,
                own,
                layer.columns,
                layer.scale_columns,
                layer.has_bias,
                layer.depthwise,
            ).record_bytes
            for plane in PLANES_OF_LEVEL[level_within(own, level)]
        )
        return tiles_of(layer.stored_rows) * record_bytes


def _outstanding(
    table: _Table, left: dict[str, tuple[Level, ...]], level: Level
) -> list[SensitiveLayer]:
    """The layers that should run higher where `level` is asked for, as far as bytes allow."""
    total_error = sum(table.error(name, own, level) for name, own in left.items())
    whole = sum(table.bytes(name, table.layers[name].levels, level) for name in left)
    most = whole * (1 + _EXTRA_SHARE) - sum(table.bytes(n, own, level) for n, own in left.items())
    steps = []
    for name, own in left.items():
        higher = tuple(n for n in own if n > level)
        if level in own and higher:
            error = table.error(name, own, level)
            saved = table.bytes(name, higher, level) - table.bytes(name, own, level)
            gained = error - table.error(name, higher, level)
            # Records of a few columns may be no shorter at the lower level: it saves nothing.
            steps.append((gained / max(saved, 1), saved, error, name))
    saving = [step[0] for step in steps if step[1] > 0]
    usual = np.median(saving) if saving else 0.0
    findings = []
    for per_byte, saved, error, name in sorted(steps, key=lambda step: -step[0]):
        if per_byte > max(_OUTSTANDING * usual, 0) and saved <= most:
            most -= saved
            findings.append(
                SensitiveLayer(name, level, error / total_error, saved, per_byte * (1 << 20))
            )
    return findings
