"""What the programs share: the names that they are given, and tables as text or Markdown."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Collection, Sequence

from bapq_edge.units import format_size

__all__ = ["add_format", "add_names", "format_mib", "print_table"]


def add_names(parser: argparse.ArgumentParser, known: Collection[str], what: str = "model") -> None:
    """Add `names`: none, or some of those that are known."""
    choice = f"of {', '.join(known)}"

    def name(text: str) -> str:
        if text not in known:
            raise argparse.ArgumentTypeError(f"no {what} {text!r}; choose {choice}")
        return text

    parser.add_argument("names", nargs="*", type=name, metavar=what.upper(), help=choice)


def format_mib(size_bytes: float) -> str:
    """The size in MiB where `format_size` would round to a tenth of a GiB."""
    return format_size(size_bytes) if size_bytes < 1 << 30 else f"{size_bytes / (1 << 20):.1f} MiB"


def add_format(parser: argparse.ArgumentParser, *more: str) -> None:
    """Add --format: `table`, `md` and what else the program can print; default: as stdout is."""
    default = "table" if sys.stdout.isatty() else "md"
    parser.add_argument("--format", choices=("table", "md", *more), default=default)


def print_table(
    title: str, heads: Sequence[str], rows: Sequence[Sequence[str]], style: str
) -> None:
    """Print text cells in the style `table`, drawn for a terminal, or `md`."""
    if style == "md":
        print(f"{title}\n")
        for cells in (heads, ["---"] * len(heads), *rows):
            print("| " + " | ".join(cells) + " |")
        print()
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(*heads, title=title, box=box.SIMPLE)
    for cells in rows:
        table.add_row(*cells)
    Console().print(table)
