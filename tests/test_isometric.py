"""`initialize(model, "isometric")`: a network of any depth keeps what goes in.

The truth is the Jacobian of the whole model, read off its outputs: where all kernels make
pairs the model is a linear function at its start, so differences of outputs are exact.
"""

import hashlib
import math
import random
import tracemalloc
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers, ops
from models import WITH_STATE, Late, attention, mobile, nested_twice

from keras_glorot import GlorotOrthogonal, audit, initialize, layer_fans
from keras_glorot._drawing.distributions import Distribution
from keras_glorot._drawing.matrices import Matrices
from keras_glorot._drawing.mirrored import Mirror, Side
from keras_glorot._keras.tree import Tree
from keras_glorot._models.pairs import Pairs, measure_effect
from keras_glorot._models.survey import Survey
from keras_glorot.recipes.isometric import isometric

ACTIVATIONS = ["relu", "gelu", "silu", "leaky_relu", "softplus"]
HEAD = "its output is one of the model's"


def start(model, **options):
    """By path of the kernel, whether it makes pairs."""
    table = initialize(model, "isometric", seed=1, **options)
    return {row["path"]: row["pairs"] for row in table if row["pairs"] is not None}


def call(model, x) -> Any:
    return ops.convert_to_numpy(model(x.astype("float32"), training=False))


def jacobian(model):
    """Inputs as rows, outputs as columns; the model must be a linear function."""
    shape = model.input_shape[1:]
    size = math.prod(shape)
    images = np.concatenate([np.zeros((1, size)), np.eye(size)]).reshape(-1, *shape)
    outputs = call(model, images).reshape(size + 1, -1).astype(np.float64)
    matrix = outputs[1:] - outputs[0]
    x = np.random.default_rng(0).normal(size=(5, size))
    y = call(model, x.reshape(-1, *shape)).reshape(5, -1)
    np.testing.assert_allclose(y - outputs[0], x @ matrix, atol=2e-4)
    return matrix


def check_isometry(model, factor=1.0):
    """All singular values are the factor; of fewer outputs than inputs, all that can be."""
    found = np.linalg.svd(jacobian(model), compute_uv=False)
    np.testing.assert_allclose(found, factor, atol=1e-4)


def dense(activation, depth, width=32, inputs=16, outputs=16):
    hidden = [layers.Dense(width, activation) for _ in range(depth)]
    return keras.Sequential([keras.Input((inputs,)), *hidden, layers.Dense(outputs)])


def images(*parts):
    return keras.Sequential([keras.Input((4, 4, 4)), *parts])


def conv(filters, size=3, activation="relu", **options):
    return layers.Conv2D(filters, size, padding="same", activation=activation, **options)


def kernel(model, number=0):
    return [each for each in model.weights if "kernel" in each.name][number]


def values(variable) -> np.ndarray:
    return np.array(ops.convert_to_numpy(ops.cast(variable, "float32")))


def change(variable, function):
    changed = values(variable)
    function(changed)
    variable.assign(changed)


# Isometries


@pytest.mark.parametrize("depth", [50, pytest.param(200, marks=pytest.mark.slow)])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_singular_value_is_one(activation, depth):
    model = dense(activation, depth)
    pairs = start(model)
    assert list(pairs.values()) == [*["yes"] * depth, HEAD]
    check_isometry(model)


def test_convolutions_strides_and_flatten():
    """A stride loses nothing: there are as many taps as it leaves out positions."""
    model = images(
        conv(8),
        conv(8, 5, None, dilation_rate=2),
        layers.LeakyReLU(),
        conv(32, 3, "gelu", strides=2),
        layers.Dropout(0.5),
        layers.Flatten(),
        layers.Dense(128, "silu"),
        layers.Dense(64),
    )
    assert list(start(model).values()) == [*["yes"] * 4, HEAD]
    check_isometry(model)


@pytest.mark.parametrize("slope", [0.25, -0.1])
def test_the_slopes_with_which_prelu_starts(slope):
    slopes = keras.initializers.Constant(slope)
    hidden = [(layers.Dense(32), layers.PReLU(slopes)) for _ in range(20)]
    model = keras.Sequential([keras.Input((16,)), *sum(hidden, ()), layers.Dense(16)])
    assert list(start(model).values()) == [*["yes"] * 20, HEAD]
    check_isometry(model)


@pytest.mark.parametrize("activation", [layers.LeakyReLU, layers.ReLU, layers.PReLU])
def test_an_activation_that_is_a_layer(activation):
    hidden = [layers.Dense(32, activation=activation()) for _ in range(3)]
    model = keras.Sequential([keras.Input((16,)), *hidden, layers.Dense(16)])
    assert list(start(model).values()) == ["yes", "yes", "yes", HEAD]
    check_isometry(model)


def test_groups_separable_and_depthwise_layers():
    model = images(
        layers.SeparableConv2D(8, 3, padding="same", activation="relu"),
        layers.DepthwiseConv2D(3, padding="same"),
        conv(8, groups=2),
        layers.DepthwiseConv2D(3, padding="same", activation="relu"),
        layers.Conv2DTranspose(8, 3, padding="same", activation="softplus"),
        conv(4, activation=None),
    )
    pairs = list(start(model).values())
    assert pairs.count("yes") == 3
    assert pairs[-1] == HEAD
    check_isometry(model)


