"""The Raspberry Pi's firmware, asked through vcgencmd: too slow to ask at every read."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import replace

from .power import Power, pmic_power

__all__ = ["Firmware", "Vcgencmd", "system_vcgencmd"]

Vcgencmd = Callable[[str], "str | None"]
"""vcgencmd's output for one command; None when it fails"""

_DUTY = 0.05
"""Most of the time that is spent on asking."""
# One that failed (no permission on /dev/vcio, no PMIC) most likely fails again.
_RETRY_S = 60.0
_TIMEOUT_S = 1.0


def system_vcgencmd() -> Vcgencmd | None:
    """This machine's vcgencmd; None where there is none."""
    import shutil
    import subprocess

    path = shutil.which("vcgencmd")
    if path is None:
        return None

    def ask(command: str) -> str | None:
        try:
            answer = subprocess.run(
                [path, command], capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
            )
        except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
            return None
        return answer.stdout if answer.returncode == 0 else None

    return ask


class Firmware:
    """Throttling and PMIC power, asked once per period or less, with the age of the answer."""

    def __init__(self, ask: Vcgencmd, period_s: float) -> None:
        """Keep the way to ask; nothing is asked yet."""
        self._ask = ask
        self._period_s = period_s
        self._took_s = 0.0
        self._asked_s: dict[str, float] = {}
        self._throttled: int | None = None
        self._power: Power | None = None

    def refresh(self, time_s: float) -> None:
        """Ask what is due."""
        if self._due("get_throttled", time_s, self._throttled is not None):
            answer = self._answer("get_throttled")
            match = re.search(r"throttled=0x([0-9a-fA-F]+)", answer)
            self._throttled = int(match[1], 16) if match else None
        if self._due("pmic_read_adc", time_s, self._power is not None):
            self._power = pmic_power(self._answer("pmic_read_adc"))

    def _answer(self, command: str) -> str:
        started_s = time.perf_counter()
        answer = self._ask(command)
        self._took_s = time.perf_counter() - started_s
        return answer or ""

    def _due(self, command: str, time_s: float, answered: bool) -> bool:
        asked_s = self._asked_s.get(command)
        wait_s = max(self._period_s, 2 * self._took_s / _DUTY) if answered else _RETRY_S
        if asked_s is not None and time_s - asked_s < wait_s:
            return False
        self._asked_s[command] = time_s
        return True

    @property
    def throttled(self) -> int | None:
        """Bits of get_throttled."""
        return self._throttled

    def power(self, time_s: float) -> Power | None:
        """What the PMIC told last."""
        if self._power is None:
            return None
        return replace(self._power, age_s=time_s - self._asked_s["pmic_read_adc"])

    def age_s(self, time_s: float) -> float | None:
        """Age of the older of the answers that there are."""
        answers = {"get_throttled": self._throttled, "pmic_read_adc": self._power}
        ages = [time_s - self._asked_s[name] for name in answers if answers[name] is not None]
        return max(ages, default=None)
