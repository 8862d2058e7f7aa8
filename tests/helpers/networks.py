"""Networks that training works for, of all kinds, and ones that are sick.

Each function of `HEALTHY` gives a model with stock initializers, inputs, targets and a
loss; `benchmarks/evidence/findings.py` shows that a short fit works. Each one of `SICK`
gives a model, inputs, and the codes of findings of which one has to be there.
"""

import keras
import numpy as np
from cases import data, fill
from keras import layers, ops

HEALTHY = {}
SICK = {}


def healthy(function):
    HEALTHY[function.__name__] = function
    return function


def sick(*codes):
    def add(function):
        SICK[function.__name__] = lambda: (*function(), set(codes))
        return function

    return add


# Tasks that need more than one layer ------------------------------------------------------


def vectors(count=768, size=16):
    """Classes by the signs of two projections, which no linear model tells."""
    x = np.random.default_rng(1).standard_normal((count, size)).astype("float32")
    signs = x @ np.random.default_rng(2).standard_normal((size, 2)) > 0
    return x, (signs[:, 0] ^ signs[:, 1]).astype("float32")[:, None]


def images(count=512, size=16):
    """A square or a cross, at a random place, in noise."""
    rng = np.random.default_rng(3)
    x = 0.3 * rng.standard_normal((count, size, size, 1))
    y = rng.integers(2, size=(count, 1))
    square = np.ones((5, 5))
    square[1:4, 1:4] = 0
    cross = np.zeros((5, 5))
    cross[2], cross[:, 2] = 1, 1
    places = rng.integers(size - 5, size=(2, count))
    for image, label, row, column in zip(x, y, *places, strict=True):
        image[row : row + 5, column : column + 5, 0] += 2 * (cross if label else square)
    return x.astype("float32"), y.astype("float32")


def steps(count=512, length=40, size=4):
    """The mean over time of the product of two channels, scaled to variance 1."""
    x = np.random.default_rng(4).standard_normal((count, length, size)).astype("float32")
    y = (x[..., 0] * x[..., 1]).mean(1, keepdims=True) * np.sqrt(length)
    return x, y.astype("float32")


def slow_steps(count=512, length=40, size=4):
    """The same of steps that change slowly."""
    rng = np.random.default_rng(5)
    x = rng.standard_normal((count, 1, size)) + 0.5 * rng.standard_normal(
        (count, length, size)
    )
    y = (x[..., 0] * x[..., 1]).mean(1, keepdims=True)
    return x.astype("float32"), y.astype("float32")


def tokens(count=768, length=24, vocabulary=50):
    """Which of two groups of words there are more of."""
    rng = np.random.default_rng(6)
    group = rng.choice([-1, 0, 0, 1], vocabulary)
    x = rng.integers(vocabulary, size=(count, length))
    return x.astype("int32"), (group[x].sum(1) > 0).astype("float32")[:, None]


BINARY = keras.losses.BinaryCrossentropy(from_logits=True)


# Plain ------------------------------------------------------------------------------------


def dense(activation, depth, width=64, **options):
    hidden = [layers.Dense(width, activation, **options) for _ in range(depth)]
    return keras.Sequential([keras.Input((16,)), *hidden, layers.Dense(1)])


@healthy
def dense_tanh():
    return dense("tanh", 4), *vectors(), BINARY


@healthy
def dense_relu():
    return dense("relu", 5), *vectors(), BINARY


@healthy
def dense_gelu():
    return dense("gelu", 4), *vectors(), BINARY


@healthy
def dense_selu():
    return dense("selu", 8, kernel_initializer="lecun_normal"), *vectors(), BINARY


@healthy
def dense_with_batch_norm():
    parts = [keras.Input((16,))]
    for _ in range(8):
        parts += [layers.Dense(64), layers.BatchNormalization(), layers.ReLU()]
    return keras.Sequential([*parts, layers.Dense(1)]), *vectors(), BINARY


@healthy
def autoencoder():
    x = vectors()[0]
    x = np.concatenate([x[:, :4], x[:, :4] ** 2, np.sin(2 * x[:, :4])], 1)
    widths = (48, 24, 6, 24, 48)
    hidden = [layers.Dense(width, "elu") for width in widths]
    return keras.Sequential([keras.Input((12,)), *hidden, layers.Dense(12)]), x, x, "mse"


class Sampling(layers.Layer):
    def call(self, parts):
        mean, log_variance = parts
        kl = ops.mean(ops.square(mean) + ops.exp(log_variance) - 1 - log_variance)
        self.add_loss(1e-3 * kl)
        return mean


