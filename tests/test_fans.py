"""Right fans in every layer, whichever way Keras comes to build it.

The right numbers are written out by hand here; test_layer_rules_counted.py counts them.
"""

import math
from typing import Any

import keras
import numpy as np
import pytest
from drawn import assert_drawn
from models import WAYS, SelfAttention, late_called, sequential

from keras_glorot import GlorotNormal, GlorotUniform, layer_fans
from keras_glorot._models.survey import Survey

layers: Any = keras.layers  # Keras declares many arguments as `str`
BACKEND = keras.backend.backend()


# Kernels with the std that stock Keras gives as a part of the right one.
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
            layers.RNN([layers.GRUCell(16, kernel_initializer=init, name=n) for n in "ab"]),
            (3, 64),
            {"a/kernel": (64, 48), "b/kernel": (16, 48)},
        ),
        "TimeDistributed": (
            layers.TimeDistributed(layers.DepthwiseConv1D(3, depthwise_initializer=init)),
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


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_drawn_std_is_right(way):
    """The std asked for by the layer, in every kind of model."""
    for name, (layer, shape, kernels) in one_of_each().items():
        model = way(layer, shape)
        for suffix, pair in kernels.items():
            end = "/" + suffix
            (weight,) = (w for w in Survey(model).weights if f"/{w.path}".endswith(end))
            assert_drawn(weight.variable, *pair)
            reported = layer_fans(model)[weight.path]
            assert reported == pair, f"{name}: {weight.path}"


def test_twenty_separable_layers_keep_the_signal():
    """Stock Keras leaves 6e-16 of it."""
    inputs = x = keras.Input((16, 16, 64))
    for seed in range(20):
        x = layers.SeparableConv2D(
            64,
            3,
            padding="same",
            depthwise_initializer=GlorotUniform(seed=seed),
            pointwise_initializer=GlorotNormal(seed=seed),
        )(x)
    noise = np.random.default_rng(0).normal(size=(4, 16, 16, 64)).astype("float32")
    outputs = keras.Model(inputs, x)(noise)
    assert 0.3 < keras.ops.convert_to_numpy(outputs).std() < 3


# What decides


def test_explicit_axes_win():
    init = GlorotUniform(seed=1, input_axes=[0, 1, 2], output_axes=[0, 1, 3])
    layer = layers.DepthwiseConv2D(3, depthwise_initializer=init)
    layer.build((None, 8, 8, 512))
    assert_drawn(layer.kernel, 9 * 512, 9)


AUTO_GAINS = {
    "Dense": (lambda **init: layers.Dense(512, "tanh", **init), 512, 5 / 3),
    "without activation": (lambda **init: layers.Dense(512, **init), 512, 1),
    "softmax": (lambda **init: layers.Dense(512, "softmax", **init), 512, 1),
    "Conv1D": (
        lambda **init: layers.Conv1D(64, 3, activation="relu", **init),
        64,
        math.sqrt(2),
    ),
    "LSTM": (lambda **init: layers.LSTM(64, **init), 64, 5 / 3),
    "EinsumDense": (
        lambda **init: layers.EinsumDense("abc,cd->abd", (None, 64), "relu", **init),
        64,
        math.sqrt(2),
    ),
    "MultiHeadAttention": (
        lambda **init: SelfAttention(layers.MultiHeadAttention(2, 32, **init)),
        64,
        1,
    ),
}


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("kind", AUTO_GAINS)
def test_auto_gain_is_that_of_the_layers_activation(kind, late):
    make, size, gain = AUTO_GAINS[kind]
    layer = make(kernel_initializer=GlorotUniform(gain="auto", seed=1))
    shape = (size,) if kind in ("Dense", "without activation", "softmax") else (5, size)
    model = (late_called if late else sequential)(layer, shape)
    for weight in Survey(model).weights:
        if weight.path.endswith("/kernel"):
            assert_drawn(weight.variable, *weight.fans, gain=gain)


@pytest.mark.parametrize("late", [False, True])
def test_auto_gain_of_separable_layers_belongs_to_the_last_kernel(late):
    init = GlorotUniform(gain="auto", seed=1)
    layer = layers.SeparableConv2D(
        1,
        1,
        activation="tanh",
        depthwise_initializer=init,
        pointwise_initializer=init,
    )
    (late_called if late else sequential)(layer, (2, 2, 4096))
    assert_drawn(layer.depthwise_kernel, 1, 1)
    assert_drawn(layer.pointwise_kernel, 4096, 1, gain=5 / 3)
