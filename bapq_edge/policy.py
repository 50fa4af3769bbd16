"""Policies: who decides, run by run, at which precision an input is answered.

A policy is a small object with one method. The session asks it before a run, where the graph is
split once more between head and body, and after the answer; what it returns is run next.

    start ──► Choice ──► head ──► gate ──► Choice ──► body ──► answer ──► None: the answer stands
                                                                 └──► Choice: answered again at it
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from .bank.boundary import Precision
from .errors import RequestError

__all__ = ["Choice", "Policy", "PolicyContext", "Precision"]


@dataclass(frozen=True)
class PolicyContext:
    """What a policy may look at."""

    stage: Literal["start", "gate", "answer"]
    """Before the run, between the halves of a split graph, or after an answer."""
    values: Mapping[str, NDArray[np.generic]]
    """Tensors by name, in the shapes of the model: the feed at every stage, with the tap at the
    gate, and with the outputs of the answer: those asked for, and those that the policy `reads`."""
    precision: Precision
    """What the values were computed at; at the start, what the session runs at otherwise."""
    elapsed_s: float
    """Time since the run began."""
    rerun_s: float | None
    """Time that an answer made again took lately; None: none was made yet."""


@dataclass(frozen=True)
class Choice:
    """What to run next, and why."""

    precision: Precision
    """The precision to run at; the one of the answer lets it stand."""
    region: int | None = None
    """Region of the input, for `stats()` and the drift detector."""
    late: bool = False
    """Whether the answer stands for want of time; counted, a LateAnswerWarning and an event."""
    samples: Sequence[int] | None = None
    """Samples of the batch, by position on the first axis, that are to be answered again; the
    answers to the others stand. Where the bank does not know its samples to be apart, all are."""
    regions: Sequence[int] | None = None
    """Region of every sample of a batch, for `stats()` and the drift detector."""

    def __post_init__(self) -> None:
        """Refuse a level or a number of bits that is no Precision yet."""
        for name in ("samples", "regions"):
            value = getattr(self, name)
            if not isinstance(value, Sequence | np.ndarray | None) or isinstance(value, str):
                raise RequestError(
                    f"{name} of a Choice is {value!r:.80}: give a list of numbers, or None"
                )
        if not isinstance(self.precision, Precision):
            raise RequestError(
                f"a Choice's precision is {self.precision!r}: give a Precision, such as "
                "Precision(level=8)"
            )


class Policy(Protocol):
    """Anything with this method; it may be called from several threads at a time.

    An attribute `shares`, a mapping from every Precision to the share of runs that it is for, tells
    the planner which chunks are worth their memory; without it, precisions are planned as they
    come. An attribute `splits` that is true has the split graph run, with the stage "gate". An
    attribute `reads` names outputs that the stage "answer" must see, whatever the caller asked for.
    """

    def choose(self, context: PolicyContext) -> Choice | None:
        """What to run next; None: go on as it is, or let the answer stand.

        What it raises ends the run, and the caller of `run` gets it.
        """
        ...
