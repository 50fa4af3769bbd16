"""Energy of the runs that a command makes, with a meter or, where asked for, by an estimate."""

from __future__ import annotations

import argparse
import dataclasses
import os
from typing import Any

from ..control.device_profile import DeviceProfile, find_profile, load_profile
from ..errors import RequestError
from ..profiling import EnergyPerRun
from ..profiling.energy import estimate_energy

__all__ = ["add_energy", "as_json", "chosen_profile", "estimate_of"]


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
