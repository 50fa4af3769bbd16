"""Write sentences.txt: English sentences out of the docstrings of CPython's standard library.

    PYTHONPATH=tools python -m benchmarks.zoo.make_sentences [OUT.txt]

Deterministic for one CPython version; the bundled file was made with 3.11.
"""

from __future__ import annotations

import ast
import random
import re
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from .sentences import CALIBRATION, HELD_OUT, SENTENCES_PATH

WORDS = range(6, 61)
"""Accepted lengths of a sentence."""
PER_MODULE = 12
"""Most sentences of a module, so that no single subject dominates."""
NOTICE = """\
# Sentences from the docstrings of CPython's standard library, one a line, made by
# make_sentences.py. Copyright (c) 2001 Python Software Foundation; All Rights Reserved.
# Licensed under the PSF License Agreement: https://docs.python.org/3/license.html
"""


def docstrings(source: str) -> Iterator[str]:
    """Docstrings of a module, its classes and functions, in source order."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            yield ast.get_docstring(node) or ""


def sentences_of(docstring: str) -> Iterator[str]:
    """Plain prose only: no doctest, no list, no table, no sentence that is mostly symbols."""
    for paragraph in re.split(r"\n\s*\n", docstring):
        if re.search(r">>>|^\s+|^\s*[-*+|=~#.:]|\s--\s|\t", paragraph, re.MULTILINE):
            continue
        for sentence in re.split(r"(?<=[.?!])\s+(?=[A-Z])", " ".join(paragraph.split())):
            words = sentence.split()
            plain = sum(re.fullmatch(r"[A-Za-z'-]+[.,;:?!]?", word) is not None for word in words)
            if (
                len(words) in WORDS
                and sentence.isascii()
                and re.match(r"[A-Z]", sentence)
                and re.search(r"[a-z)'\"][.?!]$", sentence)
                and plain >= 0.85 * len(words)
            ):
                yield sentence


def collect(library: Path) -> list[str]:
    """Distinct sentences, at most PER_MODULE of each module, in an order fixed by a seed."""
    draw = random.Random(0)
    taken: set[str] = set()
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).parts
        if {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages"} & set(parts):
            continue
        source = path.read_text(encoding="utf-8", errors="replace")
        found = sorted({s for text in docstrings(source) for s in sentences_of(text)} - taken)
        taken.update(draw.sample(found, min(PER_MODULE, len(found))))
    ordered = sorted(taken)
    draw.shuffle(ordered)
    return ordered


def main() -> None:
    """Collect, cut to the number needed, write."""
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else SENTENCES_PATH
    found = collect(Path(sysconfig.get_path("stdlib")))
    count = CALIBRATION + HELD_OUT.stop - HELD_OUT.start
    if len(found) < count:
        raise SystemExit(f"found {len(found)} sentences, need {count}: use a full CPython 3.11")
    out.write_text(NOTICE + "\n".join(found[:count]) + "\n", encoding="utf-8")
    print(f"{out}: {count} of {len(found)} sentences")


if __name__ == "__main__":
    main()