@healthy
def variational_autoencoder():
    x = images(size=16)[0]
    inputs = keras.Input((16, 16, 1))
    h = layers.Conv2D(16, 3, 2, "same", activation="relu")(inputs)
    h = layers.Conv2D(32, 3, 2, "same", activation="relu")(h)
    h = layers.Flatten()(h)
    z = Sampling()([layers.Dense(24)(h), layers.Dense(24)(h)])
    h = layers.Reshape((4, 4, 32))(layers.Dense(512, "relu")(z))
    h = layers.Conv2DTranspose(16, 3, 2, "same", activation="relu")(h)
    return keras.Model(inputs, layers.Conv2DTranspose(1, 3, 2, "same")(h)), x, x, "mse"


# Convolutions -----------------------------------------------------------------------------


def of_images(body, size=16):
    inputs = keras.Input((size, size, 1))
    return keras.Model(inputs, layers.Dense(1)(body(inputs))), *images(size=size), BINARY


def conv(x, filters=16, strides=1, activation="relu"):
    return layers.Conv2D(filters, 3, strides, "same", activation=activation)(x)


def conv_norm(x, filters=16, strides=1, norm=layers.BatchNormalization):
    return layers.ReLU()(norm()(conv(x, filters, strides, None)))


@healthy
def lenet():
    def body(x):
        x = layers.MaxPooling2D()(conv(x, 8, activation="tanh"))
        x = layers.MaxPooling2D()(conv(x, 16, activation="tanh"))
        return layers.Dense(32, "tanh")(layers.Flatten()(x))

    return of_images(body)


@healthy
def vgg():
    def body(x):
        for filters in (16, 32, 64):
            x = layers.MaxPooling2D()(conv(conv(x, filters), filters))
        return layers.Dense(64, "relu")(layers.Flatten()(x))

    return of_images(body)


@healthy
def strides_and_global_pooling():
    def body(x):
        for filters in (16, 32, 64):
            x = conv(x, filters, 2)
        return layers.Dense(32, "relu")(layers.GlobalAveragePooling2D()(x))

    return of_images(body)


@healthy
def all_strides():
    def body(x):
        for filters in (16, 16, 16, 16):
            x = conv(x, filters, 2, "tanh")
        return layers.Flatten()(x)

    return of_images(body)


@healthy
def resnet():
    def body(x):
        x = conv_norm(x)
        for _ in range(4):
            branch = layers.BatchNormalization()(conv(conv_norm(x), activation=None))
            x = layers.ReLU()(layers.Add()([x, branch]))
        return layers.GlobalAveragePooling2D()(x)

    return of_images(body)


@healthy
def mobilenet():
    def body(x):
        x = conv_norm(x, 16, 2)
        for filters, strides in ((16, 1), (32, 2), (32, 1), (32, 1)):
            x = layers.DepthwiseConv2D(3, strides, "same", use_bias=False)(x)
            x = layers.ReLU()(layers.BatchNormalization()(x))
            x = layers.Conv2D(filters, 1, use_bias=False)(x)
            x = layers.ReLU()(layers.BatchNormalization()(x))
        return layers.GlobalAveragePooling2D()(x)

    return of_images(body)


@healthy
def densenet():
    def body(x):
        x = conv(x)
        for _ in range(4):
            new = conv(layers.ReLU()(layers.BatchNormalization()(x)), 8, activation=None)
            x = layers.Concatenate()([x, new])
        return layers.GlobalAveragePooling2D()(layers.BatchNormalization()(x))

    return of_images(body)


@healthy
def inception():
    def body(x):
        x = conv(x)
        for _ in range(2):
            parts = [
                layers.Conv2D(8, k, 1, "same", activation="relu")(x) for k in (1, 3, 5)
            ]
            x = layers.Concatenate()([*parts, layers.MaxPooling2D(3, 1, "same")(x)])
        return layers.GlobalMaxPooling2D()(x)

    return of_images(body)


@healthy
def squeeze_and_excitation():
    def body(x):
        x = conv_norm(x)
        for _ in range(3):
            h = conv_norm(x)
            gate = layers.GlobalAveragePooling2D(keepdims=True)(h)
            gate = layers.Dense(16, "sigmoid")(layers.Dense(4, "relu")(gate))
            x = layers.Add()([x, layers.Multiply()([h, gate])])
        return layers.GlobalAveragePooling2D()(x)

    return of_images(body)


