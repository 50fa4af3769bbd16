"""Classify what a camera sees, or the images of a file: 04_camera.py [IMAGES.npy]."""

import importlib.util
import sys
import time

import banks
import numpy as np

import bapq_edge

bank, images, _ = banks.digits()


def frames():
    """Grey images of 8x8 pixels in 0..1, as the model was trained on."""
    if len(sys.argv) > 1:
        yield from np.load(sys.argv[1])
    elif importlib.util.find_spec("picamera2") is None:
        yield from images[:20, 0]
    else:
        from picamera2 import Picamera2

        with Picamera2() as camera:
            camera.start()
            while True:  # the middle 480x480 of the picture, by the mean of blocks
                grey = camera.capture_array()[:480, 80:560, :3].mean(axis=2) / 255
                yield 1 - grey.reshape(8, 60, 8, 60).mean(axis=(1, 3))


with bapq_edge.Session(bank, level=4, threads=1) as session:
    for frame in frames():
        started_s = time.perf_counter()
        (logits,) = session.run(None, {"image": np.float32(frame)[None, None]})
        print(f"{logits.argmax()} in {(time.perf_counter() - started_s) * 1e3:.2f} ms")
