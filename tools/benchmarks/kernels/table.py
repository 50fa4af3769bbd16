"""Tables in Markdown of what was measured and estimated."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..arm.table import table
from .mca import CORES
from .peers import PEERS

__all__ = ["loops_table", "native_table"]


def native_table(machine: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> str:
    """Our kernels, what they use of the machine, and ONNX Runtime's for the same layer."""
    peaks = ", ".join(
        f"{value / 1e9:.0f} GMAC/s with {family}'s instructions"
        for family, value in machine["macs_per_s"].items()
        if value
    )
    head = (
        f"{machine['cpu']}, one thread on core {machine['core']}, {machine['runtime']}. At most: "
        f"{machine['bytes_per_s'] / 1e9:.1f} GB/s read from memory, int8 {peaks}."
    )
    heads = ("layer", "level", "kernels", "GMAC/s", "of peak", "GB/s", "of reading",
             "inputs", "in all", "ORT: time, ours over it")  # fmt: skip
    return f"{head}\n\n{table(heads, (_native_row(machine, record) for record in records))}\n"


def _native_row(machine: Mapping[str, Any], record: Mapping[str, Any]) -> list[str]:
    rows, columns, m = record["shape"]
    macs_per_s = rows * columns * m / record["products_s"]
    bytes_per_s = record["weight_bytes"] / record["products_s"]
    peak = machine["macs_per_s"][record["family"]] if record["level"] != 32 else 0.0
    ours_s = record["products_s"] + record["inputs_s"]
    return [
        f"{rows}×{columns}, {m}",
        str(record["level"]),
        record["family"],
        f"{macs_per_s / 1e9:.1f}",
        f"{macs_per_s / peak:.0%}" if peak else "",
        f"{bytes_per_s / 1e9:.1f}",
        f"{bytes_per_s / machine['bytes_per_s']:.0%}",
        _time(record["inputs_s"]),
        _time(ours_s),
        "; ".join(
            f"{PEERS[peer]} {_time(seconds)}, {ours_s / seconds:.2f}"
            for peer, seconds in record["peers_s"].items()
        ),
    ]


def _time(seconds: float) -> str:
    micros = seconds * 1e6
    return f"{micros:.0f} µs" if micros >= 100 else f"{micros:.1f} µs"


def loops_table(llvm: int, loops: Iterable[Mapping[str, Any]]) -> str:
    """Each inner loop: cycles of an iteration as llvm-mca has it, over what it needs at least."""
    head = f"llvm-mca {llvm}: cycles of one iteration (bound of its loads and multiplications)."
    heads = ("family", "function", "instructions", "loads", "spills", "multiply-adds", *CORES)
    rows = (
        [
            loop["family"],
            loop["function"],
            *(str(loop[key]) for key in ("instructions", "loads", "spills", "products")),
            *(
                f"{loop['cycles'][core]:.0f} ({loop['bound'][core]:.0f})"
                if core in loop["cycles"]
                else ""
                for core in CORES
            ),
        ]
        for loop in loops
    )
    return f"{head}\n\n{table(heads, rows)}\n"
