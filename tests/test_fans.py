"""Right fans in every layer, whichever way Keras comes to build it.

The right numbers are written out by hand here; test_connections.py counts them.
"""

import math
import warnings

import keras
import numpy as np
import pytest

import keras_glorot
from keras_glorot import (
    Fans,
    GlorotNormal,
    GlorotUniform,
    compute_fans,
    fans,
    keras_bridge,
    layer_fans,
    register_fans,
)

layers = keras.layers
BACKEND = keras.backend.backend()

# How many standard errors a drawn std may be off. 5: once in two million.
STANDARD_ERRORS = 5


def recorded(monkeypatch):
    """Has every draw noted as `(shape, layer, fans)`, in the order they happen."""
    draws = []
    ask = fans.kernel_fans

    def note(shape, layer=None, variable=None):
        answer = ask(shape, layer, variable)
        draws.append((tuple(shape), layer, answer))
        return answer

    monkeypatch.setattr(keras_glorot.initializers, "kernel_fans", note)
    return draws


def assert_drawn(variable, fan_in, fan_out, gain=1.0):
    """The std of a uniformly drawn weight is Glorot's for these fans."""
    values = keras.ops.convert_to_numpy(variable).astype("float64")
    # A sample variance has the relative variance (kurtosis - 1) / n; the kurtosis of a
    # uniform distribution is 9/5, and a std is off by half as much as a variance.
    tolerance = STANDARD_ERRORS * math.sqrt(0.8 / values.size) / 2
    ratio = np.sqrt(np.mean(values**2)) / (gain * math.sqrt(2 / (fan_in + fan_out)))
    assert abs(ratio - 1) < tolerance, (
        f"{variable.path}: std is {ratio} of the right one"
    )


# What the issue names, with the std that stock Keras gives as a part of the right one.
IMAGE = (8, 8, 512)


def one_of_each():
    """Layers, their input shape and their kernels' fans. Stock Keras: 0.06 to 0.25."""
    init = GlorotUniform(seed=1)
    separable = {"depthwise_initializer": init, "pointwise_initializer": init}
    attention = {"kernel_initializer": init}
    return {
        "DepthwiseConv2D": (
            layers.DepthwiseConv2D(3, depthwise_initializer=init),
            (8, 8, 512),
            {"kernel": (9, 9)},
        ),
        "grouped Conv2D": (
            layers.Conv2D(512, 3, groups=32, kernel_initializer=init),
            (8, 8, 512),
            {"kernel": (9 * 16, 9 * 16)},
        ),
        "Conv2DTranspose": (
            layers.Conv2DTranspose(16, 3, strides=2, kernel_initializer=init),
            (4, 4, 64),
            {"kernel": (9 * 64, 9 * 16)},
        ),
        "SeparableConv2D": (
            layers.SeparableConv2D(64, 3, depth_multiplier=2, **separable),
            (8, 8, 128),
            {"depthwise_kernel": (9, 18), "pointwise_kernel": (256, 64)},
        ),
        "SeparableConv2D of one": (  # both kernels have the shape (1, 1, 4096, 1)
            layers.SeparableConv2D(1, 1, **separable),
            (2, 2, 4096),
            {"depthwise_kernel": (1, 1), "pointwise_kernel": (4096, 1)},
        ),
        "MultiHeadAttention": (
            SelfAttention(layers.MultiHeadAttention(8, 32, **attention)),
            (4, 256),
            {
                "query/kernel": (256, 256),
                "key/kernel": (256, 256),
                "value/kernel": (256, 256),
                "attention_output/kernel": (256, 256),
            },
        ),
        "GroupQueryAttention": (
            SelfAttention(layers.GroupQueryAttention(32, 8, 2, **attention)),
            (4, 256),
            {
                "query/kernel": (256, 256),
                "key/kernel": (256, 64),
                "value/kernel": (256, 64),
                "attention_output/kernel": (256, 256),
            },
        ),
        "experts": (
            layers.EinsumDense("abc,bcd->abd", (4, 64), kernel_initializer=init),
            (4, 128),
            {"kernel": (128, 64)},
        ),
        "Bidirectional LSTM": (
            layers.Bidirectional(
                layers.LSTM(16, kernel_initializer="xavier_uniform", name="lstm")
            ),
            (3, 64),
            {
                "forward_lstm/lstm_cell/kernel": (64, 64),
                "backward_lstm/lstm_cell/kernel": (64, 64),
            },
        ),
        "StackedRNNCells": (
            layers.RNN(
                [layers.GRUCell(16, kernel_initializer=init, name=n) for n in "ab"]
            ),
            (3, 64),
            {"a/kernel": (64, 48), "b/kernel": (16, 48)},
        ),
        "TimeDistributed": (
            layers.TimeDistributed(
                layers.DepthwiseConv1D(3, depthwise_initializer=init)
            ),
            (2, 8, 512),
            {"kernel": (3, 3)},
        ),
        "SpectralNormalization": (
            layers.SpectralNormalization(
                layers.Conv2D(64, 3, groups=4, kernel_initializer=init)
            ),
            (8, 8, 64),
            {"kernel": (9 * 16, 9 * 16)},
        ),
    }


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


def late_fit(layer, shape):
    """`fit` builds a model outside of any name scope."""
    model = Late(layer)
    model.compile(keras.optimizers.SGD(0.0), "mse")
    x = np.zeros((2, *shape), "float32")
    model.fit(x, np.zeros((2, 1), "float32"), verbose=0)
    return model


WAYS = [
    functional,
    sequential,
    sequential_called,
    nested,
    late_called,
    late_in_functional,
    late_fit,
]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_drawn_std_is_right(way):
    """The std asked for by the layer, in every kind of model."""
    for name, (layer, shape, kernels) in one_of_each().items():
        model = way(layer, shape)
        for suffix, pair in kernels.items():
            end = "/" + suffix
            (variable,) = (v for v in model.weights if f"/{v.path}".endswith(end))
            assert_drawn(variable, *pair)
            reported = layer_fans(model)[variable.path]
            assert reported == pair, f"{name}: {variable.path}"