def test_copies_of_a_depthwise_layer():
    model = images(
        conv(8),
        layers.DepthwiseConv2D(3, padding="same", depth_multiplier=4),
        conv(16, activation=None),
    )
    assert "yes" in start(model).values()
    check_isometry(model)


def test_a_separable_layer_copies_what_it_takes():
    """Beside it, another layer takes the same pairs as they are."""
    x = keras.Input((4, 4, 4))
    y = layers.Conv2D(8, 1, activation="relu")(x)
    options = {"padding": "same", "depth_multiplier": 2}
    both = [layers.SeparableConv2D(16, 3, **options)(y), layers.Conv2D(4, 1)(y)]
    model = keras.Model(x, layers.Concatenate()(both))
    assert next(iter(start(model).values())) == "yes"
    jacobian(model)


@pytest.mark.parametrize("pooling", [layers.AveragePooling2D, layers.MaxPooling2D])
def test_pairs_pass_pooling(pooling):
    model = images(conv(8), pooling(2), conv(8), layers.Flatten(), layers.Dense(16))
    assert list(start(model).values()) == ["yes", "yes", HEAD]
    if pooling is layers.AveragePooling2D:
        check_isometry(model, 0.5)


def test_causal_and_channels_first():
    model = keras.Sequential(
        [
            keras.Input((6, 4)),
            layers.Conv1D(8, 3, padding="causal", activation="relu"),
            layers.Permute((2, 1)),
            layers.Reshape((2, 4, 6)),
            layers.Permute((3, 1, 2)),
            layers.Reshape((6, 8)),
            layers.Conv1D(4, 3, padding="causal"),
        ]
    )
    assert list(start(model).values()) == ["yes", HEAD]
    check_isometry(model)


# Every model in which all activations are followed is a linear function at its start.


class Residual(keras.Model):
    """Bare operations, and a layer that is called twice."""

    def __init__(self):
        super().__init__()
        self.first = layers.Dense(16)
        self.inner = layers.Dense(16)
        self.last = layers.Dense(3)

    def build(self, shape):
        self.first.build(shape)
        self.inner.build((None, 16))
        self.last.build((None, 16))

    def call(self, x):
        x = ops.relu(self.first(x))
        x = ops.silu(self.inner(x))
        x = ops.reshape(ops.gelu(self.inner(x)), (-1, 4, 4))
        return self.last(ops.reshape(x, (-1, 16)))


def subclassed():
    model = Residual()
    model.build((None, 8))
    return model


def concatenated():
    x = keras.Input((6,))
    a = layers.Dense(5, "relu")(x)
    b = layers.Dense(8, "gelu")(a)
    c = layers.Concatenate()([b, layers.Dense(4, "relu")(x)])
    d = layers.Concatenate()([layers.Dense(9, "leaky_relu")(c), b])
    return keras.Model(x, [layers.Dense(3)(d), layers.Dense(2)(a)])


def nested():
    inner = keras.Sequential([keras.Input((8,)), layers.Dense(8), layers.ReLU()])
    x = keras.Input((8,))
    return keras.Model(x, layers.Dense(4)(inner(layers.Dense(8, "relu")(x))))


def shared():
    twice = layers.Dense(16, "relu")
    x = keras.Input((16,))
    return keras.Model(x, layers.Dense(4)(twice(twice(layers.Dense(16, "relu")(x)))))


def patches():
    x = keras.Input((4, 4, 2))
    y = layers.Reshape((4, 16))(layers.Conv2D(16, 2, strides=2, activation="relu")(x))
    y = layers.EinsumDense("abc,cde->abde", (None, 2, 8), activation="gelu")(y)
    y = layers.EinsumDense("abde,dec->abc", (None, 6))(y)
    return keras.Model(x, y)


def patches_without_pairs():
    """One matrix for all taps, and nothing else that tells it."""
    x = keras.Input((16, 16, 3))
    y = layers.LayerNormalization()(layers.Conv2D(12, 4, strides=4)(x))
    return keras.Model(x, layers.Dense(3)(layers.Flatten()(y)))


@pytest.mark.parametrize("make", [subclassed, nested, shared, patches])
def test_a_model_in_pairs_is_linear(make):
    model = make()
    pairs = list(start(model).values())
    assert pairs.count("yes") == len(pairs) - 1
    x = np.random.default_rng(0).normal(size=(4, *_input_shape(model)))
    y = call(model, x)
    np.testing.assert_allclose(call(model, -3 * x), -3 * y, atol=1e-4)
    assert np.linalg.norm(y) > 0.3 * np.linalg.norm(x) / math.sqrt(x.size / y.size)


@pytest.mark.parametrize("is_own", [True, False])
def test_branches_that_end_in_an_activation_are_small(is_own):
    x = inputs = keras.Input((16,))
    for _ in range(50):
        y = layers.Dense(16, "relu" if is_own else None)(x)
        x = layers.Add()([x, y if is_own else layers.Activation("relu")(y)])
    model = keras.Model(inputs, x)
    start(model)
    x = np.random.default_rng(0).normal(size=(4, 16))
    assert np.linalg.norm(call(model, x)) < 10 * np.linalg.norm(x)


