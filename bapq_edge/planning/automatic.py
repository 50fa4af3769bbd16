"""The level "auto": the best answers whose reading hides behind computing.

Candidates are the uniform levels, mixtures that stay in memory, and mixtures that stream what the
time of a run can hide. Those that take longer than is allowed drop out, and of the others the one
with the least predicted error is chosen.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from .costs import ChunkCosts, Request
from .knapsack import GreedyKnapsack
from .placing import aligned, fits, place, ring_bytes_for
from .timing import hidden_bytes

__all__ = ["Choice", "choose"]

_HALVINGS = 5
"""Of the bytes streamed, where the first guess of what hides takes too long."""

_ROUNDING = 1 + 1e-6
"""Times that are equal but for rounding are equal."""


@dataclass(frozen=True, eq=False)
class Choice:
    """What "auto" has chosen."""

    columns: NDArray[np.intp]
    """(chunks,): column of `ChunkCosts.levels` that each chunk runs at."""
    held_back: str | None = None
    """Why the error is not the least that the memory allows, in one line; None: it is."""


def choose(costs: ChunkCosts, request: Request, first: int) -> Choice:
    """The levels for a request within its limits; no column left of `first` is allowed."""
    best = costs.sensitivity[:, first:].argmin(1) + first
    if request.weight_bytes_limit is None or costs.row_read.all():
        return Choice(best)
    return _Search(costs, request, first, best).choice()


class _Search:
    """The search for one request, over the chunks that take memory."""

    def __init__(
        self, costs: ChunkCosts, request: Request, first: int, best: NDArray[np.intp]
    ) -> None:
        """`best` are the columns of least error, for chunks that take no memory."""
        self._costs, self._request, self._first, self._best = costs, request, first, best
        assert request.weight_bytes_limit is not None
        self._limit = request.weight_bytes_limit
        self._speeds = request.speeds
        self._sizes = np.where(costs.row_read[:, None], 0, costs.level_bytes)
        self._error = np.where(costs.row_read[:, None], 0, costs.sensitivity)
        self._rows = np.arange(len(self._sizes))
        self._last = len(costs.levels) - 1

    def choice(self) -> Choice:
        """The best of the candidates."""
        columns = range(self._first, self._last + 1)
        uniform = [column for column in columns if self._uniform(column)]
        candidates = [np.full(len(self._rows), column) for column in uniform]
        # Which chunk needs its bits must be known to mix them: channels of one layer that are
        # rounded differently may do worse than all of them rounded coarsely.
        if not self._costs.guessed:
            candidates += self._mixtures()
        if not candidates:
            candidates = [np.full(len(self._rows), self._last)]
        chosen = min(candidates, key=self._error_of)
        held_back = self._held_back(chosen)
        return Choice(self._with_rows(chosen), held_back)

    # ---- candidates ----

    @property
    def _top(self) -> int:
        """The highest column that is streamed.

        Level 32 takes four times the bytes of level 8 for an error that hardly counts.
        """
        levels = self._costs.levels
        return max(self._first, int(levels[0] == 32 and len(levels) > 1))

    def _uniform(self, column: int) -> bool:
        """Whether all chunks can run at this level."""
        if column < self._top and self._sizes[:, column].sum() > self._limit:
            return False
        return self._in_time(np.full(len(self._rows), column))

    def _mixtures(self) -> Iterator[NDArray[np.intp]]:
        """Mixtures of levels."""
        kept = slice(self._first, None)
        in_memory = GreedyKnapsack(self._sizes[:, kept], self._error[:, kept])
        found = in_memory.climb(self._limit) + self._first
        if self._in_time(found):
            yield found
        if self._speeds is None:
            return
        # A ring for larger chunks leaves less to pin, so every highest level is tried.
        for top in range(self._top, self._last + 1):
            streamed = self._streamed(top)
            if streamed is not None:
                yield streamed

    def _streamed(self, top: int) -> NDArray[np.intp] | None:
        """The best mixture from column `top` on that streams what can be read in time."""
        largest = aligned(int(self._sizes[:, top].max()))
        if not fits(int(self._sizes[:, top].sum()), largest, self._limit):
            return None
        speeds = self._speeds
        assert speeds is not None
        ring_bytes = ring_bytes_for(self._limit, largest)
        of_layer = self._costs.by_layer(self._sizes[:, top])
        hidden = hidden_bytes(of_layer, speeds, ring_bytes)
        # What a layer can stream for free at its highest level costs nothing.
        free = np.repeat(hidden >= of_layer, self._costs.chunks_of_layer)
        sizes = np.where(free[:, None], 0, self._sizes[:, top:])
        spare_s = max(self._allowed_s - speeds.compute_s, 0.0)
        streamed = float(hidden[hidden < of_layer].sum()) + spare_s * speeds.storage_bytes_s
        # Pinning whole chunks may fall short of its share by less than one.
        pinned = self._limit - ring_bytes - largest
        knapsack = GreedyKnapsack(sizes, self._error[:, top:])

        def climb(share: float) -> NDArray[np.intp]:
            most = int(min(pinned + share * streamed, sizes[:, 0].sum()))
            columns: NDArray[np.intp] = knapsack.climb(most) + top
            return columns

        found = climb(1.0)
        if self._in_time(found):
            return found
        low, high = 0.0, 1.0
        best: NDArray[np.intp] | None = None
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            found = climb(middle)
            if self._in_time(found):
                low, best = middle, found
            else:
                high = middle
        return best

    # ---- what a candidate costs ----

    @cached_property
    def _allowed_s(self) -> float:
        """Time that a run may take."""
        request, speeds = self._request, self._speeds
        if speeds is None:
            return 0.0
        allowed_s = np.inf if request.latency_s is None else request.latency_s
        if request.max_slowdown is not None:
            allowed_s = min(allowed_s, request.max_slowdown * speeds.compute_s)
        return float(max(speeds.compute_s, allowed_s))

    def _in_time(self, columns: NDArray[np.intp]) -> bool:
        """Whether the chunks fit, and a run takes no longer than is allowed."""
        sizes = self._sizes[self._rows, columns]
        total, largest = int(sizes.sum()), int(sizes.max())
        if total <= self._limit:
            return True
        if self._speeds is None or not fits(total, largest, self._limit):
            return False
        placed = place(self._costs.by_layer(sizes), aligned(largest), self._limit, self._speeds)
        return placed.run_s <= self._allowed_s * _ROUNDING

    def _error_of(self, columns: NDArray[np.intp]) -> float:
        return self._costs.error_of(self._with_rows(columns))

    def _with_rows(self, columns: NDArray[np.intp]) -> NDArray[np.intp]:
        """The same, with chunks that are read by row at their best."""
        return np.where(self._costs.row_read, self._best, columns)

    def _held_back(self, chosen: NDArray[np.intp]) -> str | None:
        """Why no better levels were chosen, if time is the reason."""
        late = not self._in_time(chosen)
        better = any(
            self._error_of(np.full(len(self._rows), column)) < self._error_of(chosen)
            and fits(int(sizes.sum()), int(sizes.max()), self._limit)
            for column in range(self._top, self._last)
            for sizes in [self._sizes[:, column]]
        )
        if not late and not better:
            return None
        if self._speeds is None:
            return "how fast storage is read is not known yet" + ("" if late else ": none streamed")
        which = f"level {self._costs.levels[self._last]} takes" if late else "better levels take"
        allowed = f"{self._allowed_s * 1e3:.3g} ms that a run is allowed"
        return f"{self._speeds}: {which} longer than the {allowed}"
