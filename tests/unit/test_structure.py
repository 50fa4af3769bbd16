"""The structure holds: imports point down, in no circle, and a file has one meaning.

Every import counts, also one inside a function or for the type checker: a reader follows it.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from bapq_edge.engine.library import Status

ROOT = Path(__file__).resolve().parents[2]

PACKAGES = {
    "bapq_edge": ROOT / "bapq_edge",
    "bapq_tools": ROOT / "tools" / "bapq_tools",
    "benchmarks": ROOT / "tools" / "benchmarks",
    "experiments": ROOT / "tools" / "experiments",
}
"""From the bottom: a package imports itself and those before it."""

ROOMS: dict[str, list[str]] = {
    "bapq_edge": [
        "errors",
        "units input_files runs_in_flight answers",
        "array_files",
        "sensors telemetry",
        "bank",
        "engine",
        "policy ort_api",
        "adaptive control",
        "planning",
        "options live",
        "internals",
        "session",
        "profiling doctor compat",
        "commands",
        "__init__ cli",
        "__main__",
    ],
    "bapq_tools": [
        "build_support",
        "onnx_graph",
        "calibration",
        "quantize",
        "recipe build_report signing",
        "build analyze report",
        "boundary",
        "row_skipping evaluation",
        "commands",
        "__init__",
    ],
}
"""From the bottom: a room imports itself and those on the lines before its own."""

DEVICE_NEEDS = {"bapq_edge", "numpy", "onnxruntime", "psutil", "yaml"}
DEVICE_MAY_USE = {"argcomplete", "cryptography"}
"""Only where they are installed, and only while the shell asks for completions, or where a bank
must be signed."""

MOST_LINES = 450


@cache
def modules_of(package: str) -> Mapping[str, Path]:
    """Path of every module by its full name."""
    folder = PACKAGES[package]
    names = {path.relative_to(folder.parent).with_suffix(""): path for path in folder.rglob("*.py")}
    return {".".join(name.parts).removesuffix(".__init__"): path for name, path in names.items()}


@cache
def imports_of(path: Path, name: str) -> frozenset[str]:
    """Full names of what a module imports: modules as far as it can be told from the sources."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    return frozenset(_imports(ast.parse(path.read_text()), package))


def _imports(tree: ast.Module, package: str) -> Iterator[str]:
    known = {module for each in PACKAGES for module in modules_of(each)}
    for statement in ast.walk(tree):
        if isinstance(statement, ast.Import):
            # A module's own package is loaded already; under its name it gives its path.
            own = package.partition(".")[0]
            yield from (alias.name for alias in statement.names if alias.name != own)
        elif isinstance(statement, ast.ImportFrom):
            above = package.split(".")[: package.count(".") + 2 - statement.level]
            parts = [*(above if statement.level else []), *filter(None, [statement.module])]
            for alias in statement.names:
                member = ".".join([*parts, alias.name])
                if member in known:
                    yield member
                elif not alias.name.startswith("__"):
                    yield ".".join(parts)


def imports_within(package: str) -> dict[str, set[str]]:
    """What every module of a package imports of the same package."""
    modules = modules_of(package)
    return {
        name: set(imports_of(path, name)) & set(modules) - {name} for name, path in modules.items()
    }


@pytest.mark.parametrize("package", PACKAGES)
def test_what_is_imported_of_the_project_is_there(package):
    known = {module for each in PACKAGES for module in modules_of(each)}
    missing = [
        f"{module} imports {other}"
        for module, path in modules_of(package).items()
        for other in imports_of(path, module)
        if other.partition(".")[0] in PACKAGES and other not in known
    ]
    assert sorted(missing) == []


@pytest.mark.parametrize("package", PACKAGES)
def test_no_modules_import_each_other_in_a_circle(package):
    try:
        TopologicalSorter(imports_within(package)).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(reversed(error.args[1])))


@pytest.mark.parametrize("package", ROOMS)
def test_rooms_import_only_what_lies_below(package):
    height = {room: line for line, rooms in enumerate(ROOMS[package]) for room in rooms.split()}

    def room_of(module: str) -> str:
        return module.split(".")[1] if "." in module else "__init__"

    assert {room_of(module) for module in modules_of(package)} == set(height)
    upward = [
        f"{module} imports {other}"
        for module, others in imports_within(package).items()
        for other in others
        if room_of(other) != room_of(module) and height[room_of(other)] >= height[room_of(module)]
    ]
    assert sorted(upward) == []


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_import_only_those_below(package):
    names = list(PACKAGES)
    above = {*names[names.index(package) + 1 :], "support"}
    upward = [
        f"{module} imports {other}"
        for module, path in modules_of(package).items()
        for other in imports_of(path, module)
        if other.partition(".")[0] in above
    ]
    assert sorted(upward) == []


def test_the_device_needs_few_packages():
    strange = [
        f"{module} imports {other}"
        for module, path in modules_of("bapq_edge").items()
        for other in imports_of(path, module)
        if other.partition(".")[0] not in DEVICE_NEEDS | DEVICE_MAY_USE | sys.stdlib_module_names
    ]
    assert sorted(strange) == []


def test_the_statuses_are_those_of_the_header():
    header = (ROOT / "native/include/bapq.h").read_text()
    enum = re.search(r"typedef enum \{(.*?)\} bapq_status;", header, re.DOTALL)[1]
    assert re.findall(r"BAPQ_(\w+)", re.sub(r"/\*.*?\*/", "", enum)) == [s.name for s in Status]
    assert [*Status] == [*range(len(Status))]


def test_tests_share_nothing_but_support():
    """A helper has one name: no test imports another one, or what lies beside it."""
    folder = ROOT / "tests"
    rooms = {path.stem for path in folder.iterdir()} | {path.stem for path in folder.glob("*/*.py")}
    strange = [
        f"{path.relative_to(ROOT)} imports {other}"
        for path in folder.rglob("*.py")
        for other in imports_of(path, ".".join(path.relative_to(folder).with_suffix("").parts))
        if other.partition(".")[0] in rooms - {"support"}
        and not (path.parent.name == "virtual_pi" and other.startswith("virtual_pi."))
    ]
    assert sorted(strange) == []


def test_files_can_be_read_in_one_go():
    paths = [
        path
        for folder in ("bapq_edge", "tools", "tests", "examples")
        for path in (ROOT / folder).rglob("*.py")
    ]
    lines = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in paths}
    assert {name: count for name, count in lines.items() if count > MOST_LINES} == {}
