"""BAPQ-Edge: models in nested precisions, streamed under a memory budget.

Start with `Session`; every error and warning is in `bapq_edge.errors`.
"""

from __future__ import annotations

from .compat.onnxruntime import patch_onnxruntime
from .errors import BapqError, BapqWarning
from .session import Session
from .telemetry import Event, SessionStats

__all__ = [
    "BapqError",
    "BapqWarning",
    "Event",
    "Session",
    "SessionStats",
    "__version__",
    "patch_onnxruntime",
]

__version__ = "0.1.0"
