"""Fewer bits on a low battery: the controller follows the sensors; here a mock plays a trace."""

import os
import tempfile
import time
from pathlib import Path

import banks

import bapq_edge

TRACE = """time_s,battery_percent,on_battery
0,80,1
1.5,25,1
3,10,1
"""
bank, images, _ = banks.digits()
with tempfile.TemporaryDirectory() as folder:
    trace = Path(folder, "trace.csv")
    trace.write_text(TRACE)
    os.environ.setdefault("BAPQ_SENSORS", f"mock:{trace}")
    with bapq_edge.Session(bank, controller="auto") as session:
        session.on_switch = print
        end_s = time.monotonic() + 5
        while time.monotonic() < end_s:
            session.run(None, {"image": images[:1]})
            time.sleep(0.02)
        print(f"{session.stats().planned_bits_per_weight:.0f} bits per weight at the end")
