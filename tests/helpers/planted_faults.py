"""Faults that `audit` must find in twelve architectures, and what it finds without one."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import numpy as np

from keras_glorot import GlorotNormal, GlorotUniform, audit, initialize
from keras_glorot._models.survey import Survey

layers: Any = keras.layers


# Twelve architectures: small, and between them all kinds of Keras's layers with weights.
# `options` are arguments for kernels; what stock Keras draws wrongly is given fans that
# are right, by an initializer of ours.


def mlp(**options):
    x = keras.Input((20,))
    y = x
    for units, activation in ((32, "tanh"), (32, "relu"), (48, "selu"), (32, "gelu")):
        y = layers.Dense(units, activation, **options)(y)
    return keras.Model(x, layers.Dense(3, "softmax", **options)(y))


def convolutional(**options):
    x = keras.Input((9, 9, 3))
    y = layers.Conv2D(16, 3, use_bias=False, **options)(x)
    y = layers.ReLU()(layers.BatchNormalization()(y))
    y = layers.Conv2D(24, (1, 3), dilation_rate=2, activation="elu", **options)(y)
    y = layers.Conv2DTranspose(8, 2, strides=2, **options)(y)
    return keras.Model(x, layers.Dense(4, **options)(layers.Flatten()(y)))


def mobile(**options):
    own = options.get("kernel_initializer", "xavier_uniform")
    x = keras.Input((9, 9, 32))
    y = layers.DepthwiseConv2D(3, depthwise_initializer=own, name="depthwise")(x)
    y = layers.BatchNormalization()(y)
    y = layers.SeparableConv2D(
        16, 3, depth_multiplier=2, depthwise_initializer=own, pointwise_initializer=own
    )(y)
    y = layers.Conv2D(32, 1, groups=4, kernel_initializer=own)(layers.PReLU()(y))
    return keras.Model(x, layers.Dense(4, **options)(layers.GlobalMaxPooling2D()(y)))


def transformer(**options):
    x = keras.Input((6,), dtype="int32")
    y = layers.Embedding(60, 32)(x)
    for _ in range(2):
        z = layers.MultiHeadAttention(4, 8, **options)(y, y)
        y = layers.LayerNormalization()(y + z)
        z = layers.Dense(64, "gelu", **options)(y)
        y = layers.LayerNormalization()(y + layers.Dense(32, **options)(z))
    return keras.Model(x, layers.Dense(5, **options)(y))


def grouped_attention(**options):
    x = keras.Input((5, 24))
    y = layers.GroupQueryAttention(8, 4, 2, **options)(x, x)
    return keras.Model(x, layers.Dense(16, **options)(layers.GroupNormalization(4)(y)))


def recurrent(**options):
    x = keras.Input((6,), dtype="int32")
    y = layers.Embedding(40, 12)(x)
    y = layers.Bidirectional(layers.LSTM(10, return_sequences=True, **options))(y)
    y = layers.GRU(12, return_sequences=True, **options)(y)
    return keras.Model(x, layers.Dense(2, **options)(layers.SimpleRNN(8, **options)(y)))


def sequence(**options):
    x = keras.Input((16, 6))
    y = layers.Conv1D(16, 3, activation="silu", **options)(x)
    y = layers.Conv1DTranspose(12, 3, **options)(layers.LayerNormalization()(y))
    y = layers.Conv1D(24, 5, padding="causal", **options)(layers.LeakyReLU()(y))
    return keras.Model(x, layers.Dense(4, **options)(layers.GlobalAveragePooling1D()(y)))


def volumetric(**options):
    x = keras.Input((5, 6, 6, 2))
    y = layers.Conv3D(8, 2, activation="relu", **options)(x)
    y = layers.ConvLSTM2D(4, 3, **options)(layers.BatchNormalization()(y))
    return keras.Model(x, layers.Dense(4, **options)(layers.Flatten()(y)))


def residual(**options):
    x = keras.Input((8, 8, 8))
    y = x
    for _ in range(3):
        z = layers.Conv2D(8, 3, padding="same", activation="relu", **options)(y)
        z = layers.Conv2D(8, 3, padding="same", **options)(z)
        y = layers.Add()([y, layers.BatchNormalization(gamma_initializer="zeros")(z)])
    return keras.Model(x, layers.Dense(4, **options)(layers.GlobalMaxPooling2D()(y)))


def experts(**options):
    own = {"kernel_initializer": options.get("kernel_initializer", "xavier_uniform")}
    x = keras.Input((4, 16))
    y = layers.EinsumDense("bei,eio->beo", (4, 24), activation="relu", **own)(x)
    return keras.Model(
        x, layers.EinsumDense("bei,eio->beo", (4, 8), bias_axes="o", **own)(y)
    )


def half(**options):
    own = {"dtype": "bfloat16", **options}
    x = keras.Input((12,), dtype="bfloat16")
    y = layers.Dense(40, "relu", **own)(x)
    y = layers.Dense(7, **own)(layers.LayerNormalization(dtype="bfloat16")(y))
    return keras.Model(x, layers.Dense(1, **own)(y))


def tiny(**options):
    stack = [layers.Dense(n, **options) for n in (1, 2, 1, 3, 1)]
    return keras.Sequential([keras.Input((1,)), *stack])


class UnknownActivation(layers.Dense):
    """A layer whose `activation` is a name that Keras does not know."""

    def build(self, input_shape):
        super().build(input_shape)
        self.activation = "gelu_approximate"

    def call(self, inputs):
        return keras.ops.gelu(keras.ops.matmul(inputs, self.kernel) + self.bias)


def declared_wrongly(**_):
    """Not to be drawn with many seeds: what it declares are faults."""
    seeded = keras.initializers.GlorotUniform(seed=3)
    x = keras.Input((6,), dtype="int32")
    y = layers.Embedding(40, 32, embeddings_initializer="glorot_uniform")(x)
    y = layers.LSTM(32, recurrent_initializer="glorot_uniform", return_sequences=True)(y)
    y = layers.MultiHeadAttention(4, 8, kernel_initializer=seeded)(y, y)
    y = UnknownActivation(32, name="dense")(y)
    y = layers.Dense(32, "relu", name="dense_1")(y)
    return keras.Model(x, layers.Dense(4, kernel_initializer="zeros", name="dense_2")(y))


ARCHITECTURES = (
    mlp,
    convolutional,
    mobile,
    transformer,
    grouped_attention,
    recurrent,
    sequence,
    volumetric,
    residual,
    experts,
    half,
    tiny,
)


# What Keras itself draws from, by config: each layer then has an initializer of its own.
ORTHOGONAL = keras.initializers.Orthogonal(1.5)
STOCK = (
    keras.initializers.TruncatedNormal(stddev=0.02),
    keras.initializers.RandomNormal(mean=0.01, stddev=0.05),
    keras.initializers.RandomUniform(-0.1, 0.3),
    ORTHOGONAL,
    keras.initializers.VarianceScaling(2.0, "fan_out", "truncated_normal"),
    keras.initializers.VarianceScaling(1.0, "fan_in", "uniform"),
    keras.initializers.VarianceScaling(1.0, "fan_avg", "untruncated_normal"),
)
# In these Keras counts other fans, which is a finding (in attention until Keras 3.15), so
# they get the first four only, which look at no fans.
OTHER_FANS = {mobile, experts, transformer, grouped_attention, convolutional, sequence}


class Fault(NamedTuple):
    """A fault, and the finding that it calls for.

    Attributes:
        what: What it is.
        make: Builds the model.
        path: A part of the path of the weight that it is planted in.
        plant: Called with the values of the weight; changes them, or returns new ones.
        code: The code of the finding that must be there, at this weight.
        source: A part of the path of another weight, to call `plant` with instead.
    """

    what: str
    make: Callable[..., keras.Model]
    path: str
    plant: Callable[[np.ndarray], Any]
    code: str
    source: str | None = None


def _set(index, value):
    return lambda w: w.__setitem__(index, value)


def _scale(factor, index=...):
    return lambda w: w.__setitem__(index, w[index] * w.dtype.type(factor))


def _copy(to, source, factor=1):
    return lambda w: w.__setitem__(to, w[source] * w.dtype.type(factor))


def _normal(w):
    return np.random.default_rng(0).normal(0, w.std(), w.shape)


def _signs(w):
    return np.sign(w) * w.std()


def _sparse(w):
    keep = np.random.default_rng(0).random(w.shape) < 0.2
    return np.where(keep, w * np.sqrt(5), 0)


COLUMN = np.s_[..., 3]
FAULTS = [
    # One value
    Fault("one value is NaN", mlp, "dense_1/kernel", _set((2, 3), np.nan), "not-finite"),
    Fault("one value is infinite", convolutional, "conv2d/kernel",
          _set((0, 0, 0, 0), -np.inf), "not-finite"),
    Fault("a bias is NaN", mlp, "dense_2/bias", _set(1, np.nan), "not-finite"),
    Fault("a moving variance is NaN", convolutional, "moving_variance",
          _set(1, np.nan), "not-finite"),
    Fault("one value five stds out", mlp, "dense_1/kernel", _set((0, 0), 1.0), "bounds"),
    Fault("one value just out of bounds", convolutional, "conv2d_1/kernel",
          _set((0, 0, 0, 0), 0.31), "bounds"),
    Fault("one value of an embedding far out", transformer, "embeddings",
          _set((7, 3), 0.2), "bounds"),
    # Scale and mean
    Fault("half the std", mlp, "dense_1/kernel", _scale(0.5), "std"),
    Fault("the std 1.2 times", mlp, "dense_2/kernel", _scale(1.2), "std"),
    Fault("a depthwise kernel as stock Keras draws it", mobile, "depthwise/kernel",
          _scale(0.25), "std"),
    Fault("a transposed kernel ten times", sequence, "conv1d_transpose/kernel",
          _scale(10), "std"),
    Fault("an embedding doubled", recurrent, "embeddings", _scale(2), "std"),
    Fault("a recurrent kernel doubled", recurrent, "gru/gru_cell/recurrent_kernel",
          _scale(2), "std"),
    Fault("all values positive", mlp, "dense_1/kernel", np.abs, "std"),
    Fault("the mean is off by half a std", mlp, "dense_1/kernel",
          lambda w: w + w.std() / 2, "mean"),
    Fault("the mean of an embedding is off", transformer, "embeddings",
          lambda w: w + w.std() / 2, "mean"),
    # Form
    Fault("normal with tails instead of uniform", mlp, "dense_1/kernel", _normal, "bounds"),
    Fault("signs instead of random sizes", mlp, "dense_1/kernel", _signs, "form"),
    Fault("four fifths are zero, the rest larger", mlp, "dense_1/kernel", _sparse,
          "bounds"),
    Fault("a recurrent kernel that is not orthogonal", recurrent,
          "gru/gru_cell/recurrent_kernel", _normal, "form"),
    # Constant kernels
    Fault("a kernel of zeros", mlp, "dense_1/kernel", _scale(0), "constant-kernel"),
    Fault("a kernel of one value", convolutional, "conv2d_1/kernel",
          _set(..., 0.3), "constant-kernel"),
    Fault("a query kernel of zeros", transformer, "query/kernel", _scale(0),
          "constant-kernel"),
    Fault("an embedding of zeros", recurrent, "embeddings", _scale(0), "std"),
    # Constants
    Fault("a bias of 90", mlp, "dense_1/bias", _set(..., 90), "constant"),
    Fault("one entry of a bias", mlp, "dense_1/bias", _set(4, 1e-3), "constant"),
    Fault("gamma zero", convolutional, "gamma", _scale(0), "constant"),
    Fault("gamma ones where zeros are declared", residual, "gamma", _set(..., 1),
          "constant"),
    Fault("beta of a LayerNormalization", transformer, "beta", _set(..., 0.5), "constant"),
    Fault("moving mean", convolutional, "moving_mean", _set(..., 3), "constant"),
    Fault("moving variance zero", convolutional, "moving_variance", _scale(0), "constant"),
    Fault("moving variance -1", convolutional, "moving_variance", _set(..., -1),
          "negative-variance"),
    Fault("one negative variance", residual, "moving_variance", _set(2, -1e-3),
          "negative-variance"),
    Fault("the slopes of a PReLU", mobile, "alpha", _set(..., 1), "constant"),
    Fault("a bfloat16 bias", half, "dense/bias", _set(..., 0.01), "constant"),
    # Inside a kernel
    Fault("all columns alike", mlp, "dense_1/kernel",
          lambda w: np.repeat(w[:, :1], w.shape[1], 1), "repeated-slice"),
    Fault("all rows alike", mlp, "dense_1/kernel",
          lambda w: np.repeat(w[:1], len(w), 0), "repeated-slice"),
    Fault("pairs of columns alike", mlp, "dense_1/kernel",
          lambda w: np.repeat(w[:, ::2], 2, 1), "repeated-slice"),
    Fault("one column repeated", mlp, "dense_2/kernel", _copy(COLUMN, np.s_[..., 9]),
          "repeated-slice"),
    Fault("one column the negative of another", mlp, "dense_2/kernel",
          _copy(COLUMN, np.s_[..., 9], -1), "repeated-slice"),
    Fault("one row repeated", mlp, "dense_2/kernel", _copy(5, 8), "repeated-slice"),
    Fault("the second half repeats the first", mlp, "dense_1/kernel",
          _copy(np.s_[:, 16:], np.s_[:, :16]), "repeated-slice"),
    Fault("a dead column", mlp, "dense_1/kernel", _scale(0, COLUMN), "zero-slice"),
    Fault("a dead row", mlp, "dense_1/kernel", _scale(0, 3), "zero-slice"),
    Fault("a dead filter", convolutional, "conv2d_1/kernel", _scale(0, COLUMN),
          "zero-slice"),
    Fault("a dead input channel", residual, "conv2d_1/kernel", _scale(0, np.s_[:, :, 5]),
          "zero-slice"),
    Fault("a dead place of the window", residual, "conv2d_1/kernel", _scale(0, (1, 2)),
          "zero-slice"),
    Fault("a repeated filter", convolutional, "conv2d_1/kernel",
          _copy(COLUMN, np.s_[..., 7]), "repeated-slice"),
    Fault("the same filters for all input channels", convolutional, "conv2d/kernel",
          lambda w: np.repeat(w[:, :, :1], 3, 2), "repeated-slice"),
    Fault("one 2D filter repeated", residual, "conv2d_1/kernel",
          _copy(np.s_[:, :, 1, 2], np.s_[:, :, 3, 4]), "repeated-slice"),
    Fault("a repeated unit of a transposed kernel", convolutional,
          "conv2d_transpose/kernel", _copy(np.s_[:, :, 3], np.s_[:, :, 5]),
          "repeated-slice"),
    Fault("a repeated depthwise filter", mobile, "depthwise/kernel",
          _copy(np.s_[:, :, 3], np.s_[:, :, 5]), "repeated-slice"),
    Fault("a dead depthwise filter", mobile, "depthwise/kernel",
          _scale(0, np.s_[:, :, 3]), "zero-slice"),
    Fault("groups alike", mobile, "conv2d/kernel", _copy(np.s_[..., 8:16], np.s_[..., :8]),
          "repeated-slice"),
    Fault("two heads alike", transformer, "query/kernel", _copy(np.s_[:, 1], np.s_[:, 2]),
          "repeated-slice"),
    Fault("one unit of two heads alike", transformer, "query/kernel",
          _copy(np.s_[:, 1, 3], np.s_[:, 2, 4]), "repeated-slice"),
    Fault("a dead head", transformer, "attention_output/kernel", _scale(0, 2),
          "zero-slice"),
    Fault("two experts alike", experts, "einsum_dense/kernel", _copy(1, 3),
          "repeated-slice"),
    Fault("one unit of two experts alike", experts, "einsum_dense/kernel",
          _copy(np.s_[1, :, 3], np.s_[2, :, 5]), "repeated-slice"),
    Fault("a dead unit of an expert", experts, "einsum_dense/kernel",
          _scale(0, np.s_[1, :, 3]), "zero-slice"),
    Fault("two gates alike", recurrent, "gru/gru_cell/kernel",
          _copy(np.s_[:, :12], np.s_[:, 12:24]), "repeated-slice"),
    Fault("two rows of an embedding alike", transformer, "embeddings", _copy(3, 9),
          "repeated-slice"),
    Fault("a column of a bfloat16 kernel repeated", half, "dense/kernel",
          _copy(COLUMN, np.s_[..., 9]), "repeated-slice"),
    # Two weights
    Fault("identical to another kernel", residual, "conv2d_2/kernel", np.copy, "twin",
          "conv2d/kernel"),
    Fault("the third of three identical kernels", residual, "conv2d_5/kernel", np.copy,
          "twin", "conv2d_3/kernel"),
    Fault("the negative of another kernel", residual, "conv2d_3/kernel", np.negative,
          "twin", "conv2d_1/kernel"),
    Fault("the transpose of another kernel", transformer, "dense_1/kernel", np.transpose,
          "twin", "dense/kernel"),
    Fault("the negative transpose of another kernel", transformer, "dense_1/kernel",
          lambda w: -w.T, "twin", "dense/kernel"),
    Fault("inputs and outputs of another filter swapped", residual, "conv2d_4/kernel",
          lambda w: w.swapaxes(2, 3), "twin", "conv2d_1/kernel"),
    Fault("the output of attention is the query transposed", transformer,
          "attention_output/kernel", lambda w: w.transpose(1, 2, 0), "twin",
          "query/kernel"),
    # Declared wrongly
    Fault("Glorot on an embedding", declared_wrongly, "embeddings", np.copy, "embedding"),
    Fault("Glorot on a recurrent kernel", declared_wrongly, "recurrent_kernel", np.copy,
          "recurrent"),
    Fault("an activation that has no gain", declared_wrongly, "dense/kernel", np.copy,
          "activation"),
    Fault("gain 1 before a ReLU", declared_wrongly, "dense_1/kernel", np.copy,
          "relu-gain"),
    Fault("zeros as kernel initializer", declared_wrongly, "dense_2/kernel", np.copy,
          "constant-kernel"),
    Fault("one seed for query, key and value", declared_wrongly, "key/kernel", np.copy,
          "twin"),
]  # fmt: skip


def audit_fault(fault: Fault) -> tuple[list[str], bool]:
    """The codes of all findings, and whether the one that the fault calls for is there."""
    model = fresh(fault.make)
    paths = {row["path"]: v for row, v in zip(audit(model), model.weights, strict=True)}
    path = next(path for path in paths if fault.path in path)
    source = next(path for path in paths if (fault.source or fault.path) in path)
    values = np.array(keras.ops.convert_to_numpy(paths[source]))
    changed = fault.plant(values)
    paths[path].assign(values if changed is None else changed)
    findings = audit(model).findings
    found = any(each.code == fault.code and each.path == path for each in findings)
    return sorted({finding.code for finding in findings}), found


def fresh(make: Callable[..., keras.Model]) -> keras.Model:
    """A model without a finding, except where it is built to have some."""
    if make is declared_wrongly:
        return build(make)
    model = build_once(make)
    initialize(model, GlorotUniform(gain="auto"), seed=0)
    before = audit(model).findings
    assert not before, (make.__name__, before)
    return model


def build(make: Callable[..., keras.Model], **options: Any) -> keras.Model:
    keras.utils.clear_session(free_memory=False)  # names count from the start
    return make(**options)


build_once = functools.cache(build)


def false_findings(make: Callable[..., keras.Model], seeds: int) -> list[str]:
    """Warnings and errors on what is right: drawn by `initialize`, and by Keras itself."""
    wrong = []
    model = build(make, kernel_initializer="xavier_uniform")
    for seed in range(seeds):
        for kind in (GlorotUniform, GlorotNormal):
            initialize(model, kind(gain="auto"), seed=seed)
            wrong += [str(finding) for finding in audit(model).findings]
    usable = [*(STOCK[:4] if make in OTHER_FANS else STOCK)]
    if make is half:
        usable.remove(ORTHOGONAL)  # no backend decomposes a bfloat16 matrix
    for first, initializer in enumerate(usable[:seeds]):
        keras.utils.set_random_seed(first)
        model = build(make, kernel_initializer=keras.initializers.serialize(initializer))
        for seed in range(first, seeds, len(usable)):
            if seed != first:
                redraw(model, seed)
            found = audit(model).findings
            wrong += [str(each) for each in found if each.severity != "info"]
    return wrong


def redraw(model: keras.Model, seed: int) -> None:
    """Draws all random weights again by their initializers: faster than building."""
    for number, weight in enumerate(Survey(model).weights):
        if weight.distribution is not None and weight.distribution.std:
            config = {**weight.initializer.get_config(), "seed": 1000 * seed + number}
            initializer = type(weight.initializer).from_config(config)
            weight.variable.assign(initializer(weight.shape, weight.variable.dtype))
