"""Time, memory and energy of a piece of code, and the trace of a session."""

from __future__ import annotations

from .energy import EnergyPerRun, Idle
from .meters import Meter, Window, measure
from .trace import Recorder, Summary

__all__ = ["EnergyPerRun", "Idle", "Meter", "Recorder", "Summary", "Window", "measure"]
