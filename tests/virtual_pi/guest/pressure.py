"""On the board: a session that follows the board's memory, while another program eats it.

Usage: pressure.py BANK INPUT.npz PROFILE.yaml KEEP_MIB

The eater takes memory until KEEP_MIB are available and keeps it so, whatever we give back, for a
while; then it gives all back. Records: `calm`, `eaten`, `free` again; and `end`.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time

import numpy as np
import psutil

import bapq_edge

EATER = """
import os, sys, time
keep_bytes, hold_s = int(sys.argv[1]), float(sys.argv[2])
def available_bytes():
    lines = open("/proc/meminfo").read().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))
eaten, block, end_s = [], os.urandom(1 << 20), None
while end_s is None or time.monotonic() < end_s:
    if available_bytes() > keep_bytes:
        eaten.append(bytearray(block))
    else:
        end_s = end_s or time.monotonic() + hold_s
        time.sleep(0.2)
print(len(eaten), flush=True)
"""
HOLD_S = 10.0
PATIENCE_S = 90.0


def main(bank: str, source: str, profile: str, keep_mib: str) -> None:
    """One record per stage."""
    feed = dict(np.load(source))
    with bapq_edge.Session(bank, controller="auto", profile=profile) as session:

        def tell(stage: str) -> np.ndarray:
            answer = session.run(None, feed)[0]
            stats, process = session.stats(), psutil.Process().memory_full_info()
            record = {
                "stage": stage,
                "bits": stats.planned_bits_per_weight,
                "weight_bytes": stats.resident_bytes,
                "rss_bytes": process.rss,
                "swapped_bytes": process.swap,
                "available_bytes": psutil.virtual_memory().available,
                "swap_used_bytes": psutil.swap_memory().used,
            }
            print(json.dumps(record), flush=True)
            return answer

        session.run(None, feed)
        calm = tell("calm")
        command = [sys.executable, "-I", "-S", "-c", EATER, str(int(keep_mib) << 20), str(HOLD_S)]
        eater = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        runs, finite, least = 0, True, session.stats()
        while eater.poll() is None:
            answer = session.run(None, feed)[0]
            runs, finite = runs + 1, finite and bool(np.isfinite(answer).all())
            stats = session.stats()
            if stats.resident_bytes < least.resident_bytes:
                least = stats
                tell("eaten")
        eaten_mib = int(eater.communicate()[0] or 0)
        deadline_s = time.monotonic() + PATIENCE_S
        while session.stats().planned_bits_per_weight < 8 and time.monotonic() < deadline_s:
            session.run(None, feed)
        free = tell("free")
        record = {
            "stage": "end",
            "eater_exit": eater.returncode,
            "eaten_mib": eaten_mib,
            "runs": runs,
            "finite": finite,
            "same_answer": bool(np.array_equal(calm, free)),
            "switches": [event.reason for event in session.events() if event.kind == "switch"],
        }
        print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
