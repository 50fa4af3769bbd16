"""Make the .tflite files of this folder: small models in every kind of precision.

    PYTHONPATH=tests python tests/tflite_models/make_models.py

It needs tensorflow-cpu 2.21, in an environment of its own. Seeds are fixed. `images_*` have an open
batch and are what TensorFlow's converter makes of one Keras model, trained on stripes; `two` has
two inputs and two outputs under names of its own; `sparse` has a weight that is stored sparse,
`stateful` a variable. The files here were made by version 2.21.0 of tensorflow-cpu.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import numpy as np
import tensorflow as tf

from support.stripes import CLASSES, SIZE, stripes

HERE = Path(__file__).parent


def images_model() -> tf.keras.Model:
    """A small MobileNet that knows the directions of stripes."""
    layers = tf.keras.layers
    model = tf.keras.Sequential(
        [
            layers.Input((SIZE, SIZE, 3), name="image"),
            layers.Conv2D(16, 3, strides=2, padding="same", use_bias=False),
            layers.BatchNormalization(momentum=0.9),
            layers.ReLU(6.0),
            layers.DepthwiseConv2D(3, padding="same"),
            layers.ReLU(6.0),
            layers.Conv2D(48, 1),
            layers.Activation("hard_swish"),
            layers.Conv2D(32, 3, strides=2, padding="valid", activation="relu"),
            layers.GlobalAveragePooling2D(),
            layers.Dense(64, activation="relu"),
            layers.Dense(CLASSES, activation="softmax"),
        ]
    )
    model.compile(
        tf.keras.optimizers.Adam(3e-3), "sparse_categorical_crossentropy", metrics=["accuracy"]
    )
    model.fit(*stripes(3000, seed=1), batch_size=32, epochs=8, verbose=2)
    print("right of others:", model.evaluate(*stripes(500, seed=2), verbose=0)[1])
    return model


def converted(model: tf.keras.Model, precision: str) -> bytes:
    """The file of a model, in float32, float16, dynamic range or int8 throughout."""
    converter = tf.lite.TFLiteConverter.from_keras_model(model)
    if precision != "float32":
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
    if precision == "float16":
        converter.target_spec.supported_types = [tf.float16]
    if precision == "int8":
        samples = stripes(100, seed=3)[0]
        converter.representative_dataset = lambda: ([sample[None]] for sample in samples)
        converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
        converter.inference_input_type = converter.inference_output_type = tf.int8
    return converter.convert()


class Two(tf.Module):
    """left (1, 64), right (1, 64) to total (1, 48) and spread (1, 64)."""

    def __init__(self) -> None:
        super().__init__()
        random = np.random.default_rng(2)
        self.weight = tf.constant(random.standard_normal((64, 48)).astype(np.float32) / 8)

    @tf.function(
        input_signature=[
            tf.TensorSpec((1, 64), tf.float32, name="left"),
            tf.TensorSpec((1, 64), tf.float32, name="right"),
        ]
    )
    def mix(self, left: tf.Tensor, right: tf.Tensor) -> dict[str, tf.Tensor]:
        """The signature."""
        return {"total": tf.matmul(left + right, self.weight), "spread": tf.abs(left - right)}


def two_model() -> bytes:
    """The file of `Two`."""
    module = Two()
    with tempfile.TemporaryDirectory() as folder:
        tf.saved_model.save(module, folder, signatures={"mix": module.mix})
        converter = tf.lite.TFLiteConverter.from_saved_model(folder, signature_keys=["mix"])
        return converter.convert()


def sparse_model() -> bytes:
    """One Dense layer, half of whose weights are zero, stored without them."""
    model = tf.keras.Sequential([tf.keras.layers.Input((64,)), tf.keras.layers.Dense(64)])
    weight, bias = model.layers[-1].get_weights()
    weight.reshape(-1, 16)[::2] = 0
    model.layers[-1].set_weights([weight, bias])
    converter = tf.lite.TFLiteConverter.from_keras_model(model)
    converter.optimizations = [tf.lite.Optimize.EXPERIMENTAL_SPARSITY]
    return converter.convert()


class Counter(tf.Module):
    """x (1, 64) to the sum of all that came, which it keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.sum = tf.Variable(tf.zeros((1, 64)))

    @tf.function(input_signature=[tf.TensorSpec((1, 64), tf.float32, name="x")])
    def add(self, x: tf.Tensor) -> dict[str, tf.Tensor]:
        """The signature."""
        return {"sum": self.sum.assign_add(x)}


def stateful_model() -> bytes:
    """The file of `Counter`."""
    module = Counter()
    with tempfile.TemporaryDirectory() as folder:
        tf.saved_model.save(module, folder, signatures={"add": module.add})
        converter = tf.lite.TFLiteConverter.from_saved_model(folder, signature_keys=["add"])
        converter.experimental_enable_resource_variables = True
        return converter.convert()


def main() -> None:
    """Write the files."""
    tf.keras.utils.set_random_seed(0)
    model = images_model()
    for precision in ("float32", "float16", "dynamic", "int8"):
        (HERE / f"images_{precision}.tflite").write_bytes(converted(model, precision))
    (HERE / "two.tflite").write_bytes(two_model())
    (HERE / "stateful.tflite").write_bytes(stateful_model())
    (HERE / "sparse.tflite").write_bytes(sparse_model())


if __name__ == "__main__":
    main()
