"""The types of the manifest's fields: what the value of a field may be.

A value that breaks the rule of its type is refused as the manifest is read (`strict_json`).
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

from ..errors import BankPathError
from .layout import BLOCK_COLUMNS, TILE_ROWS
from .strict_json import Rule

__all__ = [
    "BankDigest",
    "ChunkRows",
    "Columns",
    "Digest",
    "File",
    "Fraction",
    "Measure",
    "Name",
    "Rows",
    "ScaleColumns",
    "Share",
    "Size",
    "Steps",
    "Text",
    "Yes",
    "integer",
    "number",
    "printable",
    "safe_name",
]


def integer(low: int, high: int, step: int = 1) -> Rule:
    """An integer from `low` to `high`."""
    multiple = f", a multiple of {step}" if step > 1 else ""
    return Rule(
        f"an integer from {low} to {high}{multiple}",
        lambda n: low <= n <= high and n % step == 0,
    )


def number(low: float, high: float) -> Rule:
    """A number from `low` to `high`."""
    return Rule(f"a number from {low:g} to {high:g}", lambda x: low <= x <= high)


# Control characters and line separators would break one-line messages, surrogates UTF-8.
_UNPRINTABLE = "\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff"
_TEXT = re.compile(f"[^{_UNPRINTABLE}]{{0,1024}}")
# 200 leaves room under the 255 bytes of a file name; "manifest.json" is taken in the exchange form.
_NAME = re.compile(r"(?!(\.|\.\.|manifest\.json)\Z)[A-Za-z0-9._-]{1,200}")
_FILE = re.compile(r"(boundary|graph|planes|tables)/(?!\.{1,2}\Z)[A-Za-z0-9._-]{1,200}")
_HEX = re.compile("[0-9a-f]{32}")
_LONG_HEX = re.compile("[0-9a-f]{64}")

Yes = Annotated[bool, Rule("true, or absent", bool)]
Text = Annotated[str, Rule("at most 1024 characters without control characters", _TEXT.fullmatch)]
Name = Annotated[
    str,
    Rule(
        "1 to 200 letters, digits, '.', '_' and '-', but not '.', '..' or 'manifest.json'",
        _NAME.fullmatch,
    ),
]
File = Annotated[
    str,
    Rule(
        "a file in boundary/, graph/, planes/ or tables/ of the bank",
        _FILE.fullmatch,
        BankPathError,
    ),
]
Digest = Annotated[str, Rule("32 lower-case hexadecimal digits", _HEX.fullmatch)]
BankDigest = Annotated[str, Rule("64 lower-case hexadecimal digits", _LONG_HEX.fullmatch)]
# 2^53 - 1: the largest integer that every JSON reader keeps exact.
Size = Annotated[int, integer(0, (1 << 53) - 1)]
# Rows and columns are bounded so that no 32-bit sum of them and no chunk size can overflow.
Rows = Annotated[int, integer(1, 1 << 30)]
Columns = Annotated[int, integer(1, 1 << 24)]
ChunkRows = Annotated[int, integer(TILE_ROWS, 1 << 30, TILE_ROWS)]
ScaleColumns = Annotated[int, integer(BLOCK_COLUMNS, 1 << 24, BLOCK_COLUMNS)]
Steps = Annotated[int, integer(8, 16)]
Measure = Literal["agreement", "cosine"]
Share = Annotated[float, number(-1, 1)]
Fraction = Annotated[float, Rule("a finite number, 0 or more", lambda x: 0 <= x < float("inf"))]


def printable(text: str) -> str:
    """Turn any text into one that the manifest allows."""
    return re.sub(f"[{_UNPRINTABLE}]", "?", text)[:1024]


def safe_name(text: str) -> str:
    """Turn any text into a name that the manifest allows."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "_", text)[:200]
    return name if _NAME.fullmatch(name) else f"_{name}"[:200]
