"""The digits of scikit-learn, in the one split that every training script, test and report uses."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

__all__ = [
    "INPUT_NAMES",
    "DigitsModel",
    "Split",
    "calibration_npz",
    "digits_cnn_path",
    "digits_mlp_path",
    "load_digits_split",
    "scale_images",
    "split_of",
]

DigitsModel = Literal["cnn", "mlp", "resnet"]

INPUT_NAMES: dict[DigitsModel, str] = {"cnn": "image", "mlp": "pixels", "resnet": "image"}
"""Name of the one input of each bundled model."""

TEST_SAMPLES = 600
CALIBRATION_SAMPLES = 200
_REPOSITORY = Path(__file__).resolve().parents[3]


@dataclass(frozen=True)
class Split:
    """Images in 0..1 as float32, (n, 1, side, side) or, flat, (n, 64); labels (n,) int64."""

    x_train: np.ndarray
    y_train: np.ndarray
    x_calibration: np.ndarray
    """Images that are neither trained on nor tested on."""
    x_test: np.ndarray
    y_test: np.ndarray


def load_digits_split(seed: int = 0, *, flat: bool = False, side: int = 8) -> Split:
    """Split the 1797 images into 997 to train, 200 to calibrate and 600 to test, stratified.

    The images have 8x8 pixels; for another `side` they are scaled, bilinear.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)
    images = (pixels / 16).astype(np.float32)
    if not flat:
        images = scale_images(images.reshape(-1, 1, 8, 8), side)
    labels = labels.astype(np.int64)
    x_rest, x_test, y_rest, y_test = train_test_split(
        images, labels, test_size=TEST_SAMPLES, stratify=labels, random_state=seed
    )
    x_train, x_calibration, y_train, _ = train_test_split(
        x_rest, y_rest, test_size=CALIBRATION_SAMPLES, stratify=y_rest, random_state=seed
    )
    return Split(x_train, y_train, x_calibration, x_test, y_test)


def split_of(model: DigitsModel) -> Split:
    """The split in the shape that the bundled model takes."""
    return load_digits_split(flat=model == "mlp", side=32 if model == "resnet" else 8)


def scale_images(images: np.ndarray, side: int) -> np.ndarray:
    """Scale (n, 1, 8, 8) to (n, 1, side, side), between the centres of pixels.

    Outside, the edge goes on. The result is exact in float32 where side is 16, 32 or 64, so it is
    the same on every machine.
    """
    old = images.shape[-1]
    centres = (np.arange(side) + 0.5) * old / side - 0.5
    weights = [np.interp(centres, np.arange(old), unit) for unit in np.eye(old)]
    matrix = np.array(weights, np.float32)  # (old, side)
    return matrix.T @ images @ matrix


def calibration_npz(path: str | Path, model: DigitsModel) -> None:
    """Write the calibration images as the DATA.npz that `bapq build --calibration` reads."""
    with open(path, "wb") as file:  # np.savez would append .npz to a bare path
        np.savez(file, **{INPUT_NAMES[model]: split_of(model).x_calibration})


def digits_cnn_path(repository: Path = _REPOSITORY) -> Path:
    """Path of the bundled CNN: image (batch, 1, 8, 8) to logits (batch, 10)."""
    return repository / "examples" / "models" / "digits_cnn.onnx"


def digits_mlp_path(repository: Path = _REPOSITORY) -> Path:
    """Path of the bundled MLP: pixels (batch, 64) to label (batch,), probabilities (batch, 10)."""
    return repository / "examples" / "models" / "digits_mlp.onnx"
