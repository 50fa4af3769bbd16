"""Progress of a build on stderr: bars on a terminal, one line per stage elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

__all__ = ["Progress"]


class Progress:
    """Shows stages and keeps their durations.

    Without `enabled` it shows nothing.
    """

    def __init__(self, enabled: bool) -> None:
        self.seconds: dict[str, float] = {}
        """Duration of each finished stage"""
        self._enabled = enabled

    def say(self, text: str) -> None:
        """Show a line; not inside of a stage."""
        if self._enabled:
            print(f"bapq: {text}", file=sys.stderr)

    @contextlib.contextmanager
    def stage(self, name: str, steps: float = 1) -> Iterator[Callable[..., None]]:
        """Context of one stage; call what it yields after each step, or with how much was done."""
        started_s = time.perf_counter()
        with contextlib.ExitStack() as stack:
            if self._enabled and sys.stderr.isatty():
                yield stack.enter_context(_bar(name, steps))
            else:
                yield lambda done=1: None
        self.seconds[name] = time.perf_counter() - started_s
        if self._enabled and not sys.stderr.isatty():
            print(f"{name}: {self.seconds[name]:.1f} s", file=sys.stderr)


@contextlib.contextmanager
def _bar(name: str, steps: float) -> Iterator[Callable[..., None]]:
    import rich.progress  # only needed, and only loaded, on a terminal
    from rich.console import Console

    columns = (
        rich.progress.TextColumn("{task.description:10}"),
        rich.progress.BarColumn(),
        rich.progress.TaskProgressColumn(),
        rich.progress.TimeElapsedColumn(),
        rich.progress.TextColumn("left:"),
        rich.progress.TimeRemainingColumn(),
    )
    with rich.progress.Progress(*columns, console=Console(stderr=True)) as bars:
        task = bars.add_task(name, total=steps)
        yield lambda done=1: bars.advance(task, done)
