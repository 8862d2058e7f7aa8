"""Small models and layers that several test files build."""

import math
from typing import Any

import keras
import numpy as np

layers: Any = keras.layers  # Keras declares many arguments as `str`


# Ways to build a model around one layer


@keras.saving.register_keras_serializable("keras_glorot_tests")
class SelfAttention(layers.Layer):
    """Attention from one input, so that it fits into any kind of model."""

    def __init__(self, attention, **kwargs):
        super().__init__(**kwargs)
        self.attention = attention

    def build(self, shape):
        self.attention.build(shape, shape)

    def call(self, x):
        return self.attention(x, x)


class Late(keras.Model):
    """A subclassed model without `build`: Keras makes its weights by calling it."""

    def __init__(self, *parts):
        super().__init__()
        self.parts = list(parts)

    def call(self, x):
        outputs = [part(x) for part in self.parts]
        rows = [keras.ops.reshape(y, (-1, math.prod(y.shape[1:]))) for y in outputs]
        return keras.ops.mean(keras.ops.concatenate(rows, 1), axis=1, keepdims=True)


def functional(layer, shape):
    inputs = keras.Input(shape)
    return keras.Model(inputs, layer(inputs))


def sequential(layer, shape):
    model = keras.Sequential([layer])
    model.build((None, *shape))
    return model


def sequential_called(layer, shape):
    model = keras.Sequential([layer])
    model(np.zeros((2, *shape), "float32"))
    return model


def nested(layer, shape):
    return functional(keras.Sequential([functional(layer, shape)]), shape)


def late_called(layer, shape):
    model = Late(layer)
    model(np.zeros((2, *shape), "float32"))
    return model


def late_in_functional(layer, shape):
    return functional(Late(layer), shape)


def late_evaluated(layer, shape):
    """`fit` and `evaluate` build a model while no name scope is open."""
    model = Late(layer)
    model.compile(loss="mse", run_eagerly=True)
    x = np.zeros((2, *shape), "float32")
    model.evaluate(x, np.zeros((2, 1), "float32"), verbose=0)
    return model


WAYS = [
    functional,
    sequential,
    sequential_called,
    nested,
    late_called,
    late_in_functional,
    late_evaluated,
]


# One model for each kind of layer; `options` are arguments for kernels


def dense(**options):
    stack = [layers.Dense(24, "tanh", **options) for _ in range(4)]
    return keras.Sequential([keras.Input((16,)), *stack, layers.Dense(1, **options)])


def convolutional(**options):
    return keras.Sequential(
        [
            keras.Input((9, 9, 3)),
            layers.Conv2D(16, 3, use_bias=False, **options),
            layers.BatchNormalization(),
            layers.ReLU(),
            layers.Conv2DTranspose(8, 2, **options),
            layers.Conv2D(8, 1, groups=4, **options),
            layers.GlobalAveragePooling2D(),
            layers.Dense(4, "softmax", **options),
        ]
    )


def mobile(**options):
    depthwise = {"depthwise_initializer": options.get("kernel_initializer")}
    pointwise = {"pointwise_initializer": options.get("kernel_initializer")}
    separable = depthwise | pointwise if options else {}
    return keras.Sequential(
        [
            keras.Input((9, 9, 32)),
            layers.DepthwiseConv2D(3, **(depthwise if options else {})),
            layers.SeparableConv2D(16, 3, depth_multiplier=2, **separable),
            layers.GlobalMaxPooling2D(),
            layers.Dense(4, **options),
        ]
    )


def attention(**options):
    x = keras.Input((5, 32))
    y = layers.MultiHeadAttention(4, 8, **options)(x, x)
    y = layers.LayerNormalization()(y + x)
    z = layers.Dense(64, "tanh", **options)(y)
    return keras.Model(x, layers.Dense(32, **options)(z) + y)


def experts(**options):
    x = keras.Input((4, 16))
    return keras.Model(x, layers.EinsumDense("bei,eio->beo", (4, 24), **options)(x))


def lstm(**options):
    stack = [
        layers.Embedding(40, 8),
        layers.LSTM(12, **options),
        layers.Dense(1, **options),
    ]
    return keras.Sequential([keras.Input((6,), dtype="int32"), *stack])


def gru(**options):
    both = layers.Bidirectional(layers.GRU(6, return_sequences=True, **options))
    return keras.Sequential([keras.Input((5, 4)), both, layers.Conv1D(8, 3, **options)])


def nested_twice(**options):
    inner = keras.Sequential([keras.Input((8,)), layers.Dense(8, **options)])
    x = keras.Input((8,))
    return keras.Model(x, inner(x) + layers.Dense(8, **options)(inner(x)))


def he(**options):
    own = {"kernel_initializer": "he_normal", **options}
    return keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            layers.Conv2D(16, 3, activation="relu", **own),
            layers.Flatten(),
            layers.Dense(64, "relu", **own),
            layers.Dense(1),
        ]
    )


def tiny(**options):
    return keras.Sequential(
        [keras.Input((1,)), *(layers.Dense(n, **options) for n in (1, 2, 1, 3, 1))]
    )


BY_KIND = [
    dense,
    convolutional,
    mobile,
    attention,
    experts,
    lstm,
    gru,
    nested_twice,
    he,
    tiny,
]


# Models with names, automatic and chosen, and with state


def convnet(extra=False):
    """Automatic and explicit names, normalization, a separable layer, dropout."""
    return keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            layers.Conv2D(16, 3, name="first"),
            layers.BatchNormalization(),
            *([layers.Dense(16)] if extra else []),
            layers.SeparableConv2D(16, 3, name="separable"),
            layers.PReLU(),
            layers.Dropout(0.5, seed=1),
            layers.Flatten(),
            layers.Dense(16, "tanh"),
            layers.Dense(16, "tanh"),
            layers.Dense(4, name="last"),
        ]
    )


def recurrent():
    return keras.Sequential(
        [
            keras.Input((6,), dtype="int32"),
            layers.Embedding(50, 8),
            layers.Bidirectional(layers.LSTM(8, dropout=0.1)),
            layers.Dense(3),
        ]
    )


def nested_attention():
    x = keras.Input((5, 32))
    y = layers.MultiHeadAttention(4, 8)(x, x)
    y = layers.LayerNormalization()(layers.Add()([x, y]))
    inner = keras.Sequential([keras.Input((5, 32)), layers.Dense(32, "gelu")])
    return keras.Model(x, inner(inner(y)))


class TwoDense(keras.Model):
    """No `build`: its variables are made in the first call."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.one = layers.Dense(8)
        self.two = layers.Dense(8)

    def call(self, x):
        return self.two(self.one(x))


def two_dense():
    model = TwoDense()
    model(np.zeros((1, 8), "float32"))
    return model


WITH_STATE = [convnet, recurrent, nested_attention, two_dense]
