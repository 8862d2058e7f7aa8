"""The singular values of every kind of layer, counted by differentiation.

Nothing here knows a kernel's axes, taps or groups: only the Jacobian of the layer.
"""

import math

import keras
import numpy as np
import pytest
from layer_kinds import CONFIGURATIONS_PER_LAYER, KINDS

from keras_glorot import GlorotOrthogonal, compute_fans

pytestmark = pytest.mark.skipif(
    keras.backend.backend() != "jax", reason="differentiates with jax.jacrev"
)
layers = keras.layers


def singular_values(layer, shape):
    """Those of the map from one input, without its batch axis, that are not zero."""
    import jax
    import jax.numpy as jnp

    x = jnp.zeros((1, *shape))
    layer.build(x.shape)
    values = [variable.value for variable in layer.trainable_variables]

    def run(x):
        return layer.stateless_call(values, [], x)[0]

    jacobian = np.asarray(jax.jacrev(run)(x), np.float64).reshape(-1, x.size)
    found = np.linalg.svd(jacobian, compute_uv=False)
    return found[found > 1e-6 * found.max()]


MAPS = [kind for kind in KINDS if not kind.endswith("Cell") and "LSTM" not in kind]


@pytest.mark.slow
@pytest.mark.parametrize("number", range(CONFIGURATIONS_PER_LAYER))
@pytest.mark.parametrize("kind", MAPS)
def test_all_singular_values_are_equal(kind, number):
    rng = np.random.default_rng([list(KINDS).index(kind), number])
    with keras.saving.custom_object_scope({"glorot_uniform": GlorotOrthogonal}):
        layer, shape = KINDS[kind](rng)
    if isinstance(layer, layers.SeparableConv1D | layers.SeparableConv2D):
        # The second half as an identity; it is a convolution, and among the others.
        layer.filters = shape[-1] * layer.depth_multiplier
        identity = np.eye(layer.filters).reshape((1,) * len(layer.kernel_size) + (-1,))
        layer.pointwise_initializer = lambda shape, dtype: identity.reshape(shape)
    found = singular_values(layer, shape)
    np.testing.assert_allclose(found, found[0], rtol=1e-5)


same = {"padding": "same"}


@pytest.mark.parametrize(
    ("kind", "arguments", "shape", "inputs", "outputs"),
    [
        ("Dense", {"units": 9}, (4,), 4, 9),
        ("Dense", {"units": 5}, (5,), 5, 5),
        ("Conv2D", {"filters": 4, "kernel_size": 3, **same}, (5, 4, 4), 4, 4),
        ("Conv2D", {"filters": 6, "kernel_size": 2, **same}, (4, 4, 3), 3, 6),
        ("Conv2D", {"filters": 6, "kernel_size": 3, "strides": 2}, (6, 5, 3), 3, 6),
        ("Conv2D", {"filters": 6, "kernel_size": 3, "groups": 3}, (5, 5, 9), 3, 2),
        ("Conv1D", {"filters": 4, "kernel_size": 3, "padding": "causal"}, (7, 4), 4, 4),
        ("Conv2DTranspose", {"filters": 5, "kernel_size": 3}, (3, 3, 4), 4, 5),
        ("DepthwiseConv2D", {"kernel_size": 3, **same}, (4, 4, 3), 1, 1),
        ("DepthwiseConv2D", {"kernel_size": 3, "depth_multiplier": 3}, (4, 4, 2), 1, 3),
        (
            "EinsumDense",
            {"equation": "abc,cde->abde", "output_shape": (3, 2, 4)},
            (3, 6),
            6,
            8,
        ),
        ("EinsumDense", {"equation": "bei,eio->beo", "output_shape": (4, 6)}, (4, 6), 6, 6),
    ],
)
def test_singular_values(kind, arguments, shape, inputs, outputs):
    """Glorot's variance: gain sqrt(2 max / (inputs + outputs)), whatever the window."""
    name = "depthwise_initializer" if kind == "DepthwiseConv2D" else "kernel_initializer"
    layer = getattr(layers, kind)(**arguments, **{name: GlorotOrthogonal(seed=1)})
    wanted = math.sqrt(2 * max(inputs, outputs) / (inputs + outputs))
    np.testing.assert_allclose(singular_values(layer, shape), wanted, rtol=1e-5)


@pytest.mark.parametrize("padding", ["same", "causal"])
@pytest.mark.parametrize("size", [2, 3, 4])
def test_no_position_is_lost_at_a_border(padding, size):
    layer = layers.Conv1D(4, size, padding=padding, kernel_initializer="xavier_orthogonal")
    assert len(singular_values(layer, (7, 4))) == 28


def test_transposed_convolutions_lose_no_position():
    for stride in (1, 2, 3):
        layer = layers.Conv1DTranspose(
            4, 3, stride, "same", kernel_initializer="xavier_orthogonal"
        )
        assert len(singular_values(layer, (5, 4))) == 20


@pytest.mark.parametrize("kind", ["SimpleRNNCell", "LSTMCell", "GRUCell"])
def test_recurrent_kernels_are_square(kind):
    """One matrix for each gate; the input kernel is one matrix for all gates."""
    cell = getattr(layers, kind)(
        6, kernel_initializer="xavier_orthogonal", recurrent_initializer="xavier_orthogonal"
    )
    cell.build((None, 6))
    recurrent, kernel = (
        np.asarray(keras.ops.convert_to_numpy(weight), np.float64)
        for weight in (cell.recurrent_kernel, cell.kernel)
    )
    for weight, blocks in ((recurrent, recurrent.shape[1] // 6), (kernel, 1)):
        std = math.sqrt(2 / sum(compute_fans(weight.shape)))
        for gate in np.split(weight, blocks, axis=1):
            found = np.linalg.svd(gate, compute_uv=False)
            np.testing.assert_allclose(found, std * math.sqrt(max(gate.shape)), rtol=1e-5)


def test_convolutional_recurrent_kernels_are_square():
    layer = layers.ConvLSTM2D(4, 3, recurrent_initializer="xavier_orthogonal")
    layer.build((None, 5, 6, 6, 2))
    kernel = np.asarray(layer.cell.recurrent_kernel)
    assert np.count_nonzero(kernel) == 4 * 16
    for gate in np.split(kernel[1, 1], 4, axis=1):
        found = np.linalg.svd(gate, compute_uv=False)
        np.testing.assert_allclose(found, found[0], rtol=1e-5)


def test_a_deep_linear_network_keeps_every_length():
    x = keras.Input((6, 6, 8))
    y = x
    for _ in range(20):
        y = layers.Conv2D(8, 3, padding="same", kernel_initializer="xavier_orthogonal")(y)
        y = layers.DepthwiseConv2D(
            3, padding="same", depthwise_initializer="xavier_orthogonal"
        )(y)
        y = layers.SeparableConv2D(
            8,
            3,
            padding="same",
            depthwise_initializer="xavier_orthogonal",
            pointwise_initializer="xavier_orthogonal",
        )(y)
    images = np.random.default_rng(0).standard_normal((2, 6, 6, 8)).astype("float32")
    out = np.asarray(keras.Model(x, y)(images))
    lengths = [np.linalg.norm(each.reshape(2, -1), axis=1) for each in (images, out)]
    np.testing.assert_allclose(*lengths, rtol=1e-4)