@healthy
def instance_norm():
    def norm():
        return layers.GroupNormalization(-1)

    def body(x):
        for strides in (1, 2, 1, 2):
            x = conv_norm(x, 16, strides, norm)
        return layers.GlobalAveragePooling2D()(x)

    return of_images(body)


@healthy
def mixer():
    def body(x):
        x = layers.Reshape((16, 32))(layers.Conv2D(32, 4, 4)(x))
        for _ in range(2):
            h = layers.Permute((2, 1))(layers.LayerNormalization()(x))
            h = layers.Dense(16)(layers.Dense(32, "gelu")(h))
            x = layers.Add()([x, layers.Permute((2, 1))(h)])
            h = layers.Dense(64, "gelu")(layers.LayerNormalization()(x))
            x = layers.Add()([x, layers.Dense(32)(h)])
        return layers.GlobalAveragePooling1D()(layers.LayerNormalization()(x))

    return of_images(body)


@healthy
def unet():
    x = images()[0]
    y = (x > 1).astype("float32")
    inputs = keras.Input((16, 16, 1))
    first = conv(conv(inputs, 8), 8)
    second = conv(layers.MaxPooling2D()(first), 16)
    h = layers.UpSampling2D()(conv(layers.MaxPooling2D()(second), 32))
    h = layers.UpSampling2D()(conv(layers.Concatenate()([h, second]), 16))
    h = conv(layers.Concatenate()([h, first]), 8)
    return keras.Model(inputs, layers.Conv2D(1, 1)(h)), x, y, BINARY


@healthy
def feature_pyramid():
    """Two outputs, from two levels."""
    x, y = images()
    inputs = keras.Input((16, 16, 1))
    fine = conv(conv(inputs, 16, 2), 16)
    coarse = conv(fine, 32, 2)
    top = layers.Conv2D(16, 1)(coarse)
    merged = layers.Add()([layers.Conv2D(16, 1)(fine), layers.UpSampling2D()(top)])
    head = keras.Sequential(
        [
            keras.Input((None, None, 16)),
            layers.Conv2D(16, 3, padding="same", activation="relu"),
            layers.GlobalMaxPooling2D(),
            layers.Dense(1),
        ]
    )
    return keras.Model(inputs, [head(merged), head(top)]), x, [y, y], [BINARY, BINARY]


# Sequences --------------------------------------------------------------------------------


def of_steps(body, task=slow_steps):
    x, y = task()
    inputs = keras.Input(x.shape[1:])
    return keras.Model(inputs, layers.Dense(1)(body(inputs))), x, y, "mse"


@healthy
def mean_over_steps():
    """Noise, of which the mean over 200 steps is 14 times smaller."""

    def body(x):
        x = layers.Dense(32, "tanh")(layers.Dense(32, "tanh")(x))
        return layers.Dense(32, "tanh")(layers.GlobalAveragePooling1D()(x))

    return of_steps(body, lambda: steps(length=200))


@healthy
def mean_over_slow_steps():
    def body(x):
        x = layers.Dense(32, "tanh")(layers.Dense(32, "tanh")(x))
        return layers.Dense(32, "tanh")(layers.GlobalAveragePooling1D()(x))

    return of_steps(body, lambda: slow_steps(length=200))


@healthy
def attention_pooling():
    def body(x):
        x = layers.Dense(32, "tanh")(layers.Dense(32, "tanh")(x))
        weights = layers.Softmax(axis=1)(layers.Dense(1)(x))
        x = layers.Lambda(lambda parts: ops.sum(parts[0] * parts[1], 1))([weights, x])
        return layers.Dense(32, "tanh")(x)

    return of_steps(body)


@healthy
def temporal_convolutions():
    def body(x):
        for dilation in (1, 2, 4):
            x = layers.Conv1D(32, 3, padding="causal", dilation_rate=dilation,
                              activation="relu")(x)  # fmt: skip
        return layers.Dense(32, "relu")(layers.GlobalAveragePooling1D()(x))

    return of_steps(body)


@healthy
def two_lstms():
    def body(x):
        return layers.LSTM(32)(layers.LSTM(32, return_sequences=True)(x))

    return of_steps(body)


@healthy
def rnn_between_dense_layers():
    def body(x):
        x = layers.SimpleRNN(32)(layers.Dense(32, "tanh")(x))
        return layers.Dense(32, "tanh")(x)

    return of_steps(body)


