"""Sound with and without a voice in it, and the trained detector of voices that is tried on it.

A voice is made as speech is: pulses of the vocal cords, with a pitch that rises and falls, through
resonators that move from vowel to vowel. The detector is Silero's, out of its package.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnxruntime import InferenceSession, SessionOptions
from scipy.signal import lfilter

__all__ = [
    "FRAME",
    "RATE_HZ",
    "conversation",
    "detector_path",
    "frames",
    "listen",
    "open_detector",
    "room",
    "voice",
]

RATE_HZ = 16_000
FRAME = 512
"""Values of a frame; the detector wants the last 64 of the frame before in front of them."""
_CONTEXT = 64

_VOWELS = (
    (730, 1090, 2440),
    (270, 2290, 3010),
    (300, 870, 2240),
    (530, 1840, 2480),
    (570, 840, 2410),
)
"""Resonances in Hz: means of men's vowels (Peterson and Barney, 1952)."""

_REPOSITORY = Path(__file__).resolve().parents[3]

Sound = NDArray[np.float32]


def detector_path(repository: Path = _REPOSITORY) -> Path:
    """The detector: $BAPQ_SILERO_DIR, else where the Makefile puts it.

    Raises FileNotFoundError when it is not there.
    """
    cached = repository / ".cache" / "silero" / "silero_vad" / "data"
    path = Path(os.environ.get("BAPQ_SILERO_DIR", cached)) / "silero_vad_16k_op15.onnx"
    if not path.is_file():
        raise FileNotFoundError(f"no {path}; fetch it with: make .cache/silero/.ready")
    return path


def room(seconds: float, seed: int) -> Sound:
    """A room without a voice, (values,) in -1..1: noise that is stronger in the bass."""
    rng = np.random.default_rng(seed)
    white = rng.standard_normal(round(seconds * RATE_HZ))
    return np.asarray(0.01 * lfilter([0.1], [1, -0.9], white), np.float32)


def voice(seconds: float, seed: int) -> Sound:
    """Syllables of one voice, (values,) in -1..1."""
    rng = np.random.default_rng(seed)
    count = round(seconds * RATE_HZ)
    pitch_hz = rng.uniform(95, 210) * (1 + 0.15 * np.sin(2 * np.pi * 1.3 * _times(count)))
    pulses = np.diff(np.floor(np.cumsum(pitch_hz) / RATE_HZ), prepend=0)
    source = lfilter([1], [1, -0.95], pulses) + 0.02 * rng.standard_normal(count)
    sound = np.zeros(count)
    length = round(0.18 * RATE_HZ)
    for start in range(0, count, length):
        part = slice(start, min(start + length, count))
        tube = source[part]
        for resonance_hz in _VOWELS[rng.integers(len(_VOWELS))]:
            tube = _resonate(tube, float(resonance_hz), 60 + 0.04 * resonance_hz)
        rise = np.sin(np.pi * np.linspace(0, 1, len(tube))) ** 0.5
        sound[part] = tube / max(np.abs(tube).max(), 1e-9) * rise
    return np.asarray(0.3 * sound, np.float32)


def frames(sound: Sound) -> Sound:
    """(frames, 576): the frames of a sound, each behind the end of the one before."""
    whole = np.concatenate([np.zeros(_CONTEXT, np.float32), sound])
    count = len(sound) // FRAME
    return np.stack([whole[i * FRAME : (i + 1) * FRAME + _CONTEXT] for i in range(count)])


def conversation(seeds: Iterable[int], seconds: float = 0.8) -> Sound:
    """Voices of these seeds, each behind as long a silence, (values,) in -1..1."""
    return np.concatenate([np.r_[room(seconds, seed), voice(seconds, seed)] for seed in seeds])


def open_detector(path: str | Path) -> InferenceSession:
    """The detector in ONNX Runtime, on one thread and without its warnings."""
    options = SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3  # errors only
    return InferenceSession(path, options)


def listen(run: Callable[..., Any], sound: Sound) -> Iterator[tuple[dict[str, Any], float]]:
    """What the detector is fed with, frame by frame, and the chance of a voice that it tells.

    `run` is that of any session; the state of a frame is what the one before left.
    """
    state, rate_hz = np.zeros((2, 1, 128), np.float32), np.array(RATE_HZ, np.int64)
    for frame in frames(sound):
        feed = {"input": frame[None], "state": state, "sr": rate_hz}
        chance, state = run(None, feed)
        yield feed, float(chance[0, 0])


def _times(count: int) -> NDArray[np.float64]:
    return np.arange(count) / RATE_HZ


def _resonate(sound: NDArray[np.float64], at_hz: float, width_hz: float) -> NDArray[np.float64]:
    radius = np.exp(-np.pi * width_hz / RATE_HZ)
    turn = 2 * np.pi * at_hz / RATE_HZ
    return np.asarray(lfilter([1 - radius], [1, -2 * radius * np.cos(turn), radius**2], sound))