def _input_shape(model):
    return (8,) if isinstance(model, Residual) else model.input_shape[1:]


def test_concatenation_two_outputs_and_units_without_a_partner():
    model = concatenated()
    pairs = start(model)
    assert [each for each in pairs.values() if each != "yes"] == [HEAD, HEAD]
    alone = keras.Model(model.input, model.layers[1].output)
    x = np.random.default_rng(0).normal(size=(7, 6)).astype("float32")
    y = call(alone, x)
    first = values(model.layers[1].kernel)
    np.testing.assert_array_equal(first[:, 0], -first[:, 1])
    np.testing.assert_allclose(y[:, 0] - y[:, 1], x @ first[:, 0], atol=1e-5)
    assert not np.allclose(first[:, 4], -first[:, 3])


LINES = {
    "negative": lambda x: -x,
    "multiply": lambda x: 3.0 * x,
    "divide": lambda x: x / 4,
    "minus": lambda x: 1.0 - x,
    "add": lambda x: x + x,
    "rescaling": layers.Rescaling(0.5, offset=2.0),
    "positions": lambda x: ops.multiply(x, np.full((3, 1), 2.0, "float32")),
}


@pytest.mark.parametrize("name", LINES)
def test_multiples_are_followed(name):
    """Before the activation and after it; a constant there changes both of a pair."""
    line = LINES[name]
    before = line if name not in ("minus", "rescaling") else lambda x: x
    x = inputs = keras.Input((3, 16))
    for _ in range(3):
        x = line(ops.relu(before(layers.Dense(32)(x))))
    model = keras.Model(inputs, layers.Dense(16)(x))
    assert list(start(model).values()) == [*["yes"] * 3, HEAD]
    check_isometry(model)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        (lambda x: x / np.arange(1.0, 9, dtype="float32"), "other numbers for other units"),
        (lambda x: 1.0 / x, "no multiple, or has a weight"),
        (lambda x: x * x, "no multiple, or has a weight"),
        (lambda x: ops.abs(x), "mixes units or is not known"),
        (lambda x: x - layers.Dense(8)(x), "added to another"),
        (lambda x: layers.Average()([x, layers.Dense(8)(x)]), "added to another"),
        (lambda x: x * layers.Dense(8, "sigmoid")(x), "multiplied by another"),
        (lambda x: x[:, 1:], "leaves out one unit"),
        (lambda x: ops.sum(x, axis=-1, keepdims=True), "mixes units"),
    ],
)
def test_reasons_of_operations(name, reason):
    x = keras.Input((8,))
    model = keras.Model(x, layers.Dense(8)(name(layers.Dense(8, "relu")(x))))
    assert reason in next(iter(start(model).values()))


class Gamma(layers.Layer):
    def build(self, shape):
        self.gamma = self.add_weight(shape=shape[-1:], initializer="ones", name="gamma")

    def call(self, x):
        return x * self.gamma


def test_a_weight_is_no_constant():
    parts = [layers.Dense(8, "relu"), Gamma(), layers.Dense(8)]
    model = keras.Sequential([keras.Input((8,)), *parts])
    assert "has a weight" in next(iter(start(model).values()))


@pytest.mark.parametrize(
    "activation", ["elu", "selu", "mish", "sigmoid", "tanh", "softsign", "tanh_shrink"]
)
def test_depth_keeps_the_std_where_pairs_are_no_line(activation):
    """Each activation gets the std that suits it, and the head gives it back."""
    is_odd = measure_effect(keras.activations.get(activation)).is_odd
    model = dense(activation, 30, 16 if is_odd else 32)
    pairs = start(model)
    assert ("yes" in pairs.values()) is not is_odd
    x = np.random.default_rng(0).normal(size=(500, 16))
    assert np.std(call(model, x)) == pytest.approx(1, rel=0.05)
    assert not audit(model).findings


@pytest.mark.parametrize("activation", ["relu", "gelu", "elu", "selu"])
def test_units_without_partners_keep_the_std(activation):
    """The gain before an activation is the one at the std that z has."""
    x = inputs = keras.Input((64,))
    outputs = []
    for _ in range(15):
        x = layers.Dense(64, activation)(x)
        outputs.append(x)
    model = keras.Model(inputs, outputs)
    assert set(start(model).values()) == {HEAD}
    outputs = model(np.random.default_rng(0).normal(size=(256, 64)).astype("float32"))
    stds = [np.std(ops.convert_to_numpy(output)) for output in outputs]
    assert max(stds) < 2 * min(stds)


