"""The precisions that a fit chooses from."""

from __future__ import annotations

import itertools

import numpy as np

from bapq_edge.bank.boundary import Precision
from bapq_edge.bank.reader import Bank
from bapq_edge.errors import BoundaryError, RequestError

from .runner import Runner

__all__ = ["default_pairs", "gate_precisions", "parse_pair"]


def gate_precisions(bank: Bank, runner: Runner) -> list[Precision]:
    """The bank's levels, cheapest first, with the planner's plans halfway between two of them.

    Level 32 is left out unless there is but one other: it is four times the bits of level 8 for an
    agreement that hardly differs.
    """
    levels = bank.levels
    if len(levels) < 2:
        raise BoundaryError(
            f"{bank.path} holds level {levels[0]} alone, so there is nothing to choose between: "
            "build it with more levels"
        )
    if len(levels) > 2 and levels[0] == 32:
        levels = levels[1:]
    precisions = [Precision(levels[-1])]
    for low, high in itertools.pairwise(levels[::-1]):
        between = Precision(bits=(low + high) / 2)
        try:
            found = runner.plan(between).levels
        except RequestError:  # fewer bits than layers without the lowest level take
            found = runner.plan(Precision(low)).levels
        ends = (runner.plan(Precision(level)).levels for level in (low, high))
        if not any(np.array_equal(found, end) for end in ends):
            precisions.append(between)
        precisions.append(Precision(high))
    return precisions


def default_pairs(bank: Bank) -> list[tuple[Precision, Precision]]:
    """Pair every level with the highest below 32, or with 32 where no other is above it."""
    below = [level for level in bank.levels if level != 32]
    pairs = [(Precision(level), Precision(below[0])) for level in below[1:]]
    if 32 in bank.levels and below:
        pairs.insert(0, (Precision(below[0]), Precision(32)))
    return pairs


def parse_pair(text: str) -> tuple[Precision, Precision]:
    """Read the two precisions of `2:8` or `4.6b:8`; RequestError for another text."""
    parts = text.split(":")
    try:
        if len(parts) != 2:
            raise ValueError
        base, goal = (_parse(part) for part in parts)
    except ValueError:
        raise RequestError(
            f"escalation {text!r} is unknown: write 2:8 for levels, 4.6b:8 for 4.6 bits and level 8"
        ) from None
    return base, goal


def _parse(text: str) -> Precision:
    if text.endswith("b"):
        bits = float(text[:-1])
        if not 1 <= bits <= 32:
            raise ValueError
        return Precision(bits=bits)
    if text not in ("32", "8", "4", "2", "1"):
        raise ValueError
    return Precision(level=int(text))  # type: ignore[arg-type]
