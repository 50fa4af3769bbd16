"""The memory ledger: how much of a budget is left for weights.

    budget  =  the rest  +  weights (pinned chunks, ring, row cache)  +  margin

The rest (ONNX Runtime, the graph, activations, operators' buffers) cannot be known beforehand: it
is what the process has more at the end of a run than before the session, less the weights.
"""

from __future__ import annotations

from ..errors import BudgetTooSmallError
from ..telemetry import peak_rss_bytes, rss_bytes
from ..units import format_size

__all__ = ["MemoryLedger"]

_MARGIN_SHARE = 1 / 32
_MARGIN_BYTES = 512 << 10
"""Kept free: the allocator's rounding, and pages shared between chunks."""


class MemoryLedger:
    """The account of one session. Not thread-safe; its session sees to that."""

    def __init__(self) -> None:
        """Open the account: everything that comes from here on counts."""
        self._rss_before_bytes = rss_bytes()
        self._largest_load = 0
        self.budget_bytes: int | None = None
        self.rest_bytes = 0
        self._planned_rest_bytes = 0

    def growth_bytes(self) -> int:
        """Growth of the process's peak since the account was opened."""
        return max(0, peak_rss_bytes() - self._rss_before_bytes)

    def settle(self, process_bytes: int, weight_bytes: int) -> bool:
        """After the open and after every run: learn what is not weights.

        Both as the process had them at the same moment, the run's buffers included. ONNX Runtime's
        arena keeps what it once had, so the end of a run shows its peak. True when it grew by more
        than the margin takes up, and the plan must follow.
        """
        self.rest_bytes = max(
            self.rest_bytes, process_bytes - self._rss_before_bytes - weight_bytes
        )
        return self.rest_bytes - self._planned_rest_bytes > _MARGIN_BYTES // 2

    def is_heavier(self, load: int) -> bool:
        """Whether a run of this load (elements fed, all open runs together) may need more memory
        than any before; remembers it."""
        heavier = load > self._largest_load
        self._largest_load = max(load, self._largest_load)
        return heavier

    def weight_limit_bytes(self, smallest_bytes: int) -> int | None:
        """What weights may take; None without a budget.

        Raises BudgetTooSmallError, with the smallest budget that works, when that is less than
        `smallest_bytes`.
        """
        if self.budget_bytes is None:
            return None
        margin = max(_MARGIN_BYTES, int(self.budget_bytes * _MARGIN_SHARE))
        limit = self.budget_bytes - self.rest_bytes - margin
        if limit < smallest_bytes:
            needed = self.rest_bytes + smallest_bytes
            works = max(needed + _MARGIN_BYTES, int(needed / (1 - _MARGIN_SHARE)) + 1)
            raise BudgetTooSmallError(
                f"memory_budget is {self.budget_bytes} bytes ({format_size(self.budget_bytes)}), "
                f"the smallest that works is {works} bytes ({format_size(works)}): "
                f"{format_size(smallest_bytes)} for weights, {format_size(self.rest_bytes)} "
                "for ONNX Runtime and activations"
            )
        self._planned_rest_bytes = self.rest_bytes
        return limit
