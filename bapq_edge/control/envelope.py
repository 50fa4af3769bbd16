"""The controller's answer: what the device allows a session, and what changed it."""

from __future__ import annotations

from dataclasses import dataclass

from ..bank.layout import Level

__all__ = ["Decision", "Envelope"]


@dataclass(frozen=True)
class Envelope:
    """What the device allows right now."""

    weight_bytes_limit: int | None
    """Most bytes of weights in memory; None is no limit."""
    highest_level: Level
    """No chunk runs above this level."""
    threads: int
    """Most threads that one operator runs on."""
    reasons: tuple[str, ...] = ()
    """The readings that set the limits which hold; empty when nothing is restricted."""


@dataclass(frozen=True)
class Decision:
    """What one update came to."""

    envelope: Envelope
    changed: bool
    """Whether a limit differs from that of the update before."""
    cause: str | None
    """The readings that changed it, with their values; None when nothing changed."""
    lost: tuple[str, ...] = ()
    """Readings that were there before and are not now, each told once; their limits stay."""
