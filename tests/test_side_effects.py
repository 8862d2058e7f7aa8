"""The tools change only what they are for: not the user's random numbers, names, objects."""

import random
from typing import Any

import keras
import numpy as np
import pytest

import keras_glorot
from keras_glorot import keras_bridge

layers: Any = keras.layers  # Keras declares many arguments as `str`
ops: Any = keras.ops
BACKEND = keras.backend.backend()

# Global generators


def backend_draw():
    """A number from the backend's global generator; JAX has none."""
    if BACKEND == "torch":
        import torch

        return float(torch.rand(()))
    if BACKEND == "tensorflow":
        import tensorflow as tf

        return float(tf.random.uniform(()))
    return 0.0


def draw_from_all():
    """What the user's code would get next from each global generator."""
    made = layers.Dense(2)
    made.build((None, 2))
    return {
        "Python": random.random(),
        "NumPy": np.random.random(),
        "backend": backend_draw(),
        "Keras": float(keras.random.uniform(())),
        "weights": np.array(ops.convert_to_numpy(made.kernel)).tolist(),
        "names": made.name,
    }


class Draws(layers.Layer):
    """Its `__init__` and its `build` draw from everything global, and make names."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.made_with = keras.initializers.RandomNormal(stddev=random.random() + 0.5)

    def build(self, shape):
        size = (int(shape[-1]),)
        self.inner = [layers.Dense(2), layers.Dropout(0.5)]
        self.inner[0].build(shape)
        self.scale = self.add_weight(shape=size, initializer=self.made_with, name="scale")
        for value in (np.random.random(), backend_draw(), keras.random.uniform(())):
            self.scale.assign(self.scale * value)

    def call(self, x):
        return x * self.scale


class FromConfig(Draws):
    """Its weights are made in `__init__`, which only a config can run again."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.noise = keras.random.SeedGenerator()
        self.early = self.add_weight(shape=(3,), initializer="normal", name="early")


def spectral(**kwargs):
    return layers.SpectralNormalization(layers.Dense(3), **kwargs)


def look(model):
    x = np.random.default_rng(0).normal(size=(16, 3)).astype("float32")
    keras_glorot.layer_fans(model)
    keras_glorot.audit(model)
    keras_glorot.propagate(model, x, seed=1)


@pytest.mark.parametrize("make", [Draws, FromConfig, spectral])
def test_a_look_moves_no_global_generator(make):
    drawn = []
    for tool in (lambda model: None, look):
        keras.utils.clear_session()
        keras.utils.set_random_seed(1)
        model = keras.Sequential([keras.Input((3,)), make()])
        if make is Draws:  # else Keras has yet to make its own generator
            keras.random.uniform(())
        tool(model)
        drawn.append(draw_from_all())
    assert drawn[0] == drawn[1]


def test_unmoved_generators_also_in_this_thread():
    drawn = []
    for inside in (lambda: None, draw_from_all):
        keras.utils.clear_session()
        keras.utils.set_random_seed(1)
        with keras_bridge.unmoved_generators():
            inside()
        drawn.append(draw_from_all())
    assert drawn[0] == drawn[1]