def of_tokens(body, width=32):
    x, y = tokens()
    inputs = keras.Input(x.shape[1:], dtype="int32")
    h = body(layers.Embedding(50, width)(inputs))
    return keras.Model(inputs, layers.Dense(1)(h)), x, y, BINARY


@healthy
def text_lstm():
    def body(x):
        x = layers.LSTM(32)(layers.LSTM(32, return_sequences=True)(x))
        return layers.Dense(32, "relu")(x)

    return of_tokens(body)


@healthy
def two_way_gru():
    def body(x):
        x = layers.Bidirectional(layers.GRU(16, return_sequences=True))(x)
        return layers.Dense(32, "relu")(layers.Bidirectional(layers.GRU(16))(x))

    return of_tokens(body)


@healthy
def embedding_and_pooling():
    def body(x):
        x = layers.Dense(32, "relu")(layers.GlobalAveragePooling1D()(x))
        return layers.Dense(32, "relu")(x)

    return of_tokens(body)


def attention(x, heads=4):
    return layers.MultiHeadAttention(heads, x.shape[-1] // heads)(x, x)


@healthy
def transformer():
    """Normalization first, and the mean over all positions at the end."""

    def body(x):
        for _ in range(2):
            x = layers.Add()([x, attention(layers.LayerNormalization()(x))])
            h = layers.Dense(64, "gelu")(layers.LayerNormalization()(x))
            x = layers.Add()([x, layers.Dense(32)(h)])
        return layers.GlobalAveragePooling1D()(layers.LayerNormalization()(x))

    return of_tokens(body)


@healthy
def transformer_with_normalization_last():
    def body(x):
        for _ in range(2):
            x = layers.LayerNormalization()(layers.Add()([x, attention(x, 16)]))
            h = layers.Dense(32)(layers.Dense(64, "relu")(x))
            x = layers.LayerNormalization()(layers.Add()([x, h]))
        return layers.GlobalAveragePooling1D()(x)

    return of_tokens(body)


@healthy
def language_model():
    """Each token is the sum of the two before it: an output at each position."""
    x = np.random.default_rng(8).integers(10, size=(512, 16)).astype("int32")
    for position in range(2, 16):
        x[:, position] = (x[:, position - 1] + x[:, position - 2]) % 10
    inputs = keras.Input((15,), dtype="int32")
    h = layers.Embedding(10, 48)(inputs)
    h = layers.Conv1D(48, 2, padding="causal", activation="relu")(h)
    h = layers.Add()([h, layers.MultiHeadAttention(4, 12)(h, h, use_causal_mask=True)])
    h = layers.Dense(96, "relu")(layers.LayerNormalization()(h))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    return keras.Model(inputs, layers.Dense(10)(h)), x[:, :-1], x[:, 1:], loss


# Several parts ----------------------------------------------------------------------------


@healthy
def recommender():
    rng = np.random.default_rng(9)
    x = [rng.integers(20, size=(768, 1)).astype("int32") for _ in range(2)]
    tables = rng.standard_normal((2, 20, 2))
    y = (tables[0][x[0][:, 0]] * tables[1][x[1][:, 0]]).sum(1, keepdims=True)
    ids = [keras.Input((1,), dtype="int32") for _ in range(2)]
    parts = [layers.Flatten()(layers.Embedding(20, 16)(each)) for each in ids]
    h = layers.Dense(32, "relu")(layers.Concatenate()(parts))
    h = layers.Dense(32, "relu")(h)
    return keras.Model(ids, layers.Dense(1)(h)), x, y.astype("float32"), "mse"


@healthy
def siamese():
    """Whether two vectors have the same sign in a direction."""
    x = [vectors()[0], np.roll(vectors()[0], 1, 0)]
    direction = np.random.default_rng(10).standard_normal(16)
    y = ((x[0] @ direction > 0) == (x[1] @ direction > 0)).astype("float32")[:, None]
    tower = keras.Sequential(
        [keras.Input((16,)), layers.Dense(32, "tanh"), layers.Dense(16, "tanh")]
    )
    inputs = [keras.Input((16,)) for _ in range(2)]
    h = layers.Multiply()(list(map(tower, inputs)))
    return keras.Model(inputs, layers.Dense(1)(layers.Dense(16, "relu")(h))), x, y, BINARY


@healthy
def mixture_of_experts():
    x, y = vectors()
    inputs = keras.Input((16,))
    h = layers.Dense(32, "relu")(inputs)
    gates = layers.Dense(4, "softmax")(h)
    experts = [layers.Dense(32)(layers.Dense(32, "relu")(h)) for _ in range(4)]
    mixed = layers.Lambda(lambda parts: ops.einsum("be,ebd->bd", parts[0], parts[1]))(
        [gates, layers.Lambda(ops.stack)(experts)]
    )
    return keras.Model(inputs, layers.Dense(1)(mixed)), x, y, BINARY


@healthy
def highway():
    x, y = vectors()
    inputs = keras.Input((16,))
    h = layers.Dense(32, "relu")(inputs)
    for _ in range(5):
        gate = layers.Dense(32, "sigmoid", bias_initializer=keras.initializers.Constant(-1))
        new, gate = layers.Dense(32, "relu")(h), gate(h)
        h = layers.Lambda(lambda parts: parts[0] * parts[1] + parts[2] * (1 - parts[1]))(
            [new, gate, h]
        )
    return keras.Model(inputs, layers.Dense(1)(h)), x, y, BINARY


# Sick -------------------------------------------------------------------------------------


def deep(activation, depth, gain=1.0, **options):
    hidden = [layers.Dense(64, activation, **options) for _ in range(depth)]
    model = keras.Sequential([keras.Input((16,)), *hidden, layers.Dense(1)])
    return fill(model, gain), data(64, 16)


@sick("vanishing")
def kernels_too_small():
    return deep("tanh", 10, 0.3)


@sick("exploding")
def kernels_too_large():
    return deep("relu", 10, 3.0)


@sick("vanishing")
def relu_100_stock():
    return deep("relu", 100)


@sick("collapsed")
def relu_100_he():
    return deep("relu", 100, 2**0.5)


@sick("vanishing")
def sigmoids():
    return deep("sigmoid", 10)


@sick("unstable-activation")
def gelu_50_at_its_gain():
    return deep("gelu", 50, 1.5335)


@sick("vanishing")
def zero_kernel():
    model, x = deep("tanh", 4)
    model.layers[2].kernel.assign(np.zeros((64, 64)))
    return model, x


@sick("vanishing")
def one_kernel_too_small():
    model, x = deep("relu", 6, 2**0.5)
    model.layers[3].kernel.assign(1e-3 * np.asarray(model.layers[3].kernel))
    return model, x


@sick("dead")
def dead_units():
    return deep("relu", 4, bias_initializer=keras.initializers.Constant(-10.0))


@sick("saturated")
def huge_inputs():
    model, x = deep("tanh", 4)
    return model, 255 * x


@sick("saturated")
def kernels_of_std_1():
    return deep("tanh", 5, 5.6)


@sick("collapsed")
def large_biases():
    bias = keras.initializers.RandomNormal(stddev=3.0, seed=1)
    return deep("tanh", 6, 0.3, bias_initializer=bias)


@sick("not-finite")
def nan_in_a_kernel():
    model, x = deep("tanh", 3)
    model.layers[1].kernel.assign(np.full((64, 64), np.nan))
    return model, x


@sick("vanishing")
def convolutions_30_stock():
    inputs = x = keras.Input((8, 8, 3))
    for _ in range(30):
        x = conv(x, 8)
    x = layers.GlobalAveragePooling2D()(x)
    return fill(keras.Model(inputs, layers.Dense(1)(x))), data(16, 8, 8, 3)


@sick("exploding")
def residual_blocks_without_normalization():
    inputs = keras.Input((16,))
    x = layers.Dense(64)(inputs)
    for _ in range(30):
        x = layers.Add()([x, layers.Dense(64)(layers.Dense(64, "relu")(x))])
    return fill(keras.Model(inputs, layers.Dense(1)(x)), 2**0.5), data(64, 16)


@sick("vanishing")
def kernels_too_small_before_a_mean():
    """The mean over 50 steps is no fault, the kernels are."""
    inputs = x = keras.Input((50, 16))
    for _ in range(6):
        x = layers.Dense(32, "tanh")(x)
    x = layers.Dense(32, "tanh")(layers.GlobalAveragePooling1D()(x))
    return fill(keras.Model(inputs, layers.Dense(1)(x)), 0.3), data(16, 50, 16)


@sick("vanishing")
def depthwise_by_shape():
    """Glorot by the shape of a depthwise kernel, as Keras has it: far too small."""
    inputs = x = keras.Input((8, 8, 32))
    for _ in range(6):
        x = layers.DepthwiseConv2D(3, padding="same", activation="tanh")(x)
    return fill(keras.Model(inputs, layers.Dense(1)(x))), data(16, 8, 8, 32)
