"""Batches taken apart: some samples of a feed, and their answers put back among the others'."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

import numpy as np

from ..bank.manifest import Batched
from ..errors import RequestError

__all__ = ["BatchTaker"]


class BatchTaker:
    """Knows which inputs and outputs of a model hold samples that do not touch each other."""

    def __init__(self, batched: Batched | None) -> None:
        """`batched` is the bank's; None: no batch can be taken apart."""
        self._inputs = frozenset(() if batched is None else batched.inputs)
        self._outputs = frozenset(() if batched is None else batched.outputs)

    def take(
        self, feed: Mapping[str, Any], outputs: Mapping[str, Any], samples: Sequence[int]
    ) -> dict[str, Any] | None:
        """The feed with these samples alone; None where all must run again.

        Raises RequestError for a sample that is not in the batch, or is named twice.
        """
        batch = self._samples_of(feed, outputs)
        if batch is None:
            return None
        _check_samples(samples, batch)
        if len(samples) == batch:
            return None
        rows = np.asarray(samples, np.intp)
        return {
            name: np.asarray(value)[rows] if name in self._inputs else value
            for name, value in feed.items()
        }

    def _samples_of(self, feed: Mapping[str, Any], outputs: Mapping[str, Any]) -> int | None:
        """Samples of the batch, if it can be taken apart."""
        if not self._inputs & set(feed) or not set(outputs) <= self._outputs:
            return None
        held = [np.asarray(feed[name]) for name in self._inputs & set(feed)]
        lengths = {value.shape[0] if value.ndim else 0 for value in (*held, *outputs.values())}
        return lengths.pop() if len(lengths) == 1 else None

    @staticmethod
    def put_back(
        outputs: Mapping[str, Any], samples: Sequence[int], again: Mapping[str, Any]
    ) -> bool:
        """Write other answers to these samples over those in the outputs, which are arrays.

        False, and nothing is written, where they have another shape: samples that change the shape
        of a batch do touch each other.
        """
        for name, answers in again.items():
            before = outputs[name]
            if answers.dtype != before.dtype or answers.shape[1:] != before.shape[1:]:
                return False
        rows = np.asarray(samples, np.intp)
        for name, answers in again.items():
            outputs[name][rows] = answers
        return True


def _check_samples(samples: Sequence[int], batch: int) -> None:
    for sample in samples:
        if not isinstance(sample, Integral) or not 0 <= sample < batch:
            raise RequestError(
                f"the policy names sample {sample!r} of a batch of {batch}: name samples from 0 to "
                f"{batch - 1}"
            )
    if len(set(samples)) != len(samples) or not len(samples):
        raise RequestError(
            f"the policy names {len(samples)} samples of a batch of {batch}: name one or more, "
            "each once"
        )
