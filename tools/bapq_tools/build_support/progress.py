"""Progress of a build on stderr: bars on a terminal, lines elsewhere."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator

__all__ = ["Progress"]

_LINE_S = 5.0
"""The time between two lines of a long stage where there is no terminal."""
_BAR_S = 0.5
"""The same of two states of a bar."""
_MOST_GUESSED = 0.99
"""A stage that is not done never shows more."""


class Progress:
    """Shows stages and keeps their durations.

    Without `enabled` it shows nothing.
    """

    def __init__(self, enabled: bool) -> None:
        self.seconds: dict[str, float] = {}
        """Duration of each finished stage."""
        self._enabled = enabled

    def say(self, text: str) -> None:
        """Show a line; not inside of a stage."""
        if self._enabled:
            print(f"bapq: {text}", file=sys.stderr)

    @contextlib.contextmanager
    def stage(self, name: str, steps: float = 1) -> Iterator[Callable[..., None]]:
        """Context of one stage; call what it yields after each step, or with how much was done."""
        clock = _Clock(steps)
        with contextlib.ExitStack() as stack:
            if self._enabled and sys.stderr.isatty():
                yield stack.enter_context(_bar(name, clock))
            elif self._enabled:
                yield stack.enter_context(_lines(name, clock))
            else:
                yield lambda done=1: None
        self.seconds[name] = clock.elapsed_s
        if self._enabled and not sys.stderr.isatty():
            print(f"{name}: {self.seconds[name]:.1f} s", file=sys.stderr)


class _Clock:
    """Tells how long a stage takes, as if steps were equal shares of its time."""

    def __init__(self, steps: float) -> None:
        self._steps = steps
        self._done = 0.0
        self._started_s = time.perf_counter()
        self._end_s: float | None = None

    def advance(self, done: float = 1) -> None:
        """Take note of steps done."""
        self._done += done
        self._end_s = time.perf_counter() + self.elapsed_s * (1 / self.share - 1)

    @property
    def elapsed_s(self) -> float:
        """Time since the stage began."""
        return time.perf_counter() - self._started_s

    @property
    def share(self) -> float:
        """The share that is done, 0 to 1."""
        return min(self._done / self._steps, 1.0)

    @property
    def share_now(self) -> float:
        """The share of the time that has passed, as the last step foretells it.

        So a long step does not stand still, and one that takes longer than foretold nears the end
        without reaching it.
        """
        if self._end_s is None or self.share == 1:
            return self.share
        whole_s = self._end_s - self._started_s
        return max(self.share, min(self.elapsed_s / whole_s, _MOST_GUESSED) if whole_s else 0.0)

    def left(self) -> str:
        """The time left, as minutes:seconds; it runs down between two steps."""
        if self._end_s is None:
            return "-:--"
        left_s = round(max(self._end_s - time.perf_counter(), 0.0))
        return f"{left_s // 60}:{left_s % 60:02}"


@contextlib.contextmanager
def _ticking(tick: Callable[[], None], period_s: float) -> Iterator[None]:
    """Call `tick` once per period on a thread: a step may take minutes."""
    stopping = threading.Event()

    def run() -> None:
        while not stopping.wait(period_s):
            tick()

    thread = threading.Thread(target=run, name="bapq-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopping.set()
        thread.join()


@contextlib.contextmanager
def _lines(name: str, clock: _Clock) -> Iterator[Callable[..., None]]:
    def show() -> None:
        state = f"{clock.share_now:.0%} after {clock.elapsed_s:.0f} s, {clock.left()} left"
        print(f"{name}: {state}", file=sys.stderr)

    with _ticking(show, _LINE_S):
        yield clock.advance


@contextlib.contextmanager
def _bar(name: str, clock: _Clock) -> Iterator[Callable[..., None]]:
    import rich.progress  # only needed, and only loaded, on a terminal
    from rich.console import Console

    class Left(rich.progress.ProgressColumn):
        def render(self, task: rich.progress.Task) -> str:
            return clock.left()

    columns = (
        rich.progress.TextColumn("{task.description:10}"),
        rich.progress.BarColumn(),
        rich.progress.TaskProgressColumn(),
        rich.progress.TimeElapsedColumn(),
        rich.progress.TextColumn("left:"),
        Left(),
    )
    with rich.progress.Progress(*columns, console=Console(stderr=True)) as bars:
        task = bars.add_task(name, total=1.0)

        def show() -> None:
            bars.update(task, completed=clock.share_now)

        def advance(done: float = 1) -> None:
            clock.advance(done)
            show()

        with _ticking(show, _BAR_S):
            yield advance