def test_units_of_all_kinds_side_by_side():
    """Each with its own level, also the one without a partner."""
    x = keras.Input((16,))
    parts = {name: layers.Dense(16, name) for name in ("elu", "tanh", "relu", "sigmoid")}
    every = [*parts.values(), layers.Dense(7, "selu")]
    y = layers.Concatenate()([part(x) for part in every])
    model = keras.Model(x, layers.Dense(78)(y))
    start(model)
    # Glorot's factor, where 16 inputs meet 8 pairs or 16 units.
    wide = math.sqrt(4 / 3)
    levels = {"elu": 100 * wide, "tanh": 0.3, "relu": wide, "sigmoid": 0.3 * wide}
    stds = {
        name: 4 * np.sqrt(np.mean(values(part.kernel) ** 2)) for name, part in parts.items()
    }
    assert stds == pytest.approx(levels, rel=1e-5)
    inputs = np.random.default_rng(0).normal(size=(2000, 16))
    assert np.std(call(model, inputs)) == pytest.approx(1, abs=0.2)
    assert not audit(model).findings


def test_a_factor_before_the_first_kernel_stays():
    """As that of images, or of embeddings; one behind a kernel is made up for."""
    x = keras.Input((16,))
    y = layers.Activation("tanh")(layers.Dense(16)(x / 4) * 5.0)
    model = keras.Model(x, layers.Dense(16)(y * 7.0))
    start(model)
    x = np.random.default_rng(0).normal(size=(2000, 16))
    assert np.std(call(model, 4 * x)) == pytest.approx(1, rel=0.02)  # 5 standard errors


def test_positions_are_taken_out_or_put_together():
    x = keras.Input((4, 8))
    y = layers.Dense(16, "relu")(x)
    both = [ops.mean(y, axis=1), y[:, 0], ops.max(y, axis=1), ops.sum(y, -2)]
    model = keras.Model(x, layers.Dense(6)(layers.Concatenate()(both)))
    assert list(start(model).values()) == ["yes", HEAD]
    x = np.random.default_rng(0).normal(size=(5, 4, 8))
    np.testing.assert_allclose(call(model, -x), -call(model, x), atol=1e-4)


# What can't be followed is told


def test_attention_and_sums_make_no_pairs():
    model = attention()
    pairs = start(model)
    reasons = [reason for reason in pairs.values() if reason != "yes"]
    assert any("mixes units or is not known" in each for each in reasons)
    assert any("is added to another one" in each for each in reasons)
    assert "normalization" not in pairs


@pytest.mark.parametrize(
    ("between", "reason"),
    [
        ([layers.BatchNormalization(), layers.ReLU()], "a normalization layer follows"),
        ([layers.Activation("tanh")], "its activation is odd"),
        ([layers.Softmax()], "its activation mixes units"),
        ([], "no activation follows"),
        ([layers.Activation("gelu"), layers.Activation("silu")], "a second activation"),
        ([layers.Activation("elu"), layers.Activation("elu")], "a second activation"),
    ],
)
def test_reasons(between, reason):
    parts = [keras.Input((8,)), layers.Dense(8), *between, layers.Dense(8)]
    first, _ = start(keras.Sequential(parts)).values()
    assert reason in first


@pytest.mark.parametrize("other", ["relu", "elu"])
def test_a_kernel_before_activations_of_two_kinds(other):
    x = keras.Input((8,))
    y = layers.Dense(8)(x)
    parts = [layers.Activation(name)(y) for name in ("tanh", other)]
    model = keras.Model(x, layers.Dense(4)(layers.Concatenate()(parts)))
    first, _ = start(model).values()
    assert "activations of two kinds" in first
    np.testing.assert_allclose(np.linalg.svd(values(kernel(model)))[1], 1, rtol=1e-5)


def test_odd_activations_get_orthogonal_kernels():
    model = dense("tanh", 3, 16)
    table = initialize(model, "isometric", seed=1)
    assert table.note.endswith("0 of 4 kernels make pairs.")
    matrix = values(kernel(model, 1))
    square = matrix.T @ matrix
    np.testing.assert_allclose(square, square[0, 0] * np.eye(16), atol=1e-5)


def sine(z):
    return ops.sin(30 * z)


@pytest.mark.parametrize("is_chosen", [True, False])
@pytest.mark.parametrize("where", ["activation", "layer", "operation"])
def test_kernels_that_their_author_scaled_for_a_sine_stay(is_chosen, where):
    """As in SIREN (Sitzmann et al., 2020)."""
    chosen = keras.initializers.RandomUniform(-0.01, 0.01)
    x = inputs = keras.Input((16,))
    for _ in range(2):
        activation = sine if where == "activation" else None
        x = layers.Dense(
            16, activation, kernel_initializer=chosen if is_chosen else "he_normal"
        )(x)
        if where != "activation":
            x = layers.Activation(sine)(x) if where == "layer" else ops.sin(30 * x)
    model = keras.Model(inputs, layers.Dense(1, kernel_initializer=chosen)(x))
    table = initialize(model, "isometric", seed=1)
    first, second, head = (row for row in table if row["pairs"])
    for row in (first, second):
        reason = "its author chose its scale" if is_chosen else "its activation is odd"
        assert row["done"] == ("RandomUniform" if is_chosen else "Orthogonal")
        assert reason in row["pairs"]
    assert head["done"] == "Orthogonal"
    assert audit(model, "isometric").findings == []


