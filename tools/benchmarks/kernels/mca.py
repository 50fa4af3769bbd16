"""The inner loops of the kernels for ARM, as llvm-mca estimates them on the boards' cores.

A loop's bound is what its loads and its multiplications need at least, whatever else it does.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = [
    "CORES",
    "Core",
    "Loop",
    "bound_cycles",
    "estimate_cycles",
    "find_loops",
    "llvm_version",
    "loops_of",
]


@dataclass(frozen=True)
class Core:
    """What a core can begin in a cycle, 128 bits wide: from Arm's software optimization guides."""

    loads: int
    integer_multiplies: int
    multiplies: int
    """of all kinds together: integer, dot product, float"""
    has_dot: bool = False


CORES = {
    "cortex-a53": Core(loads=1, integer_multiplies=1, multiplies=2),
    "cortex-a72": Core(loads=1, integer_multiplies=1, multiplies=2),
    "neoverse-n1": Core(loads=2, integer_multiplies=1, multiplies=2, has_dot=True),
}
"""llvm-mca's name -> core; neoverse-n1 stands for the Cortex-A76, of which LLVM has no model"""

_INTEGER = re.compile(r"[su]q?d?mu?l(l|al|sl)2?$|[su]ml[as]l2?$|m(ul|la|ls)$")
_LONG = re.compile(r"smull|smlal|smlsl")
_DOT = re.compile(r"(us|su|s|u)dot$")
_FLOAT = re.compile(r"f(n?mul|mla|mls|n?madd|n?msub|mulx)$")
_LOAD = re.compile(r"ld(r|p|1|2|3|4|ur|nt?p)")
_VECTORS = {"8h": 8, "4s": 4, "2d": 2, "2s": 2}
_ITERATIONS = 100
_OLDEST_LLVM = 17
"""older ones take the neoverse-n1 for a Cortex-A57"""


@dataclass(frozen=True)
class Loop:
    """An innermost loop: what is between a backward branch and its target."""

    symbol: str
    body: tuple[str, ...]
    """instructions, the branch included"""

    def count(self, pattern: re.Pattern[str]) -> int:
        """How many instructions have a name that matches."""
        return sum(bool(pattern.match(line.split()[0])) for line in self.body)

    @property
    def loads(self) -> int:
        """Loads, spilled registers included."""
        return self.count(_LOAD)

    @property
    def spills(self) -> int:
        """Loads and stores on the stack."""
        return sum(bool(re.match(r"(ld|st)", line) and "[sp" in line) for line in self.body)

    @property
    def uses_dot(self) -> bool:
        """Whether it needs ARMv8.2's dot product."""
        return self.count(_DOT) > 0

    @property
    def products(self) -> int:
        """Multiply-adds of 8-bit values, or of floats where it has none of these."""
        narrow = 16 * self.count(_DOT) + 8 * self.count(_LONG)
        return narrow or sum(
            _VECTORS.get(line.partition(".")[2][:2], 1)
            for line in self.body
            if re.match(r"fml[as]|fn?madd", line)
        )


def bound_cycles(loop: Loop, core: Core) -> float:
    """Cycles that its loads and multiplications need at least."""
    integers = loop.count(_INTEGER)
    every = integers + loop.count(_DOT) + loop.count(_FLOAT)
    return max(loop.loads / core.loads, integers / core.integer_multiplies, every / core.multiplies)


def find_loops(disassembly: str) -> Iterator[Loop]:
    """The innermost loops of what llvm-objdump prints."""
    for part in re.split(r"\n(?=[0-9a-f]+ <)", disassembly):
        head = re.match(r"[0-9a-f]+ <(.+)>:", part)
        if head is None:
            continue
        code: list[tuple[int, str]] = []
        for line in part.splitlines()[1:]:
            found = re.match(r"\s*([0-9a-f]+):\s+(\S.*)", line)
            if found:
                code.append((int(found[1], 16), " ".join(found[2].split())))
        yield from _innermost(head[1], code)


def _innermost(symbol: str, code: list[tuple[int, str]]) -> Iterator[Loop]:
    index_of = {address: index for index, (address, _) in enumerate(code)}
    spans = []
    for index, (_, text) in enumerate(code):
        found = re.match(r"(?:b|b\.\w+|cbn?z|tbn?z)\s(?:.*\s)?(?:#?0x)?([0-9a-f]+) <", text)
        start = index_of.get(int(found[1], 16)) if found else None
        if start is not None and start <= index:
            spans.append((start, index))
    for start, end in spans:
        inner = any(
            (start, end) != (other, last) and start <= other and last <= end
            for other, last in spans
        )
        if not inner:
            yield Loop(symbol, tuple(text for _, text in code[start : end + 1]))


def llvm_version() -> int:
    """The newest of LLVM that is installed and has a model of every core.

    Raises FileNotFoundError when there is none.
    """
    for version in range(99, _OLDEST_LLVM - 1, -1):
        if shutil.which(f"llvm-mca-{version}") and shutil.which(f"llvm-objdump-{version}"):
            return version
    raise FileNotFoundError(f"not installed: llvm-{_OLDEST_LLVM} or newer")


def loops_of(objects: Path, llvm: int) -> list[Loop]:
    """The innermost loops of an object file; of functions that multiply, those which do."""
    command = [f"llvm-objdump-{llvm}", "-d", "--no-show-raw-insn", "--mattr=+dotprod", str(objects)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    loops = list(find_loops(text))
    multiplying = {loop.symbol for loop in loops if loop.products}
    return [loop for loop in loops if loop.products or loop.symbol not in multiplying]


def estimate_cycles(loop: Loop, core: str, llvm: int) -> float:
    """Cycles of one iteration by llvm-mca, many of them in a row."""
    # Addresses of branches and constants mean nothing here: all become one label.
    body = [re.sub(r"(#?0x)?[0-9a-f]+ <.*>", ".Lloop", line) for line in loop.body]
    source = "\n".join([".Lloop:", *(line.partition("//")[0] for line in body), ""])
    command = [f"llvm-mca-{llvm}", "-mtriple=aarch64", f"-mcpu={core}"]
    command += [f"-iterations={_ITERATIONS}"]
    result = subprocess.run(command, input=source, check=True, capture_output=True, text=True)
    found = re.search(r"Total Cycles:\s+(\d+)", result.stdout)
    assert found is not None
    return int(found[1]) / _ITERATIONS
