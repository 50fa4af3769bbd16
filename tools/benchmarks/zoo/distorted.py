"""Digits as a camera would see them: shifted, turned, scaled, too bright or dark, and noisy.

The clean test images are so easy that hardly an answer is in doubt; what tells plans and policies
apart is how the doubtful ones are answered.
"""

from __future__ import annotations

import numpy as np

__all__ = ["distort"]

_TURN_RAD = 0.15
_SCALE = 0.08
_SHIFT_PIXELS = 0.5
_CONTRAST = 0.1
_NOISE = 0.05


def distort(images: np.ndarray, seed: int, strength: float = 1.0) -> np.ndarray:
    """Images (n, side, side) in 0..1, each changed a little at random; the same for a seed.

    Standard deviations, at strength 1: 0.15 rad, 8 % of the size, half a pixel of 8x8, 10 % of the
    contrast, noise of 0.05.
    """
    from scipy.ndimage import affine_transform

    rng = np.random.default_rng(seed)
    side = images.shape[-1]
    middle = np.full(2, (side - 1) / 2)
    result = np.empty_like(images, np.float32)
    for i, image in enumerate(images):
        turn = strength * rng.normal(0, _TURN_RAD)
        scale = np.exp(strength * rng.normal(0, _SCALE))
        shift = strength * rng.normal(0, _SHIFT_PIXELS * side / 8, 2)
        rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
        matrix = rotation / scale
        moved = affine_transform(image, matrix, middle - matrix @ middle + shift, order=1)
        moved = moved * np.exp(strength * rng.normal(0, _CONTRAST)) + strength * rng.normal(
            0, _NOISE, image.shape
        )
        result[i] = np.clip(moved, 0, 1)
    return result
