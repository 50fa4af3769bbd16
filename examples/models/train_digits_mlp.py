"""Train scikit-learn's MLP on its digits and convert it with skl2onnx.

The graph is left as skl2onnx writes it. Run:

    python examples/models/train_digits_mlp.py [OUT.onnx]
"""

from __future__ import annotations

import sys
import warnings

import numpy as np
import onnx
from skl2onnx import convert_sklearn
from skl2onnx.common.data_types import FloatTensorType
from sklearn.exceptions import ConvergenceWarning
from sklearn.neural_network import MLPClassifier

from benchmarks.zoo.digits import INPUT_NAMES, digits_mlp_path, load_digits_split

SEED = 0
HIDDEN = (128, 64)
EPOCHS = 60


def shifted(pixels: np.ndarray, down: int, right: int) -> np.ndarray:
    """Images (n, 64) moved by half a pixel each way asked for: the mean of two neighbours."""
    images = pixels.reshape(-1, 8, 8)
    for axis, step in ((1, down), (2, right)):
        if step:
            moved = np.roll(images, step, axis)
            edge = 0 if step > 0 else -1
            np.moveaxis(moved, axis, 0)[edge] = 0
            images = (images + moved) / 2
    return images.reshape(-1, 64)


def main() -> None:
    """Train, write the model, print its accuracy on the test samples."""
    split = load_digits_split(flat=True)
    offsets = [(down, right) for down in (-1, 0, 1) for right in (-1, 0, 1)]
    x = np.concatenate([shifted(split.x_train, *offset) for offset in offsets])
    y = np.tile(split.y_train, len(offsets))
    model = MLPClassifier(HIDDEN, alpha=0.01, max_iter=EPOCHS, random_state=SEED)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the epochs are chosen, not a limit
        model.fit(x, y)

    onnx_model = convert_sklearn(
        model,
        "digits_mlp",
        [(INPUT_NAMES["mlp"], FloatTensorType([None, 64]))],
        target_opset={"": 17, "ai.onnx.ml": 3},
        options={"zipmap": False},
    )
    out = sys.argv[1] if len(sys.argv) > 1 else str(digits_mlp_path())
    onnx.save(onnx_model, out)
    weights = sum(matrix.size for matrix in (*model.coefs_, *model.intercepts_))
    accuracy = model.score(split.x_test, split.y_test)
    print(f"{out}: {weights} weights, test accuracy {accuracy:.4f}")


if __name__ == "__main__":
    main()
