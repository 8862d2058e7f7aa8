"""One training of a plain net of many layers: the net, its start, and Adam.

Keras builds the net and its first weights; the package does the same for its starts. The
training is a JAX program, which goes over the hidden layers in a loop, so that compiling
200 of them takes no longer than compiling four.

`depth.py` says what to train and makes the table.
"""

import dataclasses
import functools
import math
import os
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import adam
import deep_nets
import jax
import jax.numpy as jnp
import keras
import numpy as np
from deep_nets import CLASSES, METHODS, MINIBATCH, SETTINGS, replaced
from keras import layers

import keras_glorot
from keras_glorot._models import pairs

# On one core, as PyTorch's part. Read at the first computation.
ONE_CORE = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
os.environ.setdefault("XLA_FLAGS", ONE_CORE)

WIDTH = 64
CHANNELS = 16
UPDATES = 192
LONG = "twice as long"  # isometric, with twice as many updates
CONSTANT = 8.0  # about as large as an image of 64 pixels
PARTS = {  # images by data set
    "digits": {"train": 768, "validation": 256, "test": 500},
    "flipped": {"train": 768, "validation": 256, "test": 500},
    "twice flipped": {"train": 768, "validation": 256, "test": 500},
    "mnist": {"train": 3072, "validation": 500, "test": 1000},
}
ACTIVATIONS = {
    "relu": jax.nn.relu,
    "leaky_relu": lambda x: jnp.where(x >= 0, x, 0.2 * x),  # Keras's slope
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "silu": jax.nn.silu,
    "tanh": jnp.tanh,
    "elu": jax.nn.elu,
    "selu": jax.nn.selu,
}
LEVELS = 0.1, 1.0, 10.0, 1000.0  # beside those of the package
RECTIFIERS = "relu", "leaky_relu", "gelu", "silu"  # they pass on about half of z²


@dataclasses.dataclass(frozen=True)
class Training:
    """What tells one training from all others."""

    dataset: str
    net: str
    activation: str
    depth: int
    start: str
    learning_rate: float
    seed: int

    @property
    def row(self):
        """What the learning rate is chosen for."""
        return self.dataset, self.net, self.activation, self.depth, self.start


# --- Nets: each hidden layer in Keras, and the same in JAX.


def dense(x, kernel, bias):
    return x @ kernel + bias


def windows(x):
    """Of each place, what a window of 3 × 3 sees there: 9 images, shifted.

    Their products are faster on a CPU than a convolution of few channels.
    """
    _, height, width, _ = x.shape
    wide = jnp.pad(x, [(0, 0), (1, 1), (1, 1), (0, 0)])
    return [wide[:, i : i + height, j : j + width] for i in range(3) for j in range(3)]


def convolution(x, kernel, bias):
    seen = jnp.concatenate(windows(x), -1)
    return seen @ kernel.reshape(-1, kernel.shape[-1]) + bias


def separable(x, depthwise, pointwise, bias):
    taps = depthwise.reshape(9, -1)
    seen = sum(tap * each for tap, each in zip(taps, windows(x), strict=True))
    return seen @ pointwise[0, 0] + bias


def normalized(axes, call, x, *weights):
    """After a layer, before its activation. BatchNormalization sees the images at hand."""
    *own, scale, shift = weights
    y = call(x, *own)
    y = y - y.mean(axes, keepdims=True)
    return y / jnp.sqrt((y * y).mean(axes, keepdims=True) + 1e-3) * scale + shift


@dataclasses.dataclass(frozen=True)
class Net:
    """Its hidden layers: Keras's, without activation, and the same in JAX."""

    layer: Callable
    call: Callable
    normalization: Callable = layers.Identity
    is_residual: bool = False

    @property
    def is_flat(self):
        return self.layer is DENSE


