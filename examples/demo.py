"""`make demo`: compile a bundled model into a bank, then run it under ever smaller budgets.

Every row of the table is a process of its own, so that its peak memory is its own too.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

REPOSITORY = Path(__file__).resolve().parents[1]
MODEL = REPOSITORY / "examples" / "models" / "digits_cnn.onnx"
WORK = REPOSITORY / ".cache" / "demo"
BANK = WORK / "digits_cnn.bank"
REPEATS = 200


def build() -> None:
    """ONNX model + calibration images -> bank."""
    import bapq_tools
    from bapq_tools.zoo.digits import calibration_npz, load_digits_split

    split = load_digits_split()
    np.savez(WORK / "test.npz", image=split.x_test, label=split.y_test)
    calibration_npz(WORK / "calibration.npz", "cnn")
    bapq_tools.build_bank(MODEL, BANK, calibration=WORK / "calibration.npz")


def measure(runtime: str, budget: str) -> dict[str, object]:
    """Run all test images in this process; latency is of one image at a time."""
    import onnxruntime

    import bapq_edge
    from bapq_edge.telemetry import peak_rss_bytes, rss_bytes

    with np.load(WORK / "test.npz") as data:
        images, labels = data["image"], data["label"]
    before_bytes = rss_bytes()
    if runtime == "onnxruntime":
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        session = onnxruntime.InferenceSession(str(MODEL), options)
        level, weight_bytes = "fp32", MODEL.stat().st_size
    else:
        session = bapq_edge.Session(BANK, memory_budget=budget, threads=1)
        level, weight_bytes = session.stats().level, session.stats().resident_bytes
    logits = session.run(None, {"image": images})[0]
    times_ms = []
    for i in range(REPEATS):
        started = time.perf_counter()
        session.run(None, {"image": images[i : i + 1]})
        times_ms.append((time.perf_counter() - started) * 1e3)
    return {
        "runtime": runtime,
        "budget": budget,
        "level": level,
        "weight_bytes": weight_bytes,
        "peak_bytes": peak_rss_bytes() - before_bytes,
        "latency_ms": statistics.median(times_ms),
        "accuracy": float((logits.argmax(1) == labels).mean()),
        "answers": logits.argmax(1).tolist(),
    }


def main() -> None:
    """Build, measure each runtime and budget in a process of its own, print the table."""
    from bapq_edge import Session
    from bapq_edge.units import format_size

    WORK.mkdir(parents=True, exist_ok=True)
    build()
    with Session(BANK) as session:
        levels = session._bank.levels
        budgets = [str(session._bank.weight_bytes(level)) for level in levels]
    rows = []
    for runtime, budget in [("onnxruntime", "none"), *(("bapq", budget) for budget in budgets)]:
        command = [sys.executable, __file__, runtime, budget]
        result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        rows.append(json.loads(result.stdout))
    reference = rows[0]["answers"]
    print("\ndigits CNN, 600 test images, 1 thread; each row is a process of its own")
    print(
        "runtime       budget      level   weights    process grew   per image   accuracy  as fp32"
    )
    for row in rows:
        budget = row["budget"] if row["budget"] == "none" else format_size(int(row["budget"]))
        same = sum(a == b for a, b in zip(row["answers"], reference, strict=True))
        print(
            f"{row['runtime']:12}  {budget:10}  {row['level']!s:>5}  "
            f"{format_size(row['weight_bytes']):>9}  {format_size(row['peak_bytes']):>12}  "
            f"{row['latency_ms']:7.3f} ms  {row['accuracy']:8.2%}  {same}/{len(reference)}"
        )
    print(f"\nThe bank is {BANK.relative_to(REPOSITORY)}: try `bapq inspect` on it.")


if __name__ == "__main__":
    if len(sys.argv) == 3:
        print(json.dumps(measure(*sys.argv[1:])))
    else:
        main()
