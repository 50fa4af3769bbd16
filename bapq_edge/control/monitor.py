"""The monitor: a thread that reads the sensors and lets the controller decide."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from ..bank.layout import Level
from ..sensors import Readings, Sensors
from ..telemetry import logger
from .config import ControllerConfig
from .controller import Controller
from .device_profile import DeviceProfile
from .envelope import Decision, Envelope

__all__ = ["Monitor"]


class Monitor:
    """Steps the controller once per period until it is stopped."""

    def __init__(
        self,
        sensors: Sensors,
        profile: DeviceProfile | None,
        *,
        levels: Sequence[Level],
        threads: int,
        budget_bytes: int | None,
        minimum_bytes: int,
        follow: Callable[[Callable[[int], Decision]], None],
    ) -> None:
        """Begin with nothing restricted; `start` starts the thread.

        Args:
            sensors: read once per period, and closed by `stop`.
            profile: the board's, for the thresholds; None takes the defaults.
            levels: those that the bank can run at.
            threads: threads when the board is cool.
            budget_bytes: most weight bytes when memory is plenty; None is no limit.
            minimum_bytes: the weight limit never goes below it.
            follow: called after every reading with a function that decides on it, given the weight
                bytes in memory; the caller holds its own lock around both.
        """
        config = ControllerConfig() if profile is None else ControllerConfig.from_profile(profile)
        self._sensors = sensors
        self._period_s = config.period_s
        self._follow = follow
        self._controller = Controller(
            config, levels, budget_bytes, threads=threads, minimum_bytes=minimum_bytes
        )
        self.envelope: Envelope = self._controller.envelope
        """What the last decision allows."""
        self.readings: Readings | None = None
        """What the sensors told last."""
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._monitor, name="bapq-controller", daemon=True)

    def start(self) -> None:
        """Read from now on."""
        self._thread.start()

    def stop(self) -> None:
        """Read no more. Called from the monitor's own thread it does not wait for it."""
        self._stopping.set()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join()
        self._sensors.close()

    def set_budget(self, budget_bytes: int | None, minimum_bytes: int) -> Envelope:
        """Take another budget; what is allowed then."""
        self.envelope = self._controller.set_budget(budget_bytes, minimum_bytes)
        return self.envelope

    def step(self) -> None:
        """One reading and what follows from it; the thread calls it once per period."""
        self.readings = readings = self._sensors.read()

        def decide(weight_bytes: int) -> Decision:
            decision = self._controller.update(readings, weight_bytes=weight_bytes)
            self.envelope = decision.envelope
            logger.debug("controller: %s", decision)
            return decision

        self._follow(decide)

    def _monitor(self) -> None:
        while not self._stopping.is_set():
            self.step()
            self._stopping.wait(self._period_s)
