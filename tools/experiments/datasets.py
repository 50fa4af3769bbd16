"""Images to train and to judge with: scikit-learn's digits, or CIFAR-10 from a folder."""

from __future__ import annotations

import hashlib
import io
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bapq_edge.errors import InputFileError
from bapq_edge.input_files import input_file_errors

__all__ = ["CIFAR10_MD5", "Images", "load_cifar10", "load_digits", "read_checksums"]

CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
CIFAR10_MD5 = {
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
}
"""MD5 of the files of the published archive, as its page and torchvision have them."""
_CIFAR10_SHAPE = (3, 32, 32)
_CALIBRATION_IMAGES = 500


@dataclass(frozen=True)
class Images:
    """Images as float32, (n, channels, side, side); labels (n,) int64."""

    x_train: np.ndarray
    y_train: np.ndarray
    x_calibration: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray


def load_digits() -> Images:
    """The digits in the split of the bundled models: 8x8, in 0..1."""
    from benchmarks.zoo.digits import load_digits_split

    split = load_digits_split()
    return Images(split.x_train, split.y_train, split.x_calibration, split.x_test, split.y_test)


def load_cifar10(folder: Path, md5: Mapping[str, str] = CIFAR10_MD5) -> Images:
    """CIFAR-10's python batches, each channel of mean 0 and deviation 1 over the training images.

    `folder` holds the batches, or the archive's folder cifar-10-batches-py. The last training
    images, a hundredth and 500 at most, calibrate and are not trained on. Raises InputFileError
    where a file is missing, broken or another one than published.
    """
    inner = folder / "cifar-10-batches-py"
    folder = inner if inner.is_dir() else folder
    batches = {name: _read_batch(folder / name, digest) for name, digest in md5.items()}
    x_test, y_test = batches.pop("test_batch")
    x = np.concatenate([images for images, _ in batches.values()])
    y = np.concatenate([labels for _, labels in batches.values()])
    mean = x.mean((0, 2, 3), keepdims=True, dtype=np.float64).astype(np.float32)
    deviation = x.std((0, 2, 3), keepdims=True, dtype=np.float64).astype(np.float32)
    x, x_test = ((images - mean) / deviation for images in (x, x_test))
    last = len(x) - min(_CALIBRATION_IMAGES, max(1, len(x) // 100))
    return Images(x[:last], y[:last], x[last:], x_test, y_test)


def read_checksums(path: Path) -> dict[str, str]:
    """Digests by file name, as `md5sum data_batch_* test_batch` prints them. Or InputFileError."""
    with input_file_errors(path):
        lines = [line.split() for line in path.read_text(encoding="utf-8").splitlines()]
    digests = {words[1].lstrip("*"): words[0] for words in lines if len(words) == 2}
    if "test_batch" not in digests or len(digests) < 2:
        raise InputFileError(
            f"{path} names {sorted(digests)}: test_batch and one data_batch at least are needed, "
            "as 'md5sum data_batch_* test_batch' prints them"
        )
    return digests


def _read_batch(path: Path, md5: str) -> tuple[np.ndarray, np.ndarray]:
    if not path.is_file():
        raise InputFileError(
            f"{path} is not there: get {CIFAR10_URL}, unpack it with 'tar xzf "
            f"cifar-10-python.tar.gz', and give the folder as --data-dir"
        )
    with input_file_errors(path):
        content = path.read_bytes()
    found = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if found != md5:
        raise InputFileError(
            f"{path} has the MD5 {found}, published is {md5}: the download was cut off or is "
            f"another file; get {CIFAR10_URL} again"
        )
    try:
        batch = _Unpickler(io.BytesIO(content), encoding="bytes").load()
        pixels = np.asarray(batch[b"data"], np.uint8)
        labels = np.asarray(batch[b"labels"], np.int64)
        images = pixels.reshape(len(labels), *_CIFAR10_SHAPE)
    except (pickle.UnpicklingError, EOFError, KeyError, TypeError, ValueError) as error:
        raise InputFileError(
            f"{path} is no batch of CIFAR-10 ({error}): it needs data, (n, 3072) uint8, and labels"
        ) from error
    return images.astype(np.float32) / 255, labels


class _Unpickler(pickle.Unpickler):
    """Makes arrays and plain values only: a pickle could run anything."""

    _ALLOWED = frozenset(
        (f"{package}.{module}", name)
        for package in ("numpy.core", "numpy._core")
        for module, name in (("multiarray", "_reconstruct"), ("numeric", "_frombuffer"))
    ) | {("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._ALLOWED:
            raise pickle.UnpicklingError(f"it wants {module}.{name}")
        return super().find_class(module, name)
