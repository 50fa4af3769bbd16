"""Trains a small CNN with NumPy: 3x3 convolutions, each with ReLU and 2x2 max pooling, then linear.

Adam (Kingma and Ba, 2015) on the cross entropy, with a rate that falls to zero as a half cosine.
Arrays have their channels last inside.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

__all__ = ["train_cnn"]

_WIDTH = 32
_RATE = 3e-3
_DECAY = 1e-4
_Arrays = dict[str, np.ndarray]


def train_cnn(
    images: np.ndarray,
    labels: np.ndarray,
    *,
    seed: int,
    epochs: int,
    batch_size: int,
    advance: Callable[[], None] = lambda: None,
) -> _Arrays:
    """Weights and biases by name; images (n, channels, side, side) float32, labels (n,) from 0 on.

    As many convolutions as halve the side down to 4 or to 2, of 32 channels and twice as many after
    each. The seed fixes every draw. `advance` is called after every batch.
    """
    random = np.random.default_rng(seed)
    x = np.ascontiguousarray(images.transpose(0, 2, 3, 1))
    parameters = _start(random, x.shape[1:], int(labels.max()) + 1)
    first = {name: np.zeros_like(value) for name, value in parameters.items()}
    second = {name: np.zeros_like(value) for name, value in parameters.items()}
    steps = epochs * -(-len(x) // batch_size)
    step = 0
    for _ in range(epochs):
        order = random.permutation(len(x))
        for begin in range(0, len(x), batch_size):
            chosen = order[begin : begin + batch_size]
            gradients = _gradients(parameters, x[chosen], labels[chosen])
            step += 1
            rate = _RATE * (1 + np.cos(np.pi * step / steps)) / 2
            for name, gradient in gradients.items():
                gradient += _DECAY * parameters[name]
                first[name] += 0.1 * (gradient - first[name])
                second[name] += 0.001 * (gradient**2 - second[name])
                size = np.sqrt(second[name] / (1 - 0.999**step)) + 1e-8
                parameters[name] -= (rate / (1 - 0.9**step) * first[name] / size).astype(np.float32)
            advance()
    return parameters


def _start(random: np.random.Generator, shape: tuple[int, ...], classes: int) -> _Arrays:
    side, channels = shape[1:]
    parameters: _Arrays = {}
    width, index = _WIDTH, 0
    while side > 4 or index < 2:
        deviation = np.sqrt(2 / (9 * channels))
        weight = random.normal(0, deviation, (9 * channels, width))
        parameters[f"conv{index}.weight"] = weight.astype(np.float32)
        parameters[f"conv{index}.bias"] = np.zeros(width, np.float32)
        side, channels, width, index = side // 2, width, 2 * width, index + 1
    flat = side * side * channels
    weight = random.normal(0, np.sqrt(1 / flat), (flat, classes))
    parameters["linear.weight"] = weight.astype(np.float32)
    parameters["linear.bias"] = np.zeros(classes, np.float32)
    return parameters


def _gradients(parameters: _Arrays, x: np.ndarray, labels: np.ndarray) -> _Arrays:
    """The gradient of a batch's mean loss by every parameter."""
    depth = len(parameters) // 2 - 1
    kept = []
    for index in range(depth):
        columns = _columns(x)  # (n, side, side, 9 * channels)
        y = columns @ parameters[f"conv{index}.weight"] + parameters[f"conv{index}.bias"]
        np.maximum(y, 0, out=y)
        n, side, _, width = y.shape
        blocks = y.reshape(n, side // 2, 2, side // 2, 2, width)
        pooled = blocks.max((2, 4))
        kept.append((x.shape, columns, blocks, pooled))
        x = pooled
    flat = x.reshape(len(x), -1)
    scores = flat @ parameters["linear.weight"] + parameters["linear.bias"]
    scores -= scores.max(1, keepdims=True)
    shares = np.exp(scores)
    shares /= shares.sum(1, keepdims=True)
    shares[np.arange(len(labels)), labels] -= 1
    shares /= len(labels)
    gradients: _Arrays = {
        "linear.weight": flat.T @ shares,
        "linear.bias": shares.sum(0),
    }
    back = (shares @ parameters["linear.weight"].T).reshape(x.shape)
    for index in reversed(range(depth)):
        shape, columns, blocks, pooled = kept[index]
        # Of several that share the maximum, each takes the gradient; ReLU lets it through above 0.
        largest = (blocks == pooled[:, :, None, :, None]) & (blocks > 0)
        y = (largest * back[:, :, None, :, None]).reshape(*columns.shape[:3], -1)
        weight = parameters[f"conv{index}.weight"]
        wide = columns.reshape(-1, columns.shape[-1])
        long = y.reshape(-1, y.shape[-1])
        gradients[f"conv{index}.weight"] = wide.T @ long
        gradients[f"conv{index}.bias"] = long.sum(0)
        if index:
            back = _scatter((long @ weight.T).reshape(columns.shape), shape)
    return gradients


def _columns(x: np.ndarray) -> np.ndarray:
    """The 3x3 neighbourhood of every pixel, (n, side, side, 3 * 3 * channels)."""
    n, side, _, channels = x.shape
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    parts = [
        padded[:, row : row + side, column : column + side]
        for row in range(3)
        for column in range(3)
    ]
    return np.concatenate(parts, axis=-1).reshape(n, side, side, 9 * channels)


def _scatter(columns: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The transpose of `_columns`."""
    n, side, _, channels = shape
    padded = np.zeros((n, side + 2, side + 2, channels), np.float32)
    for place in range(9):
        row, column = divmod(place, 3)
        part = columns[..., place * channels : (place + 1) * channels]
        padded[:, row : row + side, column : column + side] += part
    return padded[:, 1:-1, 1:-1]