def test_a_model_that_can_not_be_followed():
    model = Late(layers.Dense(32, "relu"), layers.Dense(4))
    model.built = True
    model.parts[0].build((None, 32))
    reason = start(model)
    assert all("can't be followed" in each for each in reason.values())
    matrix = values(kernel(model))
    np.testing.assert_allclose(matrix.T @ matrix, 2 * np.eye(32), atol=1e-5)


@pytest.mark.parametrize(
    ("layer", "gain"),
    [
        (lambda: layers.TimeDistributed(layers.Dense(32, "relu")), math.sqrt(2)),
        (lambda: layers.LSTM(32, return_sequences=True), 5 / 3),
        (lambda: layers.SimpleRNN(32, return_sequences=True), 1),
    ],
    ids=["wrapped", "gates", "sum"],
)
def test_a_kernel_that_can_not_be_followed_has_the_gain_of_its_activation(layer, gain):
    """But for a simple recurrent layer: its recurrent kernel adds to the signal."""
    model = keras.Sequential([keras.Input((5, 32)), layer(), layers.Dense(4)])
    start(model)
    lengths = np.linalg.svd(values(kernel(model)), compute_uv=False)
    np.testing.assert_allclose(lengths / lengths[0], 1, atol=1e-5)
    ours = GlorotOrthogonal(gain).stddev(model.weights[0].shape)
    assert values(kernel(model)).std() == pytest.approx(ours, rel=1e-3)
    assert audit(model).findings == audit(model, "isometric").findings == []


def test_other_weights_keep_their_own_initializer():
    model = nested_twice()
    table = initialize(model, "isometric", seed=1)
    for row in table:
        assert (row["pairs"] is None) == (row["fan_in"] is None)
    model = keras.Sequential([keras.Input((5, 4)), layers.LSTM(6), layers.Dense(2)])
    rows = {row["path"].split("/")[-1]: row for row in initialize(model, "isometric", 1)}
    assert rows["recurrent_kernel"]["done"] == "Orthogonal"
    assert rows["recurrent_kernel"]["pairs"] is None


# Deterministic, all or nothing


def digest(model):
    joined = b"".join(values(each).astype("<f4").tobytes() for each in model.weights)
    return hashlib.sha256(joined).hexdigest()[:16]


def test_the_same_bits_on_every_backend():
    """Any change of them is a change of the random stream: see CONTRIBUTING.md."""
    found = []
    for make in (concatenated, patches, mobile):
        model = make()
        start(model)
        found.append(digest(model))
        change(kernel(model), lambda values: values.fill(0))
        start(model)
        assert digest(model) == found[-1]
    assert found == ["6379f3d67ba14064", "34dc1e7861e5db6c", "784dee7755be8244"]


@pytest.mark.parametrize(
    ("activation", "bits"),
    [
        ("relu", "22b9c00009918c01"),
        ("gelu", "4e89578fb9d761f2"),
        ("elu", "5953811e8ec2f177"),
        ("tanh", "d7f3297e7f9abf1a"),
        ("sigmoid", "37c6cadf03050f03"),
        ("mish", "2dcadfbdea6789a0"),
    ],
)
def test_the_same_bits_before_every_activation(activation, bits):
    """Backends compute activations to 1e-7 of each other."""
    model = dense(activation, 3, 15)
    start(model)
    assert digest(model) == bits


def grouped():
    parts = [conv(8, 3, groups=2), conv(12, 3, strides=2, groups=2), conv(8, groups=4)]
    return images(*parts)


@pytest.mark.parametrize("make", [concatenated, patches, mobile, grouped])
def test_a_region_has_the_bits_of_the_whole(make):
    """A process draws its own part of a kernel that is divided among several."""
    survey, rng = Survey(make()), np.random.default_rng(0)
    starts = isometric(survey).by_id
    for weight in survey.weights:
        start = starts.get(id(weight.variable))
        if start is None or start.distribution.mirror is None:
            continue
        draw = start.distribution.region_drawer(weight.shape, "float32", (3,))
        whole = draw(tuple((0, size) for size in weight.shape))
        for _ in range(5):
            cuts = [sorted(rng.integers(0, size + 1, 2)) for size in weight.shape]
            bounds = tuple((int(a), int(b)) for a, b in cuts)
            part = whole[tuple(slice(*each) for each in bounds)]
            np.testing.assert_array_equal(draw(bounds), part)


def test_a_mirrored_kernel_takes_half_of_itself_beside_it():
    """The matrix between the pairs, in float64, and pieces."""
    mirror = Mirror(
        Matrices.from_shape((2048, 2048)),
        (),
        *2 * [Side.of(Pairs.neighbours(1, 2048, 1).partner, 1)],
    )
    distribution = Distribution.mirrored(1.0, mirror)
    distribution.draw((2048, 2048), "float32", (1,), ((0, 1), (0, 1)))
    tracemalloc.start()
    kernel = distribution.draw((2048, 2048), "float32", (1,))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2 * kernel.nbytes


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_every_weight_dtype(dtype):
    if dtype == "float64" and keras.backend.backend() == "jax":
        pytest.skip("JAX has no float64 by default")
    model, single = (
        keras.Sequential(
            [
                keras.Input((8,)),
                layers.Dense(16, "relu", name="first", dtype=policy),
                layers.Dense(8, name="last", dtype=policy),
            ]
        )
        for policy in (dtype, "float32")
    )
    start(model)
    start(single)
    for one, other in zip(model.weights, single.weights, strict=True):
        assert keras.backend.standardize_dtype(one.dtype) == dtype
        if dtype != "float64":
            other = ops.cast(other, dtype)
        np.testing.assert_allclose(values(one), values(other), rtol=1e-6)


