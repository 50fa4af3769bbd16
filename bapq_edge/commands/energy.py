"""Energy of the runs that a command makes, with a meter or, where asked for, by an estimate."""

from __future__ import annotations

import argparse
import dataclasses
import os
import warnings
from typing import Any

from ..control.device_profile import DeviceProfile, find_profile, load_profile
from ..errors import EnergyWarning, RequestError
from ..profiling import EnergyPerRun, Window
from ..profiling.energy import estimate_energy

__all__ = ["add_energy", "as_json", "chosen_profile", "energy_of", "estimate_of"]


def add_energy(command: Any) -> None:
    """Add --estimate-energy."""
    command.add_argument(
        "--estimate-energy",
        action="store_true",
        help="where no meter measures, estimate by the power model of the device profile",
    )


def chosen_profile(arguments: argparse.Namespace) -> DeviceProfile | None:
    """The profile for estimates; None where none was asked for. Raises RequestError without one."""
    if not arguments.estimate_energy:
        return None
    found = find_profile() if arguments.profile is None else load_profile(arguments.profile)
    if found is None:
        raise RequestError(
            "--estimate-energy needs a device profile, and none is known for this machine: name "
            "one with --profile"
        )
    return found


def energy_of(window: Window, runs: int) -> EnergyPerRun | None:
    """Energy of each run in the window; where a meter is there and does not tell, a warning."""
    found = window.energy_per_run(runs)
    if found is None and window.power_source is not None:
        reason = window.void or (
            "its answers are too few: make more runs"
            if window.energy_j is None
            else "the idle board could not be measured"
        )
        warnings.warn(
            f"{window.name}: no energy by {window.power_source}: {reason}",
            EnergyWarning,
            stacklevel=2,
        )
    return found


def estimate_of(
    profile: DeviceProfile | None, threads: int | None, run_ms: float
) -> EnergyPerRun | None:
    """The estimate for a run on so many threads; None where none was asked for."""
    if profile is None:
        return None
    return estimate_energy(profile, threads or len(os.sched_getaffinity(0)), run_ms / 1e3)


def as_json(energy: EnergyPerRun | None) -> dict[str, Any] | None:
    """For a JSON document."""
    return None if energy is None else dataclasses.asdict(energy)
