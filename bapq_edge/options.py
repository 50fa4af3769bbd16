"""What a session is asked for, checked before anything is opened."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Literal, get_args

from .bank.boundary import Precision
from .bank.layout import LEVELS, Level
from .errors import ProfileError, RequestError, SizeError, UnknownLevelError
from .input_files import is_path
from .planning.planner import Request
from .policy import Policy
from .telemetry import Event
from .units import parse_size

__all__ = [
    "PolicyName",
    "SessionOptions",
    "checked_bits",
    "checked_budget",
    "checked_deadline",
    "checked_level",
    "checked_listener",
]

PolicyName = Literal["static", "gate", "escalate"]

_MOST_BITS = 32

_MAX_SLOWDOWN = 1.1
"""What streaming may cost where nothing is said: less than the noise of most applications."""

_MOST_THREADS = 1024
"""More than any board has cores; every thread takes memory and time to start."""

_SHOWN_LENGTH = 80


@dataclass(frozen=True, eq=False)
class SessionOptions:
    """The settings of a session, as `Session` takes them; refused when built where they are none.

    Raises RequestError and its kinds, with the setting, its value and what is possible.
    """

    bank: str | os.PathLike[str]
    memory_budget: int | Literal["auto"] | None = None
    """The budget in bytes; a size such as "64MiB" is taken too, and becomes a number."""
    level: Level | Literal["auto"] = "auto"
    """A level as text is taken too, and becomes a number."""
    bits: float | None = None
    policy: Policy | PolicyName | None = None
    target_agreement: float | None = None
    latency_ms: float | None = None
    max_slowdown: float | None = None
    weight_budget: int | None = None
    """The budget in bytes; a size such as "1MiB" is taken too, and becomes a number."""
    threads: int | None = None
    controller: Literal["auto"] | None = None
    profile: str | os.PathLike[str] | None = None
    direct_io: bool = False
    max_shapes: Mapping[str, tuple[int, ...]] | None = None
    """The largest shape of inputs, by name."""
    allow_overrun: bool = False
    trusted_key: str | os.PathLike[str] | None = None
    monitor: bool | None = None
    """None: as BAPQ_MONITOR in the environment says, which is 1 or not."""
    on_switch: Callable[[Event], None] | None = None

    def __post_init__(self) -> None:
        """Refuse values that cannot be had, and pairs that contradict each other."""
        _check(is_path(self.bank), "bank", self.bank, "the bank's directory")
        self._become("memory_budget", checked_budget(self.memory_budget))
        self._become("level", checked_level(self.level))
        self._become("bits", None if self.bits is None else checked_bits(self.bits))
        self._become("weight_budget", _checked_size("weight_budget", self.weight_budget))
        _check_policy(self.policy)
        _check_number("target_agreement", self.target_agreement, 1.0, "a share from 0 to 1")
        _check_number("latency_ms", self.latency_ms, math.inf, "a number of milliseconds from 0 up")
        slowdown = self.max_slowdown is None or (
            _is_number(self.max_slowdown) and self.max_slowdown >= 1
        )
        _check(slowdown, "max_slowdown", self.max_slowdown, "a number from 1 up, or None")
        whole = self.threads is None or _is_whole(self.threads)
        _check(whole, "threads", self.threads, "a whole number from 1 up, or None")
        if self.threads is not None and self.threads < 1:
            raise RequestError(f"threads is {self.threads}, the least is 1")
        if self.threads is not None and self.threads > _MOST_THREADS:
            raise RequestError(f"threads is {self.threads}, the most is {_MOST_THREADS}")
        automatic = isinstance(self.controller, str) and self.controller == "auto"
        known = self.controller is None or automatic
        _check(known, "controller", self.controller, '"auto" or None')
        if self.profile is not None and not is_path(self.profile):
            raise ProfileError(
                f"profile is {_shown(self.profile)}: give a board's name, a YAML file, or None"
            )
        _check(isinstance(self.direct_io, bool), "direct_io", self.direct_io, "True or False")
        monitored = isinstance(self.monitor, bool | None)
        _check(monitored, "monitor", self.monitor, "True, False or None")
        if self.monitor is None:
            self._become("monitor", os.environ.get("BAPQ_MONITOR") == "1")
        key = self.trusted_key is None or is_path(self.trusted_key)
        _check(key, "trusted_key", self.trusted_key, "a public key's file or its line, or None")
        self._become("max_shapes", _checked_shapes(self.max_shapes))
        overrun = self.allow_overrun
        _check(isinstance(overrun, bool), "allow_overrun", overrun, "True or False")
        checked_listener(self.on_switch)
        self._check_pairs()

    def _check_pairs(self) -> None:
        named = self.policy is None or isinstance(self.policy, str)
        if self.target_agreement is not None and self.policy == "static":
            raise RequestError(
                "target_agreement needs a policy that looks at inputs: leave policy out"
            )
        if self.target_agreement is not None and not named:
            raise RequestError("target_agreement is for policies by name: leave it out")
        if self.steered and named and self.level != "auto":
            raise RequestError(f"level {self.level} and a policy are both asked for: choose one")
        if self.target_agreement is not None and self.bits is not None:
            raise RequestError(
                f"target_agreement {self.target_agreement:g} and {self.bits:g} bits are both asked "
                "for: choose one"
            )
        Request(level=self.level, bits=self.bits)  # refuses both

    def _become(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)  # as a frozen dataclass sets its own fields

    @property
    def request(self) -> Request:
        """What is asked of the planner; a policy turns `bits` into precisions of its own."""
        bits = None if self.steered else self.bits
        slowdown = _MAX_SLOWDOWN if self.latency_ms is None else None
        if self.max_slowdown is not None:
            slowdown = float(self.max_slowdown)
        return Request(self.level, bits, latency_s=self.latency_s, max_slowdown=slowdown)

    @property
    def steered(self) -> bool:
        """Whether a policy chooses the precision of every run."""
        if self.policy is None:
            return self.target_agreement is not None
        return self.policy != "static"

    def default_precision(self, held: Sequence[Level]) -> Precision:
        """What runs are made at where the policy does not say; the bank holds these levels."""
        if self.level != "auto":
            return Precision(level=self.level)
        return Precision(level=held[0]) if self.bits is None else Precision(bits=self.bits)

    @property
    def latency_s(self) -> float | None:
        """The latency in seconds."""
        return None if self.latency_ms is None else float(self.latency_ms) / 1e3


def checked_level(level: Any) -> Level | Literal["auto"]:
    """The level as a number, or "auto". Raises UnknownLevelError."""
    if isinstance(level, str) and level == "auto":
        return "auto"
    if isinstance(level, str) or _is_whole(level):
        for known in LEVELS:
            if str(level) == str(known):
                return known
    raise UnknownLevelError(
        f'level is {_shown(level)}: choose "auto" or one of {", ".join(map(str, LEVELS))}'
    )


def checked_bits(bits: Any) -> float:
    """The bits per weight. Raises RequestError."""
    if not (_is_number(bits) and 1 <= bits <= _MOST_BITS):
        raise RequestError(f"bits is {_shown(bits)}: give a number of bits per weight from 1 to 32")
    return float(bits)


def checked_budget(budget: Any) -> int | Literal["auto"] | None:
    """A memory budget in bytes, "auto", or None for no limit. Raises SizeError."""
    if isinstance(budget, str) and budget == "auto":
        return "auto"
    return _checked_size("memory_budget", budget)


def checked_deadline(deadline_ms: Any, *, steered: bool) -> float | None:
    """The deadline of a run in seconds; a run is steered where a policy may answer again.

    Raises RequestError.
    """
    if deadline_ms is None:
        return None
    good = _is_number(deadline_ms) and deadline_ms > 0
    _check(good, "deadline_ms", deadline_ms, "a number of milliseconds above 0, or None")
    if not steered:
        raise RequestError(
            f"deadline_ms is {deadline_ms:g}, and the session has no policy, so no answer is made "
            "again that could be given up: open it with policy='escalate', or leave it out"
        )
    return float(deadline_ms) / 1e3


def checked_listener(on_switch: Any) -> Callable[[Event], None] | None:
    """What is to be called with every switch, or None. Raises RequestError."""
    _check(
        on_switch is None or callable(on_switch),
        "on_switch",
        on_switch,
        "a function of one argument, the event, or None",
    )
    return on_switch  # type: ignore[no-any-return]


def _checked_size(name: str, size: Any) -> int | None:
    try:
        return None if size is None else parse_size(size)
    except SizeError as error:
        raise SizeError(f"{name}: {error}") from None


def _checked_shapes(shapes: Any) -> dict[str, tuple[int, ...]] | None:
    if shapes is None:
        return None
    wanted = 'a dict of shapes by input, such as {"image": (32, 3, 224, 224)}, or None'
    _check(isinstance(shapes, Mapping), "max_shapes", shapes, wanted)
    for name, shape in shapes.items():
        lengths = isinstance(shape, Sequence) and not isinstance(shape, str)
        good = isinstance(name, str) and lengths and all(_is_whole(n) and n > 0 for n in shape)
        _check(good, "max_shapes", shapes, wanted)
    return {name: tuple(map(int, shape)) for name, shape in shapes.items()}


def _check_policy(policy: Any) -> None:
    wanted = (
        'choose "static", "gate" or "escalate", or give an object with a method choose(context)'
    )
    if policy is None or (isinstance(policy, str) and policy in get_args(PolicyName)):
        return
    if isinstance(policy, str):
        raise RequestError(f"policy {policy!r} is unknown: {wanted}")
    if isinstance(policy, type):
        raise RequestError(f"policy is the class {policy.__name__}: give an object of it")
    if not callable(getattr(policy, "choose", None)):
        raise RequestError(f"policy of type {type(policy).__name__} has no method choose: {wanted}")


def _check_number(name: str, value: Any, most: float, wanted: str) -> None:
    good = value is None or (_is_number(value) and 0 <= value <= most)
    _check(good, name, value, f"{wanted}, or None")


def _is_number(value: Any) -> bool:
    """Whether it is a number, and a finite one."""
    if not isinstance(value, Real) or isinstance(value, bool):
        return False
    return bool(-math.inf < value < math.inf)  # type: ignore[operator]


def _is_whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _check(good: bool, name: str, value: Any, wanted: str) -> None:
    if not good:
        raise RequestError(f"{name} is {_shown(value)}: give {wanted}")


def _shown(value: Any) -> str:
    """The value in one line that is not too long."""
    text = " ".join(repr(value).split())
    return text if len(text) <= _SHOWN_LENGTH else text[:_SHOWN_LENGTH] + "..."
