"""The nets of `training.py`, and what each is trained to do, on any backend of Keras.

Two processes build them: one with PyTorch, where `calibrate` takes less than a second, and
one with JAX, which compiles a whole training to one program.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import layers, ops

if keras.backend.backend() == "jax":
    from window_layers import Conv2D, DepthwiseConv2D, SeparableConv2D
else:
    from keras.layers import Conv2D, DepthwiseConv2D, SeparableConv2D

CLASSES = 10
IMAGE = 8, 8, 1
BATCH_NORM = functools.partial(layers.BatchNormalization, axis=-1)


# --- Plain nets: `norm` is a normalization before each activation, or None.


def activated(layer, activation, norm, x):
    """The layer with its activation, and with a normalization between the two."""
    if norm is None:
        return layer(activation=activation)(x)
    return layers.Activation(activation)(norm()(layer()(x)))


def dense(depth, activation, norm=None, shape=IMAGE):
    x = inputs = keras.Input(shape)
    x = layers.Flatten()(x)
    for _ in range(depth):
        x = activated(functools.partial(layers.Dense, 64), activation, norm, x)
    return keras.Model(inputs, layers.Dense(CLASSES, name="head")(x))


def conv(norm=None, shape=IMAGE):
    x = inputs = keras.Input(shape)
    for number in range(16):
        strides = 1 if number else shape[0] // 4
        layer = functools.partial(Conv2D, 16, 3, strides, padding="same")
        x = activated(layer, "gelu", norm, x)
    return keras.Model(inputs, layers.Dense(CLASSES, name="head")(layers.Flatten()(x)))


def separable(norm=None):
    x = inputs = keras.Input(IMAGE)
    for number in range(20):
        strides = 1 if number else 2
        layer = functools.partial(SeparableConv2D, 32, 3, strides, padding="same")
        x = activated(layer, "tanh", norm, x)
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, layers.Dense(CLASSES, name="head")(x))


# --- Residual nets: `norm` is at the start of each branch, where it has one.


def normalized(norm, x):
    return norm()(x) if norm else x


def dense_blocks(norm=None, blocks=24):
    x = inputs = keras.Input(IMAGE)
    x = layers.Dense(64)(layers.Flatten()(x))
    for n in range(blocks):
        y = layers.Dense(64, "relu", name=f"block_{n}_inner")(normalized(norm, x))
        x = layers.Add()([x, layers.Dense(64, name=f"block_{n}_end")(y)])
    x = layers.Activation("relu")(normalized(norm, x))
    return keras.Model(inputs, layers.Dense(CLASSES, name="head")(x))


def conv_blocks(norm=None, blocks=12):
    x = inputs = keras.Input(IMAGE)
    x = Conv2D(16, 3, 2, padding="same")(x)
    for n in range(blocks):
        inner = Conv2D(16, 3, padding="same", activation="relu", name=f"block_{n}_inner")
        end = Conv2D(16, 3, padding="same", name=f"block_{n}_end")
        x = layers.Add()([x, end(inner(normalized(norm, x)))])
    x = layers.Activation("relu")(normalized(norm, x))
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, layers.Dense(CLASSES, name="head")(x))


def mobile_blocks(norm=None, blocks=8, width=16):
    """Inverted residuals as in MobileNetV2: wider, depthwise, narrow again."""
    x = inputs = keras.Input(IMAGE)
    x = Conv2D(width, 3, 2, padding="same")(x)
    for n in range(blocks):
        wide = functools.partial(Conv2D, 4 * width, 1, name=f"block_{n}_wide")
        y = activated(wide, "relu6", norm, x)
        each = functools.partial(
            DepthwiseConv2D, 3, padding="same", name=f"block_{n}_depthwise"
        )
        y = activated(each, "relu6", norm, y)
        y = normalized(norm, Conv2D(width, 1, name=f"block_{n}_end")(y))
        x = layers.Add()([x, y])
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, layers.Dense(CLASSES, name="head")(x))


class Positions(layers.Layer):
    """Adds a learned vector to each place of a sequence."""

    def build(self, shape):
        normal = keras.initializers.RandomNormal(stddev=0.02)
        self.table = self.add_weight(shape=shape[1:], initializer=normal, name="table")

    def call(self, x):
        return x + self.table


def transformer(norm=None, blocks=12, width=32, heads=2):
    """The rows of an image as a sequence; blocks as in GPT-2 and ViT."""
    inputs = keras.Input(IMAGE)
    x = Positions()(layers.Dense(width)(layers.Reshape(IMAGE[:2])(inputs)))
    for n in range(blocks):
        y = normalized(norm, x)
        attention = layers.MultiHeadAttention(
            heads, width // heads, name=f"block_{n}_attention"
        )
        x = layers.Add()([x, attention(y, y)])
        y = layers.Dense(2 * width, "gelu", name=f"block_{n}_inner")(normalized(norm, x))
        x = layers.Add()([x, layers.Dense(width, name=f"block_{n}_end")(y)])
    x = layers.GlobalAveragePooling1D()(normalized(norm, x))
    return keras.Model(inputs, layers.Dense(CLASSES, name="head")(x))


# --- Healthy nets of other kinds, which nothing should harm.


class Sampling(layers.Layer):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.noise = keras.random.SeedGenerator(1)

    def call(self, mean, log_var):
        drawn = keras.random.normal(ops.shape(mean), seed=self.noise)
        return mean + ops.exp(0.5 * log_var) * drawn


def vae():
    x = inputs = keras.Input(IMAGE)
    for filters in (16, 32):
        x = Conv2D(filters, 3, 2, padding="same", activation="relu")(x)
    x = layers.Flatten()(x)
    mean, log_var = layers.Dense(4, name="mean")(x), layers.Dense(4, name="log_var")(x)
    x = layers.Dense(128, "relu")(Sampling()(mean, log_var))
    x = layers.Reshape((2, 2, 32))(x)
    for filters in (32, 16):
        x = layers.UpSampling2D()(x)
        x = Conv2D(filters, 3, padding="same", activation="relu")(x)
    return keras.Model(inputs, [Conv2D(1, 3, padding="same")(x), mean, log_var])


def negative_elbo(outputs, y):
    x, mean, log_var = outputs
    error = 0.5 * ops.sum((x - y) ** 2, (1, 2, 3))
    kl = 0.5 * ops.sum(mean**2 + ops.exp(log_var) - 1 - log_var, 1)
    return ops.mean(error + kl)


CELLS = 16, 4  # of both levels


def detector():
    """A pyramid of two levels under one head, as in RetinaNet: class, and offset."""
    x = inputs = keras.Input((16, 16, 1))
    same = functools.partial(Conv2D, kernel_size=3, padding="same")
    x = same(16, strides=2, activation="relu")(x)
    high = same(16, strides=2, activation="relu")(x)
    low = same(16, strides=2, activation="relu")(high)
    low = Conv2D(16, 1)(low)
    high = layers.Add()([Conv2D(16, 1)(high), layers.UpSampling2D()(low)])
    prior = keras.initializers.Constant(-math.log(99))
    kind, place = same(16, activation="relu"), same(16, activation="relu")
    score, offset = same(1, bias_initializer=prior), same(2)
    found = []
    for level, cells in zip((high, low), CELLS, strict=True):
        outputs = [score(kind(level)), offset(place(level))]
        found += [layers.Reshape((cells, 3))(layers.Concatenate()(outputs))]
    return keras.Model(inputs, layers.Concatenate(axis=1)(found))


def focal(outputs, y):
    """The loss of Lin et al. (2017), and the offset's error, per object."""
    logit, is_object = outputs[..., 0], y[..., 0]
    p = ops.sigmoid(logit)
    missed = ops.where(is_object > 0, 1 - p, p)
    weight = ops.where(is_object > 0, 0.25, 0.75)
    signed = ops.where(is_object > 0, -logit, logit)
    kind = weight * missed**2 * ops.softplus(signed)
    place = is_object[..., None] * ops.abs(outputs[..., 1:] - y[..., 1:])
    return (ops.sum(kind) + ops.sum(place)) / ops.sum(is_object)


