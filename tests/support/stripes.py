"""Images of stripes, and the direction that they run in: what the .tflite files were trained on."""

from __future__ import annotations

import numpy as np

SIZE = 24
CLASSES = 10


def stripes(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Images (count, 24, 24, 3) float32 from -1 to 1, and their classes (count,)."""
    random = np.random.default_rng(seed)
    classes = random.integers(0, CLASSES, count)
    angle = np.pi * classes / CLASSES
    y, x = np.mgrid[0:SIZE, 0:SIZE] / SIZE
    across = np.multiply.outer(np.cos(angle), x) + np.multiply.outer(np.sin(angle), y)
    waves, phase = random.uniform(3, 5, (count, 1, 1)), random.uniform(0, 7, (count, 1, 1))
    bright = np.sin(2 * np.pi * waves * across + phase)[..., None]
    colour = random.uniform(0.3, 1, (count, 1, 1, 3))
    noise = 0.3 * random.standard_normal((count, SIZE, SIZE, 3))
    return np.clip(bright * colour + noise, -1, 1).astype(np.float32), classes