DENSE = functools.partial(layers.Dense, WIDTH)
CONV = functools.partial(layers.Conv2D, CHANNELS, 3, padding="same")
SEPARABLE = functools.partial(layers.SeparableConv2D, 2 * CHANNELS, 3, padding="same")
LAYER_NORM = functools.partial(normalized, -1, dense)
BATCH_NORM = functools.partial(normalized, 0, dense)
NETS = {
    "dense": Net(DENSE, dense),
    "dense, LayerNorm": Net(DENSE, LAYER_NORM, layers.LayerNormalization),
    "dense, BatchNorm": Net(DENSE, BATCH_NORM, layers.BatchNormalization),
    "dense, residual": Net(DENSE, dense, is_residual=True),
    "dense, residual, LayerNorm": Net(
        DENSE, LAYER_NORM, layers.LayerNormalization, is_residual=True
    ),
    "conv": Net(CONV, convolution),
    "separable": Net(SEPARABLE, separable),
}


def build(training, shape):
    net = NETS[training.net]
    x = inputs = keras.Input(shape)
    for number in range(training.depth):
        if not net.is_flat and number == training.depth // 2:
            x = layers.AveragePooling2D(2)(x)
        y = net.normalization()(net.layer()(x))
        y = layers.Activation(training.activation)(y)
        x = layers.Add()([x, y]) if net.is_residual and number else y
    return keras.Model(inputs, layers.Dense(CLASSES)(layers.Flatten()(x)))