def sine(x):
    return ops.sin(30 * x)


def siren(width=64):
    """Sitzmann et al. (2020), with their own first weights."""

    def uniform(limit):
        return keras.initializers.RandomUniform(-limit, limit)

    x = inputs = keras.Input((2,))
    x = layers.Dense(width, sine, kernel_initializer=uniform(1 / 2))(x)
    hidden = math.sqrt(6 / width) / 30
    for _ in range(3):
        x = layers.Dense(width, sine, kernel_initializer=uniform(hidden))(x)
    head = layers.Dense(1, kernel_initializer=uniform(hidden))
    return keras.Model(inputs, head(x))


def pooled():
    x = inputs = keras.Input((200, 4))
    for _ in range(2):
        x = layers.Dense(32, "tanh")(x)
    x = layers.Dense(32, "tanh")(layers.GlobalAveragePooling1D()(x))
    return keras.Model(inputs, layers.Dense(1)(x))


def text():
    x = inputs = keras.Input((20,), dtype="int32")
    x = layers.Embedding(30, 16)(x)
    x = layers.LSTM(16)(layers.LSTM(16, return_sequences=True)(x))
    return keras.Model(inputs, layers.Dense(2)(x))


def recommender():
    inputs = [keras.Input((), dtype="int32") for _ in range(2)]
    tables = layers.Embedding(30, 8), layers.Embedding(20, 8)
    found = [table(which) for table, which in zip(tables, inputs, strict=True)]
    x = layers.Concatenate()(found)
    for _ in range(2):
        x = layers.Dense(32, "relu")(x)
    return keras.Model(inputs, layers.Dense(1)(x))