@pytest.mark.skipif(keras.backend.backend() == "tensorflow", reason="not on its CPU")
def test_channels_first():
    """An image, in each of the two layouts: the same numbers."""

    def build(layout):
        options = {"data_format": layout}
        shape = (4, 6, 6) if layout == "channels_first" else (6, 6, 4)
        return keras.Sequential(
            [
                keras.Input(shape),
                conv(8, **options),
                layers.DepthwiseConv2D(3, padding="same", **options),
                layers.AveragePooling2D(2, **options),
                conv(12, 2, "gelu", strides=2, groups=2, **options),
                layers.GlobalAveragePooling2D(**options),
                layers.Dense(3),
            ]
        )

    first, last = build("channels_first"), build("channels_last")
    assert list(start(first).values()) == list(start(last).values())
    for one, other in zip(first.weights, last.weights, strict=True):
        np.testing.assert_array_equal(values(one), values(other))
    jacobian(first)


@pytest.mark.parametrize("widths", [(1, 1, 1), (3, 1, 5), (7, 9, 2), (1, 16, 1)])
def test_odd_widths_and_single_units(widths):
    """A unit without a partner stays as an orthogonal matrix has it."""
    hidden = [layers.Dense(width, "relu") for width in widths]
    model = keras.Sequential([keras.Input((5,)), *hidden, layers.Dense(2)])
    pairs = list(start(model).values())
    assert [each == "yes" for each in pairs] == [*(width > 1 for width in widths), False]
    assert np.isfinite(np.concatenate([values(w).reshape(-1) for w in model.weights])).all()
    assert [each for each in audit(model).findings if each.severity != "info"] == []


def test_frozen_layers_are_drawn_too():
    """As `initialize` does it: whether a layer is trained later is another question."""
    model, other = dense("relu", 2), dense("relu", 2)
    model.layers[1].trainable = False
    assert list(start(model).values()) == list(start(other).values())
    np.testing.assert_array_equal(values(kernel(model, 1)), values(kernel(other, 1)))


def test_an_unknown_name_lists_the_recipes():
    with pytest.raises(ValueError, match=r"a recipe: 'isometric'.*Received: .*'isometri'"):
        initialize(dense("relu", 1), "isometri")


def test_nothing_is_left_behind():
    model = attention()
    before = [set(vars(layer)) for layer in Tree(model).layers]
    keras.utils.set_random_seed(3)
    drawn = random.random(), np.random.random()  # noqa: NPY002
    keras.utils.set_random_seed(3)
    start(model)
    assert drawn == (random.random(), np.random.random())  # noqa: NPY002
    assert [set(vars(layer)) for layer in Tree(model).layers] == before


# A part of a model


def named(names, width=16, **options):
    """Dense layers of ReLU."""
    hidden = [layers.Dense(width, "relu", name=name, **options) for name in names]
    return keras.Sequential([keras.Input((width,)), *hidden])


def between(model, first, last) -> np.ndarray:
    """The matrix from the input of one layer to the output of another's kernel."""
    first, last = model.get_layer(first), model.get_layer(last)
    outputs = first(np.eye(16, dtype="float32")) - first(np.zeros((16, 16), "float32"))
    return values(ops.matmul(outputs, last.kernel))


def start_part(model, how):
    """As `start`, of what a mapping draws. Pairs need both sides."""
    rows = initialize(model, how, seed=1).rows
    assert [each for each in audit(model, how).findings if each.severity != "info"] == []
    return {row["path"]: row["pairs"] for row in rows if row["pairs"] is not None}


@pytest.mark.parametrize(
    "how",
    [
        {"^[cd]/": "isometric"},
        {"^c/": "isometric", "^d/": "isometric"},
        {"^[cd]/kernel": "isometric", "": None},
        {"^[abe]/": "xavier_uniform", "": "isometric"},
    ],
)
def test_pairs_between_the_kernels_that_are_drawn(how):
    model = named("abcde")
    initialize(model, seed=2)
    pairs = start_part(model, how)
    assert pairs == {"c/kernel": "yes", "d/kernel": "the next kernel is not drawn with it"}
    found = np.linalg.svd(between(model, "c", "d"), compute_uv=False)
    # Matrices of 16 and 8 (Glorot's 4/3 for both), and a ReLU before that sends no pairs.
    np.testing.assert_allclose(found, [4 / 3 * math.sqrt(2)] * 8 + [0] * 8, atol=1e-5)
    assert np.linalg.matrix_rank(values(model.get_layer("d").kernel)) == 8
    assert {each.code for each in audit(model).findings} == {"relu-gain"}


