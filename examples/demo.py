"""`make demo`: compile a bundled model into a bank, then run it at every level and under a budget.

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
BUDGET = "24MiB"


def build() -> None:
    """ONNX model + calibration images -> bank."""
    import bapq_tools
    from benchmarks.zoo.digits import calibration_npz, load_digits_split

    split = load_digits_split()
    np.savez(WORK / "test.npz", image=split.x_test, label=split.y_test)
    calibration_npz(WORK / "calibration.npz", "cnn")
    bapq_tools.build_bank(MODEL, BANK, calibration=WORK / "calibration.npz")


def measure(runtime: str, precision: str) -> dict[str, object]:
    """Run all test images one by one in this process; latency is the median."""
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
    elif precision.endswith("MiB"):
        session = bapq_edge.Session(BANK, memory_budget=precision, threads=1)
    else:
        session = bapq_edge.Session(BANK, level=precision, threads=1)
    answers, times_ms = [], []
    for i in range(len(images)):
        started = time.perf_counter()
        (logits,) = session.run(None, {"image": images[i : i + 1]})
        times_ms.append((time.perf_counter() - started) * 1e3)
        answers.append(int(logits.argmax()))
    bits, weight_bytes = 32.0, MODEL.stat().st_size
    if runtime == "bapq":
        stats = session.stats()
        bits, weight_bytes = stats.bits_per_weight, stats.resident_bytes
    return {
        "runtime": runtime,
        "precision": precision,
        "bits": bits,
        "weight_bytes": weight_bytes,
        "peak_bytes": peak_rss_bytes() - before_bytes,
        "latency_ms": statistics.median(times_ms),
        "accuracy": float((np.array(answers) == labels).mean()),
        "answers": answers,
    }


def main() -> None:
    """Build, measure each row in a process of its own, print the table."""
    from bapq_edge.units import format_size

    WORK.mkdir(parents=True, exist_ok=True)
    build()
    precisions = [("onnxruntime", "fp32"), *(("bapq", level) for level in "8421"), ("bapq", BUDGET)]
    rows = []
    for runtime, precision in precisions:
        command = [sys.executable, __file__, runtime, precision]
        result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        rows.append(json.loads(result.stdout))
    reference = rows[0]["answers"]
    print("\ndigits CNN, 600 test images, 1 thread; each row is a process of its own")
    print(
        f"{'runtime':12}  {'asked for':12}  {'bits':>5}  {'weights':>9}  {'process grew':>12}  "
        f"{'per image':>10}  {'accuracy':>8}  as fp32"
    )
    for row in rows:
        precision = row["precision"] if len(row["precision"]) > 1 else f"level {row['precision']}"
        same = sum(a == b for a, b in zip(row["answers"], reference, strict=True))
        print(
            f"{row['runtime']:12}  {precision:12}  {row['bits']:5.2f}  "
            f"{format_size(row['weight_bytes']):>9}  {format_size(row['peak_bytes']):>12}  "
            f"{row['latency_ms']:7.3f} ms  {row['accuracy']:8.2%}  {same}/{len(reference)}"
        )
    print("\nThis model is small: nearly all of what the process grew by is ONNX Runtime itself.")
    print(f"The bank is {BANK.relative_to(REPOSITORY)}: try `bapq inspect` on it.")


if __name__ == "__main__":
    if len(sys.argv) == 3:
        print(json.dumps(measure(*sys.argv[1:])))
    else:
        main()
