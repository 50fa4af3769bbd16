"""Recipes: what a build does otherwise for some layers, read from YAML.

Settings at the top hold for all layers, those under `layers` for the layers whose name fits an
exact name or a glob pattern; a later entry overrides an earlier one, setting by setting.

    prune_tau: 0.01
    layers:
      encoder.*: {scale_columns: {2: 32}}
      classifier: {levels: [8, 4]}
"""

from __future__ import annotations

import difflib
import fnmatch
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from bapq_edge.bank.layout import BLOCK_COLUMNS, LEVELS, SCALED_PLANES, Level
from bapq_edge.errors import RecipeError
from bapq_edge.input_files import input_file_errors

from .quantize.options import LayerOptions

__all__ = ["Recipe", "RecipeSource", "Settings", "load_recipe"]

RecipeSource = str | os.PathLike[str] | Mapping[str, Any]
"""A YAML file, or the document that it would hold."""

DEFAULT_LEVELS: tuple[Level, ...] = (8, 4, 2, 1)

_MOST_SCALE_COLUMNS = 1 << 24
"""The bank format's bound."""


@dataclass(frozen=True)
class Settings:
    """The settings of one entry; None where it says nothing."""

    levels: tuple[Level, ...] | None = None
    scale_columns: Mapping[Level, int] = field(default_factory=dict)
    keep_in_float: bool | None = None
    prune_tau: float | None = None

    def over(self, earlier: Settings) -> Settings:
        """These settings, and the earlier ones where these say nothing."""
        return Settings(
            earlier.levels if self.levels is None else self.levels,
            {**earlier.scale_columns, **self.scale_columns},
            earlier.keep_in_float if self.keep_in_float is None else self.keep_in_float,
            earlier.prune_tau if self.prune_tau is None else self.prune_tau,
        )


@dataclass(frozen=True)
class Recipe:
    """A recipe that was checked, except against a model."""

    settings: Settings = field(default_factory=Settings)
    """Settings of all layers."""
    layers: tuple[tuple[str, Settings], ...] = ()
    """Pairs of name or pattern and settings, in the order of the file."""
    where: str = "recipe"
    """Name of the recipe in messages."""

    @property
    def levels(self) -> tuple[Level, ...]:
        """Levels of the bank."""
        return self.settings.levels or DEFAULT_LEVELS

    def with_settings(self, levels: tuple[Level, ...] | None, prune_tau: float | None) -> Recipe:
        """The recipe with other settings for all layers, where they are given.

        Raises RecipeError for a tau that cannot be.
        """
        if prune_tau is not None:
            prune_tau = _prune_tau("prune_tau", prune_tau)
        return replace(self, settings=Settings(levels, {}, None, prune_tau).over(self.settings))

    def resolve(self, names: Iterable[str]) -> dict[str, LayerOptions | None]:
        """Find the options of each of the model's layers; None for one that is kept in float.

        Raises RecipeError for an entry that fits no layer, and for levels that make no bank.
        """
        names = list(names)
        found = dict.fromkeys(names, self.settings)
        for pattern, settings in self.layers:
            fitting = fnmatch.filter(names, pattern)
            if not fitting:
                raise RecipeError(
                    f"{self.where}: {pattern!r} fits no layer of the model; {_near(pattern, names)}"
                )
            for name in fitting:
                found[name] = settings.over(found[name])
        options = {name: self._options(name, settings) for name, settings in found.items()}
        self._check_levels([entry for entry in options.values() if entry is not None])
        return options

    def _options(self, name: str, settings: Settings) -> LayerOptions | None:
        if settings.keep_in_float:
            return None
        levels = settings.levels or self.levels
        foreign = sorted(set(levels) - set(self.levels))
        if foreign:
            raise RecipeError(
                f"{self.where}: layer {name} is to have level {foreign[0]}, the bank has "
                f"{_listed(self.levels)}; build the bank with that level too"
            )
        return LayerOptions(levels, settings.scale_columns, settings.prune_tau or 0.0)

    def _check_levels(self, options: list[LayerOptions]) -> None:
        if not options:
            raise RecipeError(
                f"{self.where}: all layers are kept in float, a bank needs at least one that is not"
            )
        held = {level for entry in options for level in entry.levels}
        unheld = [level for level in self.levels if level not in held]
        if unheld:
            raise RecipeError(
                f"{self.where}: no layer has level {unheld[0]}, which the bank is to have; leave "
                f"it out of the bank's levels, {_listed(self.levels)}"
            )


