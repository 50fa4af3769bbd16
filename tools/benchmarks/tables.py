"""Tables on a terminal or as Markdown."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

__all__ = ["add_format", "print_table"]


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
