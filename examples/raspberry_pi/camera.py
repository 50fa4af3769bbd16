"""Classify what the camera sees: while one frame is captured, the one before it is answered."""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from concurrent.futures import Future

import numpy as np

import bapq_edge

LEAST_PIXELS = 128
"""sides of a frame: cameras do not scale down to the few pixels of a small model"""


def prepare(
    frame: np.ndarray, shape: tuple[int, int, int], mean: np.ndarray, std: np.ndarray
) -> np.ndarray:
    """(rows, columns, 3) uint8, RGB, to (1, C, H, W) float32, by the mean of each block of pixels.

    C is 3, or 1 for grey; what is over at the edges is cut off. `mean` and `std` are of values in
    0..1, one or one per channel.
    """
    channels, height, width = shape
    scale = min(frame.shape[0] // height, frame.shape[1] // width)
    blocks = frame[: height * scale, : width * scale, :3].astype(np.float32)
    blocks = blocks.reshape(height, scale, width, scale, 3).mean(axis=(1, 3)) / 255
    if channels == 1:
        blocks = blocks @ np.array([[0.299], [0.587], [0.114]], np.float32)  # luma, BT.601
    image = (blocks - mean) / std
    return np.ascontiguousarray(image.transpose(2, 0, 1)[None], np.float32)


def probabilities(scores: np.ndarray) -> np.ndarray:
    """The softmax of logits; what is a distribution already stays."""
    scores = scores.ravel().astype(np.float64)
    if scores.min() >= 0 and abs(scores.sum() - 1) < 1e-3:
        return scores
    grown = np.exp(scores - scores.max())
    return grown / grown.sum()


def input_of(session: bapq_edge.Session) -> tuple[str, tuple[int, int, int]]:
    """Name of the one input, and its (C, H, W)."""
    inputs = session.get_inputs()
    shape = tuple(inputs[0].shape[1:])
    sizes = all(isinstance(size, int) for size in shape)
    if len(inputs) != 1 or len(shape) != 3 or not sizes or shape[0] not in (1, 3):
        found = ", ".join(f"{value.name} {value.shape}" for value in inputs)
        sys.exit(f"camera: the model takes {found}; it must be one image (1, C, H, W), C 1 or 3")
    return inputs[0].name, shape


def watch(session: bapq_edge.Session, options: argparse.Namespace) -> None:
    """Capture, answer and print, `options.frames` times; 0 is without end."""
    name, shape = input_of(session)
    mean, std = np.array(options.mean, np.float32), np.array(options.std, np.float32)
    try:
        from picamera2 import Picamera2
    except ImportError:
        sys.exit(
            "camera: picamera2 is missing: sudo apt install -y python3-picamera2, "
            "and make the environment with --system-site-packages"
        )
    scale = -(-LEAST_PIXELS // min(shape[1:]))
    size = (shape[2] * scale, shape[1] * scale)
    camera = Picamera2()
    # picamera2 names formats from the last byte to the first: this one is R, G, B in memory.
    camera.configure(camera.create_video_configuration({"size": size, "format": "BGR888"}))
    camera.start()
    started_s = time.monotonic()

    def show(number: int, answer: Future[list[np.ndarray]]) -> None:
        chances = probabilities(answer.result()[0])
        label = int(chances.argmax())
        print(
            f"{number:6}  label {label:4}  {chances[label]:6.1%}  "
            f"{session.stats().bits_per_weight:5.2f} bits  "
            f"{number / (time.monotonic() - started_s):6.1f} frames/s",
            flush=True,
        )

    pending: Future[list[np.ndarray]] | None = None
    try:
        for number in range(options.frames) if options.frames else itertools.count():
            frame = camera.capture_array("main")  # the one before it is answered meanwhile
            image = prepare(frame, shape, mean, std)
            if pending is not None:
                show(number, pending)
            pending = session.submit(None, {name: image})
        if pending is not None:
            show(options.frames, pending)
    finally:
        camera.stop()


def main() -> int:
    """Parse the command line, open the bank, watch."""
    parser = argparse.ArgumentParser(description="classify what the camera sees")
    parser.add_argument("bank", help="of a model with one input (1, C, H, W), C 1 or 3")
    parser.add_argument("--budget", default="64MiB", help="what the process may grow by")
    parser.add_argument("--frames", type=int, default=0, help="stop after so many (0: Ctrl-C)")
    parser.add_argument("--mean", type=float, nargs="+", default=[0.0], help="one, or per channel")
    parser.add_argument("--std", type=float, nargs="+", default=[1.0], help="one, or per channel")
    options = parser.parse_args()
    try:
        with bapq_edge.Session(
            options.bank, memory_budget=options.budget, controller="auto"
        ) as session:
            watch(session, options)
    except bapq_edge.BapqError as error:
        print(f"camera: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
