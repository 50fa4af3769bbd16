"""The parser of the command line: every usage error is one line, with a suggestion for a typo."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Collection, Sequence
from typing import Any, NoReturn

__all__ = ["Parser"]


class Parser(argparse.ArgumentParser):
    """An `argparse.ArgumentParser` that looks for typos first; its subcommands' parsers do too.

    `argparse` by itself would name what is missing instead: after `run --inptu x.npz`, --input.
    """

    commands: Collection[str] = ()
    """Names of the subcommands."""

    def add_subparsers(self, **options: Any) -> Any:
        """As `argparse` does, and remember the names that will be added."""
        subparsers = super().add_subparsers(**options)
        self.commands = subparsers.choices
        return subparsers

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As `argparse` does, once no command and no long option is misspelt."""
        args = sys.argv[1:] if args is None else list(args)
        self._check_spelling(args)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """End with exit code 2 and one line."""
        line = " ".join(message.split())
        self.exit(2, f"bapq: {line}; see '{self.prog} --help'\n")

    def _check_spelling(self, arguments: Sequence[str]) -> None:
        options = [name for name in self._option_string_actions if name.startswith("--")]
        for argument in arguments:
            if argument == "--":
                return
            if argument.startswith("--"):
                name = argument.partition("=")[0]
                if not any(option.startswith(name) for option in options):  # it may be cut short
                    self.error(f"there is no option {name}{_suggestion(name, options)}")
            elif self.commands and not argument.startswith("-"):
                if argument not in self.commands:
                    close = _suggestion(argument, self.commands)
                    names = close or f"; there are {', '.join(self.commands)}"
                    self.error(f"there is no command {argument!r}{names}")
                return  # what follows is the command's own


def _suggestion(word: str, known: Collection[str]) -> str:
    names = {name.lstrip("-"): name for name in known}  # dashes alone make no likeness
    close = difflib.get_close_matches(word.lstrip("-"), names, n=1)
    return f"; did you mean {names[close[0]]}?" if close else ""
