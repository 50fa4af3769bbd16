"""The pages, and the commands that they tell users to give."""

from __future__ import annotations

import re
from pathlib import Path

__all__ = ["board_page", "board_section", "commands", "fenced", "pages", "readme"]

_ROOT = Path(__file__).resolve().parents[2]


def readme() -> str:
    """The front page."""
    return (_ROOT / "README.md").read_text()


def pages() -> list[Path]:
    """Every page of the project."""
    folders = ("docs", "examples", "device_profiles")
    return [*_ROOT.glob("*.md"), *(page for f in folders for page in (_ROOT / f).rglob("*.md"))]


def board_page() -> str:
    """The walk from a fresh board to a service."""
    return (_ROOT / "examples" / "raspberry_pi" / "README.md").read_text()


def board_section() -> str:
    """What the README says of it."""
    return readme().partition("\n## On a Raspberry Pi\n")[2].partition("\n## ")[0]


def fenced(text: str) -> list[tuple[str, str]]:
    """(info string, content) of every fenced block."""
    return re.findall(r"^```(.*?)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def commands(text: str) -> list[str]:
    """The blocks to be run on an emulated board, in order; the first one installs bapq-edge."""
    return [content for info, content in fenced(text) if info == "sh"]
