"""What a bank would take on each board that has a profile: time, memory, energy.

Time is the planner's own prediction (`planning/timing.py`), fed with the board's kernel speed in
place of measured layers, and its storage speed. What a profile only assumes marks what follows.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bapq_edge.bank.layout import Level
from bapq_edge.bank.reader import Bank
from bapq_edge.control.controller import automatic_budget_bytes
from bapq_edge.control.device_profile import DeviceProfile, load_profile, profile_names
from bapq_edge.errors import BudgetTooSmallError, ProfileError
from bapq_edge.planning.ledger import MemoryLedger
from bapq_edge.planning.planner import ChunkCosts, Request, chunk_costs, plan, smallest_limit
from bapq_edge.planning.timing import Speeds
from bapq_edge.profiling.energy import estimate_energy
from bapq_edge.sensors import Readings
from bapq_edge.units import format_size

from .page import paragraph, section, table
from .run_costs import RunCosts, levels_shown

__all__ = ["Board", "board_section"]

_MARK = " *"
_ABOUT = (
    "By the device profiles, for one thread and inputs {shapes}. *: rests on an assumption or an "
    "estimate in the profile, not on a measurement; bapq doctor --calibrate measures a board, and "
    "--profile shows what it wrote."
)
_ABOUT_TIMES = (
    "Time of a run, as the planner predicts it from the layers' multiplications at the board's "
    "kernel speed and from its storage. The rest of a run comes on top, and can be more than "
    "that in a net of many small operators. Streamed: as few weights in memory as can be."
)
_ABOUT_MEMORY = (
    "Memory. What the levels need was measured here, as growth of a process's peak; least is level "
    '{lowest}, streamed. The budget is what memory_budget="auto" takes of the board with all but '
    "its reserve free."
)
_ABOUT_ENERGY = (
    "Energy of a run: an estimate, the profile's power of a busy core beyond idle over the time "
    "above. The error is that of the power model alone."
)


@dataclass(frozen=True)
class Board:
    """What the profile of a board predicts for a bank."""

    profile: DeviceProfile
    costs: ChunkCosts
    bank: Bank
    run: RunCosts

    @property
    def budget_bytes(self) -> int:
        """What `memory_budget="auto"` takes, where all but the reserve is free."""
        return automatic_budget_bytes(Readings(0.0, available_bytes=self.free_bytes))[0]

    @property
    def free_bytes(self) -> int:
        """Memory but for the reserve."""
        return max(self.profile.memory_mib - self.profile.reserve_mib, 0) << 20

    def placed_bytes(self, level: Level) -> int:
        """Bytes of weights at a level; rows that are read one by one aside."""
        return plan(self.costs, Request(level=level)).resident_bytes

    def run_s(self, level: Level, limit_bytes: int | None) -> float | None:
        """Time of a run with so many bytes of weights in memory; None: its speed is not known."""
        speeds = self._speeds(level)
        if speeds is None:
            return None
        request = Request(level=level, weight_bytes_limit=limit_bytes, speeds=speeds)
        return plan(self.costs, request).predicted_s

    def least_bytes(self, level: Level) -> int:
        """The fewest bytes of weights in memory that do."""
        return smallest_limit(self.costs, Request(level=level))

    def limit_bytes(self, level: Level) -> int | None:
        """What the budget leaves for weights; None: not even the least."""
        ledger = MemoryLedger()
        ledger.overhead_bytes = self.run.besides_bytes
        try:
            return ledger.weight_limit_bytes(self.budget_bytes, self.least_bytes(level))
        except BudgetTooSmallError:
            return None

    def _speeds(self, level: Level) -> Speeds | None:
        layer_s = np.zeros(len(self.run.products))
        for number, layer in enumerate(self.bank.manifest.layers):
            # Depthwise kernels multiply floats at every level.
            own = 32 if layer.depthwise else self.bank.level_of(layer, level)
            products_s = self.profile.products_s(own)
            if products_s is None:
                return None
            layer_s[number] = self.run.products[number] / products_s
        return Speeds(self.profile.storage_read_mb_s * 1e6, layer_s)


def board_section(
    bank: Bank, run: RunCosts | str, own: Sequence[str | os.PathLike[str]] = ()
) -> str:
    """Tables of times, memory and energy; `run` may be the reason why there are none.

    `own` are profiles, by name or file, that come before the bundled ones. Raises ProfileError or
    InputFileError.
    """
    names = dict.fromkeys([*[os.fspath(name) for name in own], *profile_names()])
    profiles = [load_profile(name) for name in names]
    if isinstance(run, str):
        return section("Boards", f"No times, memory and energy of the boards: {run}")
    costs, levels = chunk_costs(bank), levels_shown(bank)
    boards = [Board(profile, costs, bank, run) for profile in profiles]
    about = _ABOUT.format(shapes=run.shapes)
    if not run.whole:
        about += " Layers in a branch or a loop are not counted in times and energy."
    return section(
        "Boards",
        about,
        paragraph(_ABOUT_TIMES),
        _times(boards, levels),
        paragraph(_ABOUT_MEMORY.format(lowest=levels[-1])),
        _memory(boards, levels),
        paragraph(_ABOUT_ENERGY),
        _energy(boards, levels),
    )


def _times(boards: Sequence[Board], levels: Sequence[Level]) -> str:
    places = ("in memory", "in its budget", "streamed")
    heads = [f"{level} {place}, ms" for place in places for level in levels]
    rows = []
    for board in boards:
        whole = [_time(board, level, None, "gmac_s") for level in levels]
        budgeted = []
        for level in levels:
            limit = board.limit_bytes(level)
            keys = ["gmac_s", "memory_mib"]
            if limit is not None and limit < board.placed_bytes(level):
                keys.append("storage_read_mb_s")
            fits = limit is not None
            budgeted.append(_time(board, level, limit, *keys) if fits else "does not fit")
        streamed = [
            _time(board, level, board.least_bytes(level), "gmac_s", "storage_read_mb_s")
            for level in levels
        ]
        rows.append([board.profile.name, *whole, *budgeted, *streamed])
    return table(["board", *heads], rows)


def _time(board: Board, level: Level, limit_bytes: int | None, *keys: str) -> str:
    run_s = board.run_s(level, limit_bytes)
    return "not known" if run_s is None else _marked(f"{_short(run_s * 1e3)}", board, *keys)


def _memory(boards: Sequence[Board], levels: Sequence[Level]) -> str:
    heads = ["board", "memory", "budget", *(f"level {level}" for level in levels), "least"]
    rows = []
    for board in boards:
        needed = [*(board.run.peak_bytes[level] for level in levels), board.run.least_peak_bytes]
        rows.append(
            [
                board.profile.name,
                _marked(format_size(board.profile.memory_mib << 20), board, "memory_mib"),
                _marked(format_size(board.budget_bytes), board, "memory_mib"),
                *(
                    _unbroken(format_size(each))
                    + ("" if each <= board.free_bytes else ", too much")
                    for each in needed
                ),
            ]
        )
    return table(heads, rows)


def _energy(boards: Sequence[Board], levels: Sequence[Level]) -> str:
    heads = [f"{level}{place}, mJ" for place in ("", " streamed") for level in levels]
    rows = []
    for board in boards:
        whole = [_joules(board, level, None) for level in levels]
        streamed = [_joules(board, level, board.least_bytes(level)) for level in levels]
        rows.append([board.profile.name, *whole, *streamed])
    return table(["board", *heads], rows)


def _joules(board: Board, level: Level, limit_bytes: int | None) -> str:
    run_s = board.run_s(level, limit_bytes)
    if run_s is None:
        return "not known"
    try:
        found = estimate_energy(board.profile, 1, run_s)
    except ProfileError:
        return "no power model"
    keys = ["gmac_s", "idle_w", "busy_w", "power_error_percent"]
    keys += [] if limit_bytes is None else ["storage_read_mb_s"]
    figure = f"{_short(found.energy_j * 1e3)} ± {_short(found.error_j * 1e3, 2)}"
    return _marked(figure, board, *keys)


def _marked(text: str, board: Board, *keys: str) -> str:
    return _unbroken(text + (_MARK if board.profile.assumes(*keys) else ""))


def _unbroken(text: str) -> str:
    """A figure that stays in one line on a narrow screen."""
    return text.replace(" ", "\u00a0")


def _short(value: float, digits: int = 3) -> str:
    """So many digits, never in powers of ten."""
    return (
        f"{value:.0f}" if value >= 100 else f"{value:.{digits}g}" if value >= 0.001 else "< 0.001"
    )
