"""The device package is built in layers: an import points down, or stays in its own room."""

from __future__ import annotations

import ast
from pathlib import Path

import bapq_edge

PACKAGE = Path(bapq_edge.__file__).parent

LAYERS = (  # from the bottom
    {"errors"},
    {"units"},
    {"sensors", "telemetry"},
    {"bank"},
    {"engine"},
    {"policy"},
    {"adaptive", "control"},
    {"options", "planning"},
    {"internals"},
    {"session"},
    {"profiling", "doctor"},
    {"commands"},
    {"cli"},
)
HEIGHT = {room: height for height, rooms in enumerate(LAYERS) for room in rooms}


def modules():
    """{dotted name below the package: path}"""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return {name: path for name, path in found.items() if name not in ("", "__main__")}


def imports(name, path):
    """What a module imports of the package, by dotted name; for type checkers alone, too."""
    package = ["", *name.split(".")] if path.stem == "__init__" else ["", *name.split(".")[:-1]]
    known = modules()
    for statement in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(statement, ast.ImportFrom):
            if statement.level:
                base = package[1 : len(package) - statement.level + 1]
            elif (statement.module or "").split(".")[0] == "bapq_edge":
                base = []
            else:
                continue
            source = [*base, *(statement.module or "").removeprefix("bapq_edge").split(".")]
            source = [part for part in source if part]
            for alias in statement.names:
                inner = ".".join([*source, alias.name])
                target = inner if inner in known else ".".join(source)
                if target:
                    yield target


def test_every_module_has_a_place():
    assert {name.split(".")[0] for name in modules()} == set(HEIGHT)


def test_imports_point_down():
    upward = []
    for name, path in modules().items():
        room = name.split(".")[0]
        for target in imports(name, path):
            other = target.split(".")[0]
            if other != room and HEIGHT[other] >= HEIGHT[room]:
                upward.append(f"{name} imports {target}")
    assert not upward
