"""Joules of a run, beyond what the idle board draws; without a meter, a mock of 2 and 5 W."""

import tempfile
from pathlib import Path

import banks

import bapq_edge
from bapq_edge.profiling import Meter
from bapq_edge.sensors import MockSensors, open_sensors

RUNS = 2000
sensors = open_sensors(vcgencmd_period_s=0.2)
if sensors.read().power_source is None:
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.csv")
        trace.write_text("time_s,power_w\n0,2\n2,5\n")
        sensors = MockSensors(trace)

bank, images, _ = banks.digits()
with bapq_edge.Session(bank, level=4, threads=1) as session, Meter(sensors=sensors) as meter:
    meter.measure_idle(2.0)
    with meter.window("runs"):
        for _ in range(RUNS):
            session.run(None, {"image": images[:8]})
print(meter.windows[0])
print(meter.windows[0].energy_per_run(RUNS))
