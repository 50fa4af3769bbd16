"""Hear when somebody speaks: a stream of sound, a trained detector of voices, its state kept."""

import banks
import numpy as np

import bapq_edge

bank = banks.voice()
from benchmarks.zoo.voice import FRAME, RATE_HZ, frames, room, voice  # noqa: E402

QUIET_S = 0.25  # a pause within speech is shorter

sound = room(4.0, seed=1)  # a microphone would give such values, a frame of 32 ms at a time
sound[2 * RATE_HZ : int(2.9 * RATE_HZ)] += voice(0.9, seed=1)
state, rate = np.zeros((2, 1, 128), np.float32), np.array(RATE_HZ, np.int64)
since_s = last_s = None
with bapq_edge.Session(bank, level=8, threads=1) as session:
    for i, frame in enumerate(frames(sound)):
        now_s = i * FRAME / RATE_HZ
        chance, state = session.run(None, {"input": frame[None], "state": state, "sr": rate})
        if chance[0, 0] > 0.5:
            since_s, last_s = since_s if since_s is not None else now_s, now_s
        elif since_s is not None and now_s - last_s > QUIET_S:
            print(f"a voice from {since_s:.1f} to {last_s:.1f} s")
            since_s = None
    print(f"{i + 1} frames, {session.stats().resident_bytes >> 10} KiB of weights in memory")
