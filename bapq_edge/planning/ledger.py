"""The memory ledger: how much of a budget is left for weights.

    budget  =  overhead  +  weights (pinned chunks, ring, row cache)  +  margin

The overhead (ONNX Runtime, the graph, activations, operators' buffers) cannot be known beforehand:
it is what the process has more at the end of a run than before the session, less the weights.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from ..errors import BudgetTooSmallError
from ..telemetry import peak_rss_bytes, rss_bytes
from ..units import format_size

__all__ = ["MemoryLedger", "too_small"]

_MARGIN_SHARE = 1 / 32
_MARGIN_BYTES = 512 << 10
"""Kept free: the allocator's rounding, and pages shared between chunks."""


class MemoryLedger:
    """The account of one session. Not thread-safe; its session sees to that."""

    def __init__(self) -> None:
        """Open the account: everything that comes from here on counts."""
        self._rss_before_bytes = rss_bytes()
        self._peak_before_bytes = peak_rss_bytes()
        self._most_seen_bytes = 0
        self._largest_load = 0
        self._loading_bytes = 0
        self.overhead_bytes = 0
        """The most that was ever measured besides weights."""
        self.is_measured = False
        """Whether a run as those to come was measured: one on inputs of the caller's, or on zeros
        where no axis is open."""

    def growth_bytes(self) -> int:
        """Growth of the process's peak since the account was opened.

        As long as the peak is the one of before, it tells nothing of what came after: then it is
        the most that was seen, now and at the ends of runs.
        """
        self._see(rss_bytes())
        peak_bytes = peak_rss_bytes()
        if peak_bytes == self._peak_before_bytes:
            return self._most_seen_bytes
        return max(0, peak_bytes - self._rss_before_bytes)

    def held_bytes(self) -> int:
        """What the process holds now beyond what it had when the account was opened."""
        return max(0, rss_bytes() - self._rss_before_bytes)

    @contextlib.contextmanager
    def opening(self) -> Iterator[None]:
        """While a session opens, a budget is to hold what loading the graph took, too.

        That does not count where the process once had more.
        """
        risen = peak_rss_bytes() > self._peak_before_bytes
        self._loading_bytes = self.growth_bytes() if risen else 0
        try:
            yield
        finally:
            self._loading_bytes = 0

    def settle(self, process_bytes: int, weight_bytes: int) -> None:
        """After the open and after every run: learn the overhead.

        Both as the process had them at the same moment, the run's buffers included. The arena
        keeps what it once had, so the end of a run shows its peak.
        """
        self._see(process_bytes)
        overhead_bytes = process_bytes - self._rss_before_bytes - weight_bytes
        self.overhead_bytes = max(self.overhead_bytes, overhead_bytes)

    def _see(self, process_bytes: int) -> None:
        grown_bytes = process_bytes - self._rss_before_bytes
        self._most_seen_bytes = max(self._most_seen_bytes, grown_bytes)

    def outgrows(self, planned_overhead_bytes: int) -> bool:
        """Whether the overhead is more than a plan for so much of it can bear."""
        return self.overhead_bytes - planned_overhead_bytes > _MARGIN_BYTES // 2

    def is_heavier(self, load: int) -> bool:
        """Whether a run of this load (elements fed, all open runs together) may need more memory
        than any before; remembers it."""
        heavier = load > self._largest_load
        self._largest_load = max(load, self._largest_load)
        return heavier

    def weight_limit_bytes(self, budget_bytes: int, smallest_bytes: int) -> int:
        """What weights may take of a budget.

        Raises BudgetTooSmallError, with the smallest budget that works, when that is less than
        `smallest_bytes`.
        """
        margin = max(_MARGIN_BYTES, int(budget_bytes * _MARGIN_SHARE))
        limit = budget_bytes - self.overhead_bytes - margin
        if limit < smallest_bytes or budget_bytes < self._loading_bytes:
            raise self._too_small(budget_bytes, smallest_bytes)
        return limit

    def _too_small(self, budget_bytes: int, smallest_bytes: int) -> BudgetTooSmallError:
        needed = self.overhead_bytes + smallest_bytes
        works = max(needed + _MARGIN_BYTES, int(needed / (1 - _MARGIN_SHARE)) + 1)
        parts = (
            f"{format_size(smallest_bytes)} for weights, {format_size(self.overhead_bytes)} "
            f"for ONNX Runtime and activations, {format_size(works - needed)} kept free"
        )
        if works < self._loading_bytes + _MARGIN_BYTES:
            works = self._loading_bytes + _MARGIN_BYTES
            parts = (
                f"{format_size(self._loading_bytes)} to load the graph, "
                f"{format_size(_MARGIN_BYTES)} kept free"
            )
        unsure = "" if self.is_measured else " at least, as your inputs may take more"
        return too_small("memory_budget", budget_bytes, works, f"{unsure}: {parts}")


def too_small(setting: str, size_bytes: int, works_bytes: int, more: str) -> BudgetTooSmallError:
    """The error for a setting, with the smallest size that works; `more` ends its message."""
    # Rounded apart, so that they never look the same; what works does so as it is written.
    return BudgetTooSmallError(
        f"{setting} is {size_bytes} bytes ({format_size(size_bytes, 'down')}), the smallest that "
        f"works is {works_bytes} bytes ({format_size(works_bytes, 'up')}){more}"
    )
