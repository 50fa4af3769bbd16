"""The rooms of the host package import downwards only, and no two modules import each other."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[2] / "tools"

ROOMS = (
    ("__init__", "build_support"),
    ("onnx_graph",),
    ("calibration",),
    ("quantize",),
    ("recipe",),
    ("build", "analyze"),
    ("boundary",),
    ("row_skipping",),
    ("commands",),
)
"""From the bottom; a room is a module or a package. Those of one line do not import each other."""


def imports(package: str) -> dict[str, set[str]]:
    """Modules of a package, and what each imports from its own package at any place."""
    files = {
        ".".join(path.relative_to(TOOLS).with_suffix("").parts): path
        for path in (TOOLS / package).rglob("*.py")
    }
    found = {}
    for module, path in files.items():
        found[module] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                parent = module.split(".")[: -node.level] if node.level else []
                base = ".".join([*parent, *([node.module] if node.module else [])])
                names = {f"{base}.{alias.name}" for alias in node.names}
                found[module] |= {name if name in files else base for name in names}
        found[module] &= set(files)
    return found


@pytest.mark.parametrize("package", ["bapq_tools", "benchmarks"])
def test_no_modules_import_each_other(package):
    TopologicalSorter(imports(package)).prepare()  # raises CycleError


def test_rooms_import_downwards():
    height = {room: number for number, line in enumerate(ROOMS) for room in line}
    for module, imported in imports("bapq_tools").items():
        room = module.split(".")[1]
        for other in (name.split(".")[1] for name in imported):
            below = height[other] < height[room] or other == room
            assert below or room == "__init__", f"{module} imports from {other}"