def test_a_kernel_alone_is_an_orthogonal_matrix():
    model = named("abc")
    start(model)
    assert start_part(model, {"^b/": "isometric"}) == {
        "b/kernel": "the next kernel is not drawn with it"
    }
    matrix = values(model.get_layer("b").kernel)
    np.testing.assert_allclose(matrix.T @ matrix, 2 * np.eye(16), atol=1e-5)


def test_pairs_need_a_bias_that_is_the_same_for_all_units():
    assert start(named("ab", bias_initializer="random_normal"))["a/kernel"] == "yes"
    normal = keras.initializers.RandomNormal(stddev=1.0)
    model = named("ab", bias_initializer=normal)
    reason = "the bias of a is not the same for all units"
    assert next(iter(start(model).values())) == reason
    model = named("ab")
    how = {"kernel$": "isometric", "bias$": normal}
    assert next(iter(start_part(model, how).values())) == reason
    how = {"kernel$": "isometric", "bias$": None}
    assert next(iter(start_part(model, how).values())) == reason
    assert next(iter(start(model).values())) == "yes"
    assert next(iter(start_part(model, how).values())) == "yes"
    assert start(named("ab", bias_initializer="ones"))["a/kernel"] == "yes"


def test_pairs_need_depthwise_kernels_that_are_drawn():
    parts = [conv(8, name="a"), layers.DepthwiseConv2D(3, name="b"), conv(8, name="c")]
    model = images(*parts)
    assert start(model)["a/kernel"] == "yes"
    pairs = start_part(model, {"^[ac]/": "isometric"})
    assert pairs["a/kernel"] == "a depthwise kernel follows that is not drawn with it"


class Tied(keras.Model):
    """Back through a kernel that it came through, or once more through a loop."""

    def __init__(self, is_loop):
        super().__init__()
        self.first, self.inner, self.last = named("abc").layers
        self.loop = layers.TimeDistributed(self.inner) if is_loop else None

    def call(self, x):
        x = self.inner(self.first(x))
        if self.loop:
            return self.last(self.loop(x))
        return self.last(ops.relu(ops.matmul(x, ops.transpose(self.inner.kernel))))


@pytest.mark.parametrize("is_loop", [True, False])
def test_a_kernel_that_is_used_in_two_ways(is_loop):
    model = Tied(is_loop)
    model(np.zeros((2, 3, 16), "float32"))
    first, inner, _ = start(model).values()
    assert first == "the next kernel is used by another operation, too"
    assert inner == "it is used by another operation, too"
    matrix = values(model.inner.kernel)
    np.testing.assert_allclose(matrix.T @ matrix, 2 * np.eye(16), atol=1e-5)


# `audit` finds it sound, and every fault


@pytest.mark.parametrize(
    "make",
    [
        subclassed,
        concatenated,
        nested,
        shared,
        patches,
        patches_without_pairs,
        attention,
        mobile,
        *WITH_STATE,
    ],
)
def test_audit_finds_it_sound(make):
    model = make()
    start(model)
    assert [each for each in audit(model).findings if each.code != "activation"] == []


def _negate_unit(values):
    values[..., 3] *= -1


def _swap_sign(values):
    values[1, 2] *= -1


def _other_matrix(values):
    noise = np.random.default_rng(0).normal(size=values.shape).astype(values.dtype)
    noise = noise[::2, ::2].repeat(2, 0).repeat(2, 1)
    signs = np.array([1, -1])
    values[...] = noise * np.std(values) * np.tile(np.outer(signs, signs), (16, 16))


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (_negate_unit, "Not all pairs are opposite"),
        (_swap_sign, "Not all pairs are opposite"),
        (_other_matrix, "between its pairs is not orthogonal"),
    ],
)
def test_audit_finds_a_planted_fault(fault, message):
    model = dense("relu", 3)
    start(model)
    change(kernel(model, 1), fault)
    (finding,) = audit(model).findings
    assert finding.code == "form"
    assert finding.path.endswith("kernel")
    assert message in finding.message
    with pytest.raises(AssertionError):
        check_isometry(model)


def words():
    return keras.Sequential(
        [
            keras.Input((6,), dtype="int32"),
            layers.Embedding(20, 8),
            layers.Conv1D(16, 3, padding="causal", activation="gelu"),
            layers.GlobalMaxPooling1D(),
            layers.Dense(4),
        ]
    )


def mobile_block():
    return images(conv(40), layers.DepthwiseConv2D(3), conv(8), conv(4, activation=None))


def _negate_largest(values):
    at = np.unravel_index(np.abs(values).argmax(), values.shape)
    values[at] *= -1


def _fill_a_zero(values):
    values[tuple(np.argwhere(values == 0)[0])] = values.max()


def _negate_first(values):
    values[np.nonzero(values)[0][0], :, 0] *= -1


def _scale_pair(values):
    values[..., :2] *= 1.7


def _roll_window(values):
    values[...] = np.roll(values, 1, 0)


def transposed():
    parts = [layers.Conv2DTranspose(8, 3, activation="relu"), conv(8), conv(4)]
    return images(*parts)


