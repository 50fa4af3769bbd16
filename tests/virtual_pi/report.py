"""What the emulated boards told, from the logs of `make test-pi`: tables in Markdown.

PYTHONPATH=tests .venv/bin/python tests/virtual_pi/report.py
"""

from __future__ import annotations

import json
from collections.abc import Iterator

from virtual_pi.machine import LOGS, PI_4, PI_5, ZERO_2W, Record

MIB = 1 << 20


def records(log: str) -> Iterator[Record]:
    for line in (LOGS / f"{log}.log").read_text().splitlines():
        text = line[line.find("{") :]
        if "{" in line and text.endswith("}"):
            yield json.loads(text)


def print_row(*cells: object) -> None:
    print("| " + " | ".join(map(str, cells)) + " |")


def main() -> None:
    print_row(
        "board", "model", "levels", "weights in memory, at most", "peak growth of the process"
    )
    print_row(*["---"] * 5)
    for log, board in (
        *((f"levels_{board.name}", board) for board in (ZERO_2W, PI_4, PI_5)),
        ("vgg19_pi5", PI_5),
    ):
        runs = [record for record in records(log) if "level" in record]
        for model in dict.fromkeys(record["model"] for record in runs):
            own = [record for record in runs if record["model"] == model]
            levels = ", ".join(str(record["level"]) for record in own)
            peaks = (max(r[f"{key}_bytes"] for r in own) / MIB for key in ("weight", "growth"))
            print_row(board.model, model, levels, *(f"{peak:.1f} MiB" for peak in peaks))

    print()
    print_row("memory", "bits per weight", "weights", "process", "available", "in swap")
    print_row(*["---"] * 6)
    for log, kind in (("pressure_pi4", "no swap"), ("pressure_zram_zero2w", "zram")):
        stages = [record for record in records(log) if record.get("stage", "end") != "end"]
        least = min(stages, key=lambda record: record["weight_bytes"])
        for name, record in (("calm", stages[0]), ("eaten", least), ("free", stages[-1])):
            sizes = ("weight", "rss", "available", "swapped")
            cells = (f"{record[f'{key}_bytes'] / MIB:.0f} MiB" for key in sizes)
            print_row(f"{kind}, {name}", f"{record['bits']:.1f}", *cells)

    print()
    print_row("streaming", "computing alone", "reading alone", "streamed run", "ratio")
    print_row(*["---"] * 5)
    for name, record in zip(("64 tokens, level 8", "8 tokens, level 32"), records("streaming_pi4"),
                            strict=False):  # fmt: skip
        compute_s, io_s, run_s = (record[f"{key}_s"] for key in ("compute", "io", "run"))
        ratio = run_s / max(compute_s, io_s)
        print_row(name, *(f"{s:.2f} s" for s in (compute_s, io_s, run_s)), f"{ratio:.2f}")


if __name__ == "__main__":
    main()
