"""Small models with data, the same numbers on every backend."""

import keras
import numpy as np
from keras import layers

from keras_glorot import GlorotUniform
from keras_glorot._drawing.stream import draw


def fill(model, gain=1.0):
    """The same weights on every backend, whatever made them before."""
    for number, weight in enumerate(model.weights):
        if len(weight.shape) > 1:
            scale = gain * GlorotUniform().limit(weight.shape)
            weight.assign(draw("uniform", weight.shape, scale, "float32", (number,)))
    return model


def data(*shape):
    return draw("truncated_normal", shape, 1.0, "float32", (1,))


def mlp(depth=3, width=20, activation="tanh", **options):
    hidden = [layers.Dense(width, activation, **options) for _ in range(depth)]
    return fill(keras.Sequential([keras.Input((12,)), *hidden, layers.Dense(4)]))


def mixed(*activations, depth=20, width=64):
    """So many layers of each activation, one after the other."""
    hidden = [layers.Dense(width, each) for each in activations for _ in range(depth)]
    return keras.Sequential([keras.Input((width,)), *hidden, layers.Dense(10)])


def convnet():
    inputs = keras.Input((9, 9, 3))
    x = layers.Conv2D(8, 3, activation="relu", name="conv")(inputs)
    x = layers.BatchNormalization(name="norm")(x)
    x = layers.SeparableConv2D(8, 3, padding="same", name="separable")(x)
    x = layers.ReLU(name="relu")(x)
    x = layers.GlobalAveragePooling2D(name="pool")(x)
    x = layers.Dropout(0.5, name="dropout")(x)
    outputs = layers.Dense(4, "softmax", name="softmax")(x)
    return fill(keras.Model(inputs, outputs, name="convnet"))


def branches():
    """A shared layer, a nested model, two inputs, two outputs, and an Add."""
    shared = layers.Dense(10, "sigmoid", name="shared")
    inner = keras.Sequential(
        [keras.Input((10,)), layers.Dense(10, "softsign", name="dense")], name="inner"
    )
    a, b = keras.Input((6,), name="a"), keras.Input((6,), name="b")
    left, right = shared(a), shared(b)
    total = layers.Add(name="add")([inner(left), right])
    outputs = [layers.Dense(2, name="first")(total), layers.Dense(3, name="second")(total)]
    return fill(keras.Model([a, b], outputs, name="branches"))


def text():
    inputs = keras.Input((7,), dtype="int32")
    x = layers.Embedding(11, 8, mask_zero=True, name="embedding")(inputs)
    x = layers.MultiHeadAttention(2, 4, name="attention")(x, x)
    x = layers.LSTM(6, return_sequences=True, name="lstm")(x)
    x = layers.TimeDistributed(layers.Dense(5, "tanh"), name="steps")(x)
    return fill(keras.Model(inputs, layers.Dense(2, name="last")(x), name="text"))


@keras.saving.register_keras_serializable("keras_glorot_tests")
class Residual(keras.Model):
    """Adds in its own `call`, takes an argument, and ends in something of its own."""

    def __init__(self, **options):
        super().__init__(**options)
        self.first = layers.Dense(12, "relu", name="first")
        self.second = layers.Dense(12, name="second")

    def call(self, x, scale=1.0):
        return keras.ops.tanh(x + scale * self.second(self.first(x)))


def residual():
    model = Residual(name="residual")
    model(np.zeros((1, 12), "float32"))
    return fill(model)


TOKENS = np.arange(84).reshape(12, 7) % 11
CASES = {
    "mlp": lambda: (mlp(), data(16, 12)),
    "convnet": lambda: (convnet(), data(4, 9, 9, 3)),
    "branches": lambda: (branches(), [data(16, 6), 2 * data(16, 6)]),
    "text": lambda: (text(), TOKENS),
    "residual": lambda: (residual(), data(16, 12)),
}
