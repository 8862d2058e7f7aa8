"""The main job on real input: a ConvNet on handwritten digits, saved and loaded.

Run it:  make demo
"""

import os
import tempfile
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import keras_glorot


def digits():
    """scikit-learn's 1,797 digits of 8 x 8 pixels, a quarter of them for the test."""
    images, labels = load_digits(return_X_y=True)
    images = (images.reshape(-1, 8, 8, 1) / 8 - 1).astype("float32")
    return train_test_split(images, labels, test_size=0.25, random_state=0, stratify=labels)


def convnet():
    def conv(filters):
        return keras.layers.Conv2D(
            filters,
            3,
            activation="tanh",
            padding="same",
            kernel_initializer="xavier_uniform",
        )

    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            conv(32),
            conv(32),
            keras.layers.MaxPooling2D(),
            conv(64),
            keras.layers.Flatten(),
            keras.layers.Dense(64, "tanh", kernel_initializer="xavier_normal"),
            keras.layers.Dense(10, "softmax", kernel_initializer="xavier_uniform"),
        ]
    )


def main():
    console = Console()
    keras.utils.set_random_seed(2010)
    train_x, test_x, train_y, test_y = digits()
    model = convnet()
    table = Table(title="Kernels as drawn", title_justify="left")
    for column in ("layer", "initializer"):
        table.add_column(column)
    for column in ("fan_in", "fan_out", "std wanted", "std drawn"):
        table.add_column(column, justify="right")
    for layer in model.layers:
        if layer.weights:
            kernel = layer.get_weights()[0]
            fans = keras_glorot.compute_fans(kernel.shape)
            wanted = layer.kernel_initializer.stddev(kernel.shape)
            table.add_row(
                layer.name,
                type(layer.kernel_initializer).__name__,
                str(fans.fan_in),
                str(fans.fan_out),
                f"{wanted:.5f}",
                f"{kernel.std():.5f}",
            )
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    start = time.perf_counter()
    model.fit(train_x, train_y, batch_size=32, epochs=15, verbose=0)
    seconds = time.perf_counter() - start
    _, accuracy = model.evaluate(test_x, test_y, verbose=0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "digits.keras"
        model.save(path)
        loaded = keras.saving.load_model(path)
        size = path.stat().st_size
    same = np.array_equal(
        model.predict(test_x, verbose=0), loaded.predict(test_x, verbose=0)
    )
    console.print(
        f"keras-glorot {keras_glorot.__version__} on Keras {keras.__version__}, "
        f"{keras.backend.backend()} backend",
        table,
        f"Training    15 epochs on {len(train_x)} digits in {seconds:.0f} s",
        f"Accuracy    {accuracy:.1%} of {len(test_x)} test digits",
        f"Round trip  digits.keras ({size / 1024:.0f} KB) loaded: predictions "
        + ("identical" if same else "DIFFER"),
        sep="\n",
        highlight=False,
    )
    if not same:
        raise SystemExit("The loaded model does not predict what the saved one did.")


if __name__ == "__main__":
    main()