def translator(width=32, length=6, words=11):
    """Encoder and decoder with cross attention, one block each."""

    def attend(x, source, **options):
        y = layers.MultiHeadAttention(2, width // 2)(x, source, **options)
        return layers.LayerNormalization()(layers.Add()([x, y]))

    def feed_forward(x):
        y = layers.Dense(width)(layers.Dense(2 * width, "relu")(x))
        return layers.LayerNormalization()(layers.Add()([x, y]))

    inputs = [keras.Input((length,), dtype="int32") for _ in range(2)]
    source, target = (Positions()(layers.Embedding(words, width)(x)) for x in inputs)
    source = feed_forward(attend(source, source))
    target = attend(target, target, use_causal_mask=True)
    target = feed_forward(attend(target, source))
    return keras.Model(inputs, layers.Dense(words)(target))


def unet():
    same = functools.partial(Conv2D, kernel_size=3, padding="same", activation="relu")
    inputs = keras.Input(IMAGE)
    top = same(8)(same(8)(inputs))
    middle = same(16)(same(16)(layers.AveragePooling2D(2)(top)))
    bottom = same(32)(same(32)(layers.AveragePooling2D(2)(middle)))
    middle = layers.Concatenate()([middle, layers.UpSampling2D()(bottom)])
    middle = same(16)(same(16)(middle))
    top = layers.Concatenate()([top, layers.UpSampling2D()(middle)])
    return keras.Model(inputs, Conv2D(1, 1)(same(8)(same(8)(top))))


def experts():
    x = inputs = keras.Input(IMAGE)
    x = layers.Dense(64, "relu")(layers.Flatten()(x))
    gates = layers.Dense(4, "softmax")(x)
    outputs = [layers.Dense(64, "relu")(x) for _ in range(4)]
    stacked = ops.stack(outputs, 1)
    x = ops.sum(gates[:, :, None] * stacked, 1)
    return keras.Model(inputs, layers.Dense(CLASSES)(x))


# --- Losses: from outputs and targets to a number above zero.


def cross_entropy(outputs, y):
    losses = keras.losses.sparse_categorical_crossentropy(y, outputs, from_logits=True)
    return ops.mean(losses)


def squared_error(outputs, y):
    return ops.mean((outputs - y) ** 2)


def binary_cross_entropy(outputs, y):
    return ops.mean(keras.losses.binary_crossentropy(y, outputs, from_logits=True))


def accuracy(outputs, y):
    """In %."""
    return 100 * ops.mean(ops.cast(ops.argmax(outputs, -1) == y, "float32"))


# --- Data: as many examples as asked for, by seed.


def blobs(rng, count):
    """Squares of two sizes in noise: is an object's middle in this cell, and where."""
    x = rng.normal(0, 0.3, (count, 16, 16, 1))
    y = np.zeros((count, sum(CELLS), 3))
    for each, size in itertools.product(range(count), (3, 6)):
        top, left = rng.integers(0, 16 - size, 2)
        x[each, top : top + size, left : left + size] += 1
        cell = 4 if size == 3 else 8
        middle = np.array([top, left]) + size / 2
        row, column = (middle // cell).astype(int)
        index = row * 4 + column if size == 3 else CELLS[0] + row * 2 + column
        y[each, index] = [1, *(middle % cell / cell - 0.5)]
    return x, y


def waves(rng, count):
    """A sum of eight plane waves in the square from -1 to 1."""
    x = rng.uniform(-1, 1, (count, 2))
    directions, phases = rng.normal(0, 8, (2, 8)), rng.uniform(0, 2 * math.pi, 8)
    return x, np.sin(x @ directions + phases).mean(1, keepdims=True) * 2


def means(rng, count):
    """A function of the mean over 200 noisy steps."""
    middles = rng.normal(0, 1, (count, 1, 4))
    x = middles + rng.normal(0, 1, (count, 200, 4))
    return x, np.tanh(middles[:, 0, :1] - middles[:, 0, 1:2]) + 0.5 * middles[:, 0, 2:3]


def sentences(rng, count):
    """Is the sum of the words' values positive?"""
    values, x = rng.normal(size=30), rng.integers(0, 30, (count, 20))
    return x, (values[x].sum(1) > 20 * values.mean()).astype(int)


def ratings(rng, count):
    users, items = rng.normal(0, 1, (30, 2)), rng.normal(0, 1, (20, 2))
    x = [rng.integers(0, len(table), count) for table in (users, items)]
    y = (users[x[0]] * items[x[1]]).sum(1, keepdims=True)
    return x, y + rng.normal(0, 0.1, y.shape)


def reversals(rng, count):
    """Words, and the same from the last to the first; 0 is where a sentence starts."""
    source = rng.integers(1, 11, (count, 6))
    target = source[:, ::-1]
    return [source, np.pad(target[:, :-1], [(0, 0), (1, 0)])], target


# --- All of them


@dataclasses.dataclass(frozen=True)
class Net:
    """A net and its task.

    Attributes:
        data: The name of a data set of images, or a function (generator, count) → (x, y).
        branch: How many kernels a residual branch has one after the other; 0: no sums.
        normalized_from: Of which net this is the one with normalization.
        train, updates: How many examples it is trained on, and in how many minibatches.
    """

    what: str
    build: Callable[[], Any]
    data: str | Callable[..., Any] = "digits"
    loss: Callable[..., Any] = cross_entropy
    branch: int = 0
    is_bare: bool = False
    normalized_from: str | None = None
    train: int = 768
    updates: int = 192

    @property
    def has_accuracy(self):
        return self.is_bare or self.normalized_from is not None

    @property
    def score(self):
        """Of outputs and targets: accuracy in %; else -100 ln of the loss, 1 is 1 %."""
        if self.has_accuracy:
            return accuracy
        return lambda outputs, y: -100 * ops.log(self.loss(outputs, y))


LAYER_NORM = layers.LayerNormalization
BARE = {  # by name: what it is, the function, its normalization, kernels of a branch
    "gelu": ("50 × Dense(64, GELU)", functools.partial(dense, 50, "gelu"), BATCH_NORM, 0),
    "silu": ("30 × Dense(64, SiLU)", functools.partial(dense, 30, "silu"), BATCH_NORM, 0),
    "tanh": ("50 × Dense(64, tanh)", functools.partial(dense, 50, "tanh"), BATCH_NORM, 0),
    "relu": ("50 × Dense(64, ReLU)", functools.partial(dense, 50, "relu"), BATCH_NORM, 0),
    "conv": ("16 × Conv2D(16, GELU)", conv, BATCH_NORM, 0),
    "separable": ("20 × SeparableConv2D(32, tanh)", separable, BATCH_NORM, 0),
    "blocks": ("24 residual blocks of two Dense(64)", dense_blocks, LAYER_NORM, 2),
    "conv blocks": ("12 residual blocks of two Conv2D(16)", conv_blocks, BATCH_NORM, 2),
    "mobile": ("8 inverted residual blocks, as MobileNetV2", mobile_blocks, BATCH_NORM, 3),
    "transformer": ("12 transformer blocks, width 32", transformer, LAYER_NORM, 2),
}
NETS = {
    name: Net(what, build, branch=branch, is_bare=True)
    for name, (what, build, _, branch) in BARE.items()
}
LARGE = {"large gelu": "gelu", "large tanh": "tanh", "large conv": "conv"}
LARGER = {"data": "mnist", "train": 3968, "updates": 1240}  # ten epochs
for large, name in LARGE.items():
    what, build, norm, _ = BARE[name]
    build = functools.partial(build, shape=(28, 28, 1))
    what = f"{what}, 28 × 28 pixels of MNIST, ten epochs of 3,968"
    NETS[large] = Net(what, build, is_bare=True, **LARGER)
    build = functools.partial(build, norm=norm)
    what = "the same with BatchNormalization"
    NETS[f"{large}, normalized"] = Net(what, build, normalized_from=large, **LARGER)
NETS |= {
    f"{name}, normalized": Net(
        f"the same with {getattr(norm, 'func', norm).__name__}",
        functools.partial(build, norm=norm),
        branch=branch,
        normalized_from=name,
    )
    for name, (what, build, norm, branch) in BARE.items()
}
HEALTHY = {
    "VAE": Net(
        "convolutions, four latent numbers; ELBO", vae, "autoencoded", negative_elbo
    ),
    "detector": Net("two levels, focal loss, prior 0.01", detector, blobs, focal),
    "SIREN": Net("4 × Dense(64, sine); its own start", siren, waves, squared_error),
    "pooled": Net("a mean over 200 steps", pooled, means, squared_error),
    "text": Net("embedding, two LSTMs", text, sentences),
    "recommender": Net("two embeddings", recommender, ratings, squared_error),
    "translator": Net("cross attention, LayerNorm", translator, reversals),
    "U-Net": Net("three levels", unet, "masks", binary_cross_entropy),
    "experts": Net("four experts, a softmax gate", experts),
}
NETS |= HEALTHY
