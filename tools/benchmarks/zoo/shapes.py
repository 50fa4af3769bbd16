"""Images of shapes on coloured grounds, in ten classes: what the MobileNets are trained on here."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["CLASSES", "SIZE", "shapes"]

SIZE = 96
CLASSES = 10


def shapes(count: int, seed: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Images (count, 96, 96, 3) from -1 to 1, and their classes (count,)."""
    random = np.random.default_rng(seed)
    classes = random.integers(0, CLASSES, count)
    images = np.stack([_image(random, int(each)) for each in classes])
    return images, classes


def _image(random: np.random.Generator, kind: int) -> NDArray[np.float32]:
    y, x = np.mgrid[0:SIZE, 0:SIZE] / SIZE
    slopes = random.uniform(-0.4, 0.4, (2, 3))
    image = x[..., None] * slopes[0] + y[..., None] * slopes[1] + random.uniform(-0.3, 0.3, 3)
    for _ in range(random.integers(1, 4)):  # what else lies there
        u, v = x - random.uniform(), y - random.uniform()
        image[u * u + v * v < random.uniform(0.01, 0.05)] += random.uniform(-0.3, 0.3, 3)
    u, v = x - random.uniform(0.3, 0.7), y - random.uniform(0.3, 0.7)
    image[_mask(kind, u, v, random.uniform(0.14, 0.28))] = random.choice([-0.9, 0.9], 3)
    image += random.normal(0, 0.1, image.shape)
    return np.clip(image, -1, 1).astype(np.float32)


def _mask(
    kind: int, u: NDArray[np.float64], v: NDArray[np.float64], size: float
) -> NDArray[np.bool_]:
    """Where the shape of that class is, u to the right and v down from its middle."""
    across, down, round_ = np.abs(u), np.abs(v), np.hypot(u, v)
    masks = (
        round_ < size,
        (across < size) & (down < size),
        across + down < 1.3 * size,
        (across < 0.3 * size) & (down < 1.4 * size),
        (down < 0.3 * size) & (across < 1.4 * size),
        ((across < 0.25 * size) | (down < 0.25 * size)) & (across < size) & (down < size),
        (round_ < size) & (round_ > 0.6 * size),
        (np.sin(60 * u) > 0) & (round_ < 1.2 * size),
        (np.sin(60 * v) > 0) & (round_ < 1.2 * size),
        (np.sin(40 * u) * np.sin(40 * v) > 0) & (round_ < 1.2 * size),
    )
    mask: NDArray[np.bool_] = masks[kind]
    return mask
