"""What a memory budget gives and costs: part of `make bench`.

    PYTHONPATH=tools python -m benchmarks.streaming [SECTION ...] [--format table|md|json]

Each measurement is a process of its own; docs/explanation/measuring.md says how each is
made. Models and banks are those of `models.py`, in .cache/bench; what is missing there is built.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .cgroups import GroupError, memory_group, slow_reads_group, within
from .models import WORK
from .tables import add_format, add_names, format_mib, print_table

BUDGETS = {"vgg19": "64MiB", "resnet50": "32MiB", "minilm": "16MiB", "densenet121": "32MiB"}
STORAGE_BYTES_S = 40_000_000
LOAD_ROUNDS = 9
LIMIT_BYTES = 160_000_000
FLEXNN = (
    "For comparison, as FlexNN's authors published it (MobiCom 2024, float32 on ncnn; not measured "
    "by us): 93.81 % less memory at 1.036 times the time on a phone; on a Pi 4B, ResNet-152 in "
    "about 40 MB at about 1.4 times and VGG-19 in about 60 MB at about 2.1 times."
)


@dataclass
class Section:
    """One table, or why there is none."""

    title: str
    heads: tuple[str, ...] = ()
    rows: list[list[str]] = field(default_factory=list)
    values: list[dict[str, Any]] = field(default_factory=list)
    note: str = ""

    def print(self, style: str) -> None:
        """In the style `table` or `md`."""
        if self.rows:
            print_table(self.title, self.heads, self.rows, style)
        if self.note:
            print(f"{self.note}\n")


def budgets() -> Section:
    """Peak memory and time of the models in their budgets."""
    heads = ("model", "budget", "growth", "ORT fp32", "less", "read per run", "time", "on one core")
    section = Section("Level 8 in a budget: growth of the peak over 12 runs, one thread", heads)
    for name, budget in BUDGETS.items():
        _read_anew(WORK / name / "model.bank")
        streamed = _measure("peak", name, "8", budget)
        resident = _measure("peak", name, "8", "none")
        fp32 = _measure("peak", name, "fp32", "none")
        if streamed["digests"] != resident["digests"]:
            raise AssertionError(f"{name} in {budget}: streamed outputs differ")
        two, one = (_measure("ratio", name, budget, cores) for cores in ("all", "one"))
        growth, fp32_growth = streamed["growth_bytes"], fp32["growth_bytes"]
        section.values.append(
            {
                "model": name,
                "budget": budget,
                "growth_bytes": growth,
                "resident_growth_bytes": resident["growth_bytes"],
                "fp32_growth_bytes": fp32_growth,
                "two_cores": two,
                "one_core": one,
            }
        )
        section.rows.append(
            [
                name,
                budget.replace("MiB", " MiB"),
                format_mib(growth),
                format_mib(fp32_growth),
                f"{1 - growth / fp32_growth:.1%}",
                format_mib(two["read_bytes"]),
                f"{two['ratio']:.2f}",
                f"{one['ratio']:.2f}",
            ]
        )
    return section


def cold() -> Section:
    """Time where storage is slow and nothing is cached."""
    heads = ("model", "budget", "read per run", "reading", "computing", "run", "over the longer")
    title = "Storage of 40 MB/s, past the page cache: time of a run, in a row of runs"
    section = Section(title, heads)
    try:
        with slow_reads_group(WORK, STORAGE_BYTES_S) as group:
            for name in ("vgg19", "resnet50"):
                found = _measure("cold", name, BUDGETS[name], group=group)
                reading_s = found["read_bytes"] / STORAGE_BYTES_S
                over = found["run_s"] / max(reading_s, found["compute_s"])
                section.values.append({"model": name, "budget": BUDGETS[name], **found})
                times = (reading_s, found["compute_s"], found["run_s"])
                section.rows.append(
                    [
                        name,
                        BUDGETS[name].replace("MiB", " MiB"),
                        format_mib(found["read_bytes"]),
                        *(f"{s:.2f} s" for s in times),
                        f"{over:.2f}",
                    ]
                )
    except GroupError as error:
        section.note = f"cold: skipped: {error}"
    return section


def load() -> Section:
    """Time to the first answer."""
    section = Section(
        "Opening and the first answer, files in the page cache, one thread",
        ("model", "level 8 over ORT fp32"),
    )
    for name in ("resnet50", "minilm"):
        rounds = [
            [_measure("load", name, runtime) for runtime in ("8", "fp32")]
            for _ in range(LOAD_ROUNDS + 1)
        ]
        # The first round brings the files into the page cache.
        ours_s, fp32_s = map(statistics.median, zip(*rounds[1:], strict=True))
        section.values.append({"model": name, "level_8_s": ours_s, "fp32_s": fp32_s})
        section.rows.append([name, f"{ours_s / fp32_s:.2f}"])
    return section


def switch() -> Section:
    """Level 8 to 4 and back."""
    heads = ("model", "8 to 4: freed", "median", "slowest", "read", "4 to 8: read", "plane r8")
    section = Section("Switching a session with all weights resident", heads)
    for name in ("vgg19", "resnet50"):
        found = _measure("switch", name)
        section.values.append({"model": name, **found})
        section.rows.append(
            [
                name,
                format_mib(found["freed_bytes"]),
                *(f"{found[key] * 1e3:.1f} ms" for key in ("down_s", "slowest_down_s")),
                f"{found['read_down_bytes']} bytes",
                format_mib(found["read_up_bytes"]),
                format_mib(found["plane_bytes"]),
            ]
        )
    return section


def limit() -> Section:
    """A control group that cannot hold the float32 model."""
    section = Section(
        f"vgg19 in a control group of {LIMIT_BYTES / 1e6:.0f} MB for the whole process, no swap",
        ("runtime", "outcome"),
    )
    expected = _measure("answer", "vgg19", "8", "none")
    try:
        for runtime, budget in (("8", BUDGETS["vgg19"]), ("fp32", "none")):
            with memory_group(LIMIT_BYTES) as group:
                command = within(group, _command("answer", "vgg19", runtime, budget))
                ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
            if ended.returncode == -signal.SIGKILL:
                outcome = "killed (exit -9)"
            elif ended.returncode:
                raise subprocess.CalledProcessError(ended.returncode, command)
            elif runtime == "8" and json.loads(ended.stdout) != expected:
                raise AssertionError("vgg19 under a memory limit: the answer differs")
            else:
                outcome = "answers"
            label = "ORT fp32" if runtime == "fp32" else f"level 8, memory_budget {budget}"
            section.values.append({"runtime": label, "exit": ended.returncode})
            section.rows.append([label, outcome])
    except GroupError as error:
        section.note = f"limit: skipped: {error}"
    return section


def peers() -> Section:
    """The figures that the nearest published work states."""
    return Section("", note=FLEXNN)


SECTIONS: dict[str, Callable[[], Section]] = {
    f.__name__: f for f in (budgets, cold, load, switch, limit, peers)
}


def main() -> int:
    """Measure and print; 0, or 1 when a measurement failed."""
    parser = argparse.ArgumentParser(prog="benchmarks.streaming", description=__doc__)
    add_names(parser, SECTIONS, "section")
    add_format(parser, "json")
    arguments = parser.parse_args()
    results = {}
    try:
        for name in BUDGETS:
            if not (WORK / name / "single.npz").exists():
                print(f"building {name}", file=sys.stderr)
                module = "benchmarks.measure"
                command = [sys.executable, "-m", module, "build", str(WORK / name)]
                subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        for name in arguments.names or SECTIONS:
            print(f"measuring {name}", file=sys.stderr)
            results[name] = SECTIONS[name]()
            if arguments.format != "json":
                results[name].print(arguments.format)
                sys.stdout.flush()
    except subprocess.CalledProcessError as error:
        print(f"benchmarks.streaming: failed: {' '.join(error.cmd)}", file=sys.stderr)
        return 1
    if arguments.format == "json":
        found = {name: section.values or section.note for name, section in results.items()}
        print(json.dumps(found, indent=1))
    return 0


def _command(kind: str, model: str, *arguments: str) -> list[str]:
    module = "benchmarks.measure_streaming"
    return [sys.executable, "-m", module, kind, str(WORK / model), *arguments]


def _measure(kind: str, model: str, *arguments: str, group: Path | None = None) -> Any:
    command = _command(kind, model, *arguments)
    if group is not None:
        command = within(group, command)
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output)


def _read_anew(bank: Path) -> None:
    """Into the page cache as from a board's disk: in large blocks, not in those of its writing."""
    for path in bank.rglob("*.bin"):
        with path.open("rb") as file:
            os.fsync(file)
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            while file.read(1 << 20):
                pass


if __name__ == "__main__":
    raise SystemExit(main())
