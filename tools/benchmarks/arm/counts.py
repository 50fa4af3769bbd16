"""Instructions of a run by what they were for, from what the plugin `blocks.c` wrote."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

__all__ = ["PARTS", "Block", "Frame", "Symbols", "by_part", "median_run", "part_of", "spans"]

PARTS = {
    "kernels": "our kernels",
    "inputs": "preparing inputs",
    "operators": "rest of our operators",
    "runtime": "ONNX Runtime's nodes",
    "around": "Python",
}
"""what instructions are for -> its name in the table"""

_PREPARES = re.compile(r"quantize|block_sums|fill_|build_panel|prepare_|find_extent")


class Block(NamedTuple):
    """Code that runs from its first instruction to its last."""

    path: str
    """the file that it was loaded from; - is none"""
    offset: int
    """in that file"""


class Frame(NamedTuple):
    """A function and its source file; where one is inlined in another, both are there."""

    function: str
    source: str


def spans(lines: Iterable[str]) -> Iterator[Counter[Block]]:
    """Instructions of each block up to the first mark, from there to the second, and so on."""
    counts: Counter[Block] = Counter()
    for line in lines:
        kind, *cells = line.rstrip("\n").split(" ", 3)
        if kind == "mark":
            yield counts
            counts = Counter()
        else:
            instructions, offset, path = cells
            counts[Block(path, int(offset, 16))] += int(instructions)


class Symbols:
    """The functions of our library, as its debug information tells them."""

    def __init__(self, library: Path) -> None:
        self._library = library
        self._frames: dict[int, tuple[Frame, ...]] = {}
        with library.open("rb") as file:
            self._segments = _segments(file)

    def frames(self, offsets: Iterable[int]) -> dict[int, tuple[Frame, ...]]:
        """The functions at each offset of the file, the innermost first."""
        new = sorted(set(offsets) - self._frames.keys())
        if new:
            addresses = [self._address(offset) for offset in new]
            command = ["aarch64-linux-gnu-addr2line", "-a", "-f", "-i", "-e", str(self._library)]
            text = subprocess.run(
                command,
                input="\n".join(map(hex, addresses)),
                check=True,
                capture_output=True,
                text=True,
            ).stdout
            found = parse_frames(text.splitlines())
            self._frames.update(zip(new, (found[address] for address in addresses), strict=True))
        return self._frames

    def _address(self, offset: int) -> int:
        for start, size, address in self._segments:
            if start <= offset < start + size:
                return offset - start + address
        raise ValueError(f"{self._library.name} has no code at {offset:#x}")


def _segments(file: BinaryIO) -> list[tuple[int, int, int]]:
    """(offset, bytes, address) of what is loaded."""
    from elftools.elf.elffile import ELFFile

    return [
        (segment["p_offset"], segment["p_filesz"], segment["p_vaddr"])
        for segment in ELFFile(file).iter_segments("PT_LOAD")
    ]


def parse_frames(lines: list[str]) -> dict[int, tuple[Frame, ...]]:
    """What addr2line prints: after each address, pairs of lines of a function and its source."""
    frames: dict[int, tuple[Frame, ...]] = {}
    pairs: list[str] = []
    address = None
    for line in [*lines, "0x0"]:
        if not line.startswith("0x"):
            pairs.append(line)
            continue
        if address is not None:
            names, sources = pairs[::2], (source.rpartition(":")[0] for source in pairs[1::2])
            frames[address] = tuple(map(Frame, names, sources))
        address, pairs = int(line, 16), []
    return frames


def part_of(path: str, frames: tuple[Frame, ...]) -> str:
    """What code is for: one of PARTS. `frames` are those of our library."""
    if "/onnxruntime/" in path:
        return "runtime"
    if not path.endswith("/libbapq.so"):
        return "around"
    if any(
        _PREPARES.search(frame.function) or frame.source.endswith("/image.c") for frame in frames
    ):
        return "inputs"
    if any("/kernels/" in frame.source for frame in frames):
        return "kernels"
    return "operators"


def by_part(counts: Counter[Block], symbols: Symbols) -> dict[str, int]:
    """Instructions of one run for each of PARTS."""
    ours = {block for block in counts if block.path.endswith("/libbapq.so")}
    frames = symbols.frames(block.offset for block in ours)
    parts = dict.fromkeys(PARTS, 0)
    for block, instructions in counts.items():
        inside = frames[block.offset] if block in ours else ()
        parts[part_of(block.path, inside)] += instructions
    return parts


def median_run(runs: list[dict[str, int]]) -> dict[str, int]:
    """The run with the median of all instructions."""
    return sorted(runs, key=lambda parts: sum(parts.values()))[len(runs) // 2]
