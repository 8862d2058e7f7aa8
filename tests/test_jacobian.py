"""The spread of the Jacobian's singular values: by exact ones, and 1 for isometries."""

import math

import keras
import numpy as np
import pytest
from cases import TOKENS, data, fill
from keras import layers

from keras_glorot import initialize, propagate


def spread(model, x, *rest):
    return propagate(model, x, *rest).rows[-1]["jacobian_spread"]


def tanh_net(depth, outputs, gain=1.0):
    hidden = [layers.Dense(20, "tanh") for _ in range(depth)]
    return fill(
        keras.Sequential([keras.Input((12,)), *hidden, layers.Dense(outputs)]), gain
    )


def singular_values(model, x):
    """Of each example's Jacobian, by the chain rule in float64; 0 where there is none."""
    kernels = [np.float64(kernel) for kernel in model.get_weights()[::2]]
    h, jacobians = np.float64(x), np.eye(x.shape[1])
    for kernel in kernels[:-1]:
        h = np.tanh(h @ kernel)
        jacobians = jacobians @ kernel * (1 - h**2)[:, None]
    return np.linalg.svd(jacobians @ kernels[-1], compute_uv=False)


@pytest.mark.parametrize("outputs", [4, 12, 40])
@pytest.mark.parametrize(("depth", "gain"), [(1, 0.3), (3, 1.0), (20, 1.2)])
def test_spread_of_exact_singular_values(depth, gain, outputs):
    model, x = tanh_net(depth, outputs, gain), data(64, 12)
    squares = singular_values(model, x) ** 2
    expected = (squares**2).mean() / squares.mean() ** 2
    # As the docstring has it, with 0 for what outputs there are more than inputs. c has a
    # truncated normal distribution: its squares vary less than those of a normal one.
    all_squares = np.zeros((64, outputs))
    all_squares[:, : squares.shape[1]] = squares
    parts = (
        all_squares**2 / (all_squares**2).sum()
        - 2 * all_squares / all_squares.sum()
        + 1 / all_squares.size
    )
    error = math.sqrt(2 * (parts**2).sum())
    assert spread(model, x) == pytest.approx(expected, rel=4 * error + 0.01)


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
def test_mirrored_nets_are_isometries(activation):
    hidden = [layers.Dense(32, activation) for _ in range(50)]
    model = keras.Sequential([keras.Input((16,)), *hidden, layers.Dense(16)])
    initialize(model, "isometric", seed=1)
    table = propagate(model, data(64, 16))
    assert table.rows[-1]["jacobian_spread"] == pytest.approx(1, abs=1e-3)
    assert "spread 1x" in table.note
    assert all(row["jacobian_spread"] is None for row in table.rows[:-1])


def test_a_loss_does_not_change_the_spread():
    model, x = tanh_net(2, 4), data(64, 12)
    assert spread(model, x, np.ones((64, 4)), "mse") == spread(model, x)


def test_it_does_not_depend_on_the_scale_of_the_inputs():
    """x and 1000 x, with a first kernel 1000 times smaller."""
    model, x = tanh_net(2, 4), data(64, 12)
    expected = spread(model, x)
    model.layers[0].kernel.assign(np.asarray(model.layers[0].kernel) / 1000)
    assert spread(model, 1000 * x) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("scale", [1e-30, 1e20])
def test_it_does_not_depend_on_the_scale_of_the_outputs(scale):
    model, x = tanh_net(2, 4), data(64, 12)
    expected = spread(model, x)
    model.layers[-1].kernel.assign(np.asarray(model.layers[-1].kernel) * scale)
    assert spread(model, x) == pytest.approx(expected, rel=1e-3)


def test_nothing_overflows_where_the_gradient_is_below_the_normal_numbers():
    model = tanh_net(41, 4, 0.1)
    assert "Gradient vanishes" in str(propagate(model, data(8, 12)))


def test_all_float_inputs_count_and_ids_do_not():
    """Of [2 x, 3 y] the singular values are 2 and 3."""
    ids = keras.Input((7,), dtype="int32")
    x, y = keras.Input((5,)), keras.Input((5,))
    word = layers.GlobalAveragePooling1D()(layers.Embedding(11, 5)(ids))
    left = layers.Add()([layers.Rescaling(2.0)(x), word])
    outputs = layers.Concatenate()([left, layers.Rescaling(3.0)(y)])
    model = fill(keras.Model([ids, x, y], layers.Dense(10, use_bias=False)(outputs)))
    model.layers[-1].kernel.assign(np.eye(10))
    found = spread(model, [TOKENS, data(12, 5), data(12, 5)[::-1]])
    # 60 values of 4 and of 9: an error of sqrt(2 / 120) * |81 / 48.5 - 36 / 13 ...| < 1 %.
    assert found == pytest.approx(48.5 / 6.5**2, rel=0.04)


def test_inputs_by_names_in_another_order_than_that_of_the_alphabet():
    one, other = keras.Input((6,), name="z"), keras.Input((3,), name="a")
    outputs = layers.Dense(4)(layers.Concatenate()([one, other]))
    model = fill(keras.Model({"z": one, "a": other}, outputs))
    found = spread(model, {"z": data(12, 6), "a": data(12, 3)})
    values = np.linalg.svd(model.layers[-1].kernel, compute_uv=False)
    expected = np.mean(values**4) / np.mean(values**2) ** 2
    assert found == pytest.approx(expected, rel=0.2)


class Round(layers.Layer):
    """Its gradient is that of the identity, which its values do not show."""

    def call(self, x):
        return x + keras.ops.stop_gradient(keras.ops.round(x) - x)


def test_no_spread_where_it_can_not_be_told():
    inputs = keras.Input((7,), dtype="int32")
    x = layers.Flatten()(layers.Embedding(11, 8)(inputs))
    by_ids = fill(keras.Model(inputs, layers.Dense(3)(x)))
    table = propagate(by_ids, TOKENS)
    assert table.rows[-1]["jacobian_spread"] is None
    assert table.note == ""
    steps = [keras.Input((12,)), layers.Dense(8), Round(), layers.Dense(4)]
    assert spread(fill(keras.Sequential(steps)), data(16, 12)) is None
    zero = tanh_net(2, 4)
    zero.layers[0].kernel.assign(np.zeros((12, 20)))
    assert spread(zero, data(8, 12)) is None
