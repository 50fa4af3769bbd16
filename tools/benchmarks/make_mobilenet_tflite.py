"""Makes the models of `benchmarks.tflite`: Keras' MobileNetV2 (96x96, alpha 0.35), trained here.

    PYTHONPATH=tools python -m benchmarks.make_mobilenet_tflite FOLDER

FOLDER gets float32.tflite and int8.tflite. It needs tensorflow-cpu 2.21, in an environment of its
own, and some minutes.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

import tensorflow as tf

from .zoo.shapes import CLASSES, SIZE, shapes

TRAINING_IMAGES = 2000
EPOCHS = 18
BATCH = 32


def main() -> None:
    """Train, convert and write."""
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    tf.keras.utils.set_random_seed(0)
    model = tf.keras.applications.MobileNetV2(
        input_shape=(SIZE, SIZE, 3), alpha=0.35, weights=None, classes=CLASSES
    )
    for layer in model.layers:
        if isinstance(layer, tf.keras.layers.BatchNormalization):
            layer.momentum = 0.9  # the default wants more steps than there are here
    images, classes = shapes(TRAINING_IMAGES, seed=1)
    rate = tf.keras.optimizers.schedules.CosineDecay(2e-3, EPOCHS * TRAINING_IMAGES // BATCH)
    model.compile(
        tf.keras.optimizers.Adam(rate), "sparse_categorical_crossentropy", metrics=["accuracy"]
    )
    model.fit(images, classes, batch_size=BATCH, epochs=EPOCHS, verbose=2)
    (folder / "float32.tflite").write_bytes(
        tf.lite.TFLiteConverter.from_keras_model(model).convert()
    )
    converter = tf.lite.TFLiteConverter.from_keras_model(model)
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    converter.representative_dataset = lambda: ([image[None]] for image in images[:200])
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
    converter.inference_input_type = converter.inference_output_type = tf.int8
    (folder / "int8.tflite").write_bytes(converter.convert())


if __name__ == "__main__":
    main()