def load_recipe(source: RecipeSource | None) -> Recipe:
    """Read and check a recipe; None is an empty one.

    Raises RecipeError for what is no recipe, InputFileError for a file that cannot be read.
    """
    if source is None:
        return Recipe()
    if isinstance(source, Mapping):
        return _recipe("recipe", source)
    if not isinstance(source, str | os.PathLike):
        raise RecipeError(f"the recipe is {source!r:.80}: give a YAML file or a mapping")
    where = f"recipe {os.fspath(source)}"
    try:
        with input_file_errors(source):
            text = Path(source).read_text(encoding="utf-8")
        return _recipe(where, yaml.load(text, _Loader))
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise RecipeError(f"{where} is not YAML: {reason}") from error


class _Loader(yaml.SafeLoader):
    """The safe loader, which would let the last of equal keys win without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue  # the base class refuses it
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key.value!r} stands there twice: join the two", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _recipe(where: str, document: Any) -> Recipe:
    _expect(isinstance(document, Mapping), where, document, "a mapping of settings")
    rest = dict(document)
    entries = rest.pop("layers", {})
    place = f"{where}: layers"
    _expect(isinstance(entries, Mapping), place, entries, "a mapping of layer names to settings")
    layers = []
    for pattern, settings in entries.items():
        _expect(
            isinstance(pattern, str) and bool(pattern),
            place,
            pattern,
            "keyed by names or patterns; put others in quotes",
        )
        layers.append((pattern, _settings(f"{place}.{pattern}", settings)))
    return Recipe(_settings(where, rest, ["layers"]), tuple(layers), where)


def _settings(where: str, document: Any, others: Iterable[str] = ()) -> Settings:
    _expect(isinstance(document, Mapping), where, document, f"a mapping of {_listed(_READERS)}")
    for key in document:
        if key not in _READERS:
            raise RecipeError(
                f"{where}: unknown key {str(key)[:80]!r}; known are {_listed([*_READERS, *others])}"
            )
    return Settings(
        **{key: _READERS[key](f"{where}: {key}", value) for key, value in document.items()}
    )


def _levels(where: str, value: Any) -> tuple[Level, ...]:
    good = isinstance(value, list | tuple) and all(_is_integer(n) and n in LEVELS for n in value)
    _expect(
        good and 0 < len(value) == len(set(value)),
        where,
        value,
        f"a list of one or more of {_listed(LEVELS)}, each once",
    )
    return tuple(level for level in LEVELS if level in value)


def _scale_columns(where: str, value: Any) -> dict[Level, int]:
    levels = sorted(SCALED_PLANES.values(), reverse=True)
    _expect(
        isinstance(value, Mapping) and all(_is_integer(n) and n in levels for n in value),
        where,
        value,
        f"a mapping of {_listed(levels)} to columns per scale",
    )
    for level, columns in value.items():
        _expect(
            _is_integer(columns)
            and 0 < columns <= _MOST_SCALE_COLUMNS
            and columns % BLOCK_COLUMNS == 0,
            f"{where}.{level}",
            columns,
            f"a multiple of {BLOCK_COLUMNS} up to {_MOST_SCALE_COLUMNS}",
        )
    return dict(value)


def _keep_in_float(where: str, value: Any) -> bool:
    _expect(isinstance(value, bool), where, value, "true or false")
    return bool(value)


def _prune_tau(where: str, value: Any) -> float:
    number = isinstance(value, float) or _is_integer(value)
    _expect(number and 0 <= value < 1, where, value, "a number from 0 to below 1, such as 0.02")
    return float(value)


_READERS: dict[str, Callable[[str, Any], Any]] = {
    "levels": _levels,
    "scale_columns": _scale_columns,
    "keep_in_float": _keep_in_float,
    "prune_tau": _prune_tau,
}


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _expect(good: bool, where: str, found: Any, expected: str) -> None:
    if not good:
        raise RecipeError(f"{where} is {str(found)[:80]!r}, must be {expected}")


def _near(pattern: str, names: list[str]) -> str:
    near = difflib.get_close_matches(pattern, names, cutoff=0.5)
    if near:
        return f"near are {_listed(near)}"
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"its layers are {_listed(names[:3])}{more}"


def _listed(values: Iterable[object]) -> str:
    return ", ".join(map(str, values))
