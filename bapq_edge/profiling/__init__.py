"""Time, memory and energy of a piece of code, and the trace of a session."""

from __future__ import annotations

from .meters import Meter, Window, measure
from .trace import Recorder, Summary

__all__ = ["Meter", "Recorder", "Summary", "Window", "measure"]