def separable():
    parts = [
        layers.SeparableConv2D(8, 3, padding="same", activation="relu") for _ in range(2)
    ]
    return images(*parts, conv(4, activation=None))


NOT_OPPOSITE = "Not all pairs are opposite"
NOT_ORTHOGONAL = "between its pairs is not orthogonal"


@pytest.mark.parametrize(
    ("make", "number", "fault", "message"),
    [
        (mobile_block, 0, _negate_largest, NOT_OPPOSITE),
        (mobile_block, 0, _fill_a_zero, "Beside the tap"),
        (mobile_block, 1, _fill_a_zero, "not one value at the tap"),
        (mobile_block, 1, _negate_first, "not one value at the tap"),
        (mobile_block, 2, _negate_largest, NOT_OPPOSITE),
        (words, 0, _negate_largest, NOT_OPPOSITE),
        (words, 0, _fill_a_zero, "Beside the tap"),
        (attention, 0, _negate_largest, "not an orthogonal matrix"),
        (patches, 0, _negate_largest, NOT_OPPOSITE),
        (patches, 1, _negate_largest, NOT_OPPOSITE),
        (patches, 1, _scale_pair, NOT_ORTHOGONAL),
        (grouped, 1, _negate_largest, NOT_OPPOSITE),
        (grouped, 1, _scale_pair, NOT_ORTHOGONAL),
        (grouped, 2, _roll_window, "Beside the tap"),
        (transposed, 0, _negate_largest, NOT_OPPOSITE),
        (transposed, 0, _roll_window, "Beside the tap"),
        (separable, 1, _negate_largest, NOT_OPPOSITE),
        (separable, 2, _roll_window, "not one value at the tap"),
        (mobile_block, 1, _roll_window, "not one value at the tap"),
        (mobile_block, 2, _scale_pair, NOT_ORTHOGONAL),
    ],
)
def test_audit_finds_a_fault_in_every_kind_of_kernel(make, number, fault, message):
    model = make()
    start(model)
    variable = kernel(model, number)
    change(variable, fault)
    (finding,) = [each for each in audit(model).findings if each.severity != "info"]
    assert finding.code == "form"
    assert message in finding.message


def test_orthogonal_depthwise_kernels_have_signs_by_chance():
    model = mobile_block()
    initialize(model, "xavier_orthogonal", seed=1)
    assert [each for each in audit(model).findings if each.severity != "info"] == []


def test_audit_finds_a_tap_off_the_centre():
    model = images(conv(8), conv(8), conv(4, activation=None))
    start(model)
    change(kernel(model, 1), lambda values: values.__setitem__(..., np.roll(values, 1, 0)))
    (finding,) = audit(model).findings
    assert finding.code == "form"
    assert "Beside the tap" in finding.message
    with pytest.raises(AssertionError):
        check_isometry(model)


def test_audit_finds_a_wrong_scale():
    model = dense("tanh", 3)
    start(model)
    change(kernel(model, 1), lambda values: np.multiply(values, 2, out=values))
    assert [each.code for each in audit(model).findings] == ["std"]


# Parts


def test_audit_finds_a_depthwise_kernel_of_ones_sound():
    """Each channel as it is: with a window of one position, that is one value."""
    model = images(layers.DepthwiseConv2D(1), conv(4))
    start(model)
    assert audit(model).findings == []


@pytest.mark.parametrize(
    ("name", "level", "slope", "is_odd"),
    [
        ("relu", 1, 1, False),
        ("gelu", 1, 1, False),
        ("relu6", 1, 1, False),
        ("elu", 100, 1 + 0.8 / 100, False),  # z + sign(z), and the mean of |z| is 80
        ("selu", 100, 1.0507 * (1 + 0.8 * 1.673 / 100), False),
        ("mish", 100, 1, False),
        ("sigmoid", 0.3, 0.489, False),
        ("exponential", 0.3, 2.093, False),  # e^400 is no number
        ("tanh", 0.3, 0.925, True),
        ("tanh_shrink", 100, 0.992, True),
    ],
)
def test_effects_of_activations(name, level, slope, is_odd):
    effect = measure_effect(keras.activations.get(name))
    assert effect.level == level
    assert effect.slope == pytest.approx(slope, rel=2e-3)
    assert effect.is_odd == is_odd
    assert measure_effect(keras.activations.softmax) is None


def test_neighbours_stay_in_their_group():
    pairs = Pairs.neighbours(1, 10, 2)
    assert pairs.partner.tolist() == [1, 0, 3, 2, -1, 6, 5, 8, 7, -1]
    assert pairs.repeated(2).partner.tolist()[6:10] == [4, 5, -1, -1]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["MobileNetV2", "EfficientNetB0", "DenseNet121", "ResNet50"]
)
def test_applications(name):
    build = getattr(keras.applications, name)
    model = build(weights=None, input_shape=(64, 64, 3), classes=10)
    pairs = start(model)
    assert len(pairs) == len(layer_fans(model))
    assert not [each for each in audit(model).findings if each.severity != "info"]
    x = np.random.default_rng(0).normal(size=(2, 64, 64, 3))
    assert np.isfinite(call(model, x)).all()