def logits(net, activation, weights, x):
    """As the Keras model of these weights has it: first layer, stacks of others, head."""
    first, stacks, head = weights

    def hidden(x, each):
        return ACTIVATIONS[activation](net.call(x, *each))

    def step(x, each):
        y = hidden(x, each)
        return (x + y if net.is_residual else y), None

    x = hidden(x, first)
    for number, stack in enumerate(stacks):
        if number:  # images, from here on of half the size
            count, height, width, channels = x.shape
            halves = x.reshape(count, height // 2, 2, width // 2, 2, channels)
            x = halves.mean((2, 4))
        x, _ = jax.lax.scan(step, x, stack)
    return dense(x.reshape(len(x), -1), *head)


def weights_of(model, training):
    """What `logits` takes."""
    *hidden, kernel, bias = [each.numpy() for each in model.trainable_variables]
    kinds = len(hidden) // training.depth
    first, rest = hidden[:kinds], hidden[kinds:]
    half = None if NETS[training.net].is_flat else training.depth // 2 - 1
    stacks = [np.stack(rest[kind::kinds]) for kind in range(kinds)]
    parts = [slice(None)] if half is None else [slice(half), slice(half, None)]
    return first, [[stack[part] for stack in stacks] for part in parts], [kernel, bias]


# --- Starts: from a function that builds the net to the net with its first weights.


def orthogonal(activation, build, x, seed):
    """Keras's in every layer, with a gain of √2 before a rectifier."""
    model = replaced(keras.initializers.Orthogonal, build)
    for variable in model.trainable_variables[:-2]:
        if activation in RECTIFIERS and variable.name in ("kernel", "pointwise_kernel"):
            variable.assign(variable * math.sqrt(2))
    return model


def lsuv(build, x, seed):
    """Orthogonal kernels over the std of what they give (Mishkin & Matas, 2016)."""
    model = replaced(keras.initializers.Orthogonal, build)
    for layer in model.layers[1:]:
        x = layer(x)
        if hasattr(layer, "kernel"):
            scale = keras.ops.std(x)
            layer.kernel.assign(layer.kernel / scale)
            x = x / scale
    return model


def isometric(build, x, seed):
    model = build()
    keras_glorot.initialize(model, "isometric", seed, verbose=False)
    return model


def calibrated(build, x, seed):
    model = isometric(build, x, seed)
    keras_glorot.calibrate(model, x, verbose=False)
    return model


def at_level(level, build, x, seed):
    """As isometric, but for the std of what goes into each activation."""
    with mock.patch.object(pairs, "LEVELS", (level,)):
        return isometric(build, x, seed)


def starts(activation):
    return {
        "stock": METHODS["stock"],
        "he_normal": METHODS["he_normal"],
        "orthogonal": functools.partial(orthogonal, activation),
        "gain auto": METHODS["initialize"],
        "LSUV": lsuv,
        "AnyInit": METHODS["AnyInit empirical"],
        "isometric": isometric,
        LONG: isometric,
        "calibrated": calibrated,
    } | {f"level {each:g}": functools.partial(at_level, each) for each in LEVELS}


# --- Training


def load(training):
    """(images, labels) by part; the seed picks which image is in which."""
    name, pixels = ("mnist", 16) if training.dataset == "mnist" else ("digits", 8)
    x, labels = deep_nets.images(name, pixels)
    x = x.numpy()
    if NETS[training.net].is_flat:
        x = x.reshape(len(x), -1)
    if "flipped" in training.dataset:
        x = flipped(x, training)
    return deep_nets.split(x, labels, PARTS[training.dataset], training.seed)


def flipped(x, training):
    """Each image times a random sign, and for dense nets a number that helps to tell it.

    Twice flipped: times two signs, each of which is given, too.
    """
    random, count = np.random.default_rng(training.seed), len(x)
    times = 2 if training.dataset == "twice flipped" else 1
    signs = random.choice([-1, 1], (times, count)).astype("float32")
    x = x * signs.prod(0).reshape(-1, *[1] * (x.ndim - 1))
    if not NETS[training.net].is_flat:
        return x
    given = np.full((1, count), CONSTANT, "float32")
    if times == 2:
        given = signs * np.float32(CONSTANT / math.sqrt(2))
    return np.concatenate([x, given.T], 1)


@functools.lru_cache(maxsize=8)
def first_weights(training):
    """And the seconds that they took. `training` is without its learning rate."""
    x, _ = load(training)["train"]
    keras.utils.set_random_seed(training.seed)
    start = time.process_time()
    own = functools.partial(build, training, x.shape[1:])
    method = starts(training.activation)[training.start]
    model = method(own, x[: deep_nets.MEASURED], training.seed)
    return weights_of(model, training), time.process_time() - start


def train(training):
    """Train one net and return what came of it."""
    data = load(training)
    x, labels = data["train"]
    order = np.random.default_rng(training.seed)
    updates = 2 * UPDATES if training.start == LONG else UPDATES
    epochs = math.ceil(updates * MINIBATCH / len(labels))
    places = np.concatenate([order.permutation(len(labels)) for _ in range(epochs)])
    places = places.reshape(updates, MINIBATCH)
    weights, drawing = first_weights(dataclasses.replace(training, learning_rate=0.0))
    held_out = [data[part][0] for part in ("validation", "test")]
    start = time.process_time()
    losses, answers = descend(
        NETS[training.net],
        training.activation,
        weights,
        training.learning_rate,
        x[places],
        labels[places],
        held_out,
    )
    means = np.asarray(losses).reshape(8, -1).mean(1)
    finite = int(np.isfinite(means).cumprod().sum())
    record: dict[str, Any] = {
        f"{part}_accuracy": round(100 * float((mine == data[part][1]).mean()), 3)
        for part, mine in zip(("validation", "test"), map(np.asarray, answers), strict=True)
    }
    record["losses"] = [round(float(mean), 4) for mean in means[:finite]]
    record["seconds"] = round(time.process_time() - start + drawing, 2)
    return record | {"versions": SETTINGS["versions"] | {"jax": jax.__version__}}


@functools.partial(jax.jit, static_argnums=(0, 1))
def descend(net, activation, weights, rate, batches, labels, held_out):
    """Adam with Keras's defaults: the loss of each update, then answers to `held_out`."""

    def loss(weights, x, y):
        scores = jax.nn.log_softmax(logits(net, activation, weights, x))
        return -jnp.take_along_axis(scores, y[:, None], 1).mean()

    update = functools.partial(adam.update, loss, rate)
    batches = batches, labels
    (weights, *_), losses = jax.lax.scan(update, adam.start(weights), batches)
    return losses, [logits(net, activation, weights, x).argmax(1) for x in held_out]
