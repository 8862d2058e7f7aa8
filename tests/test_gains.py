"""Gains: PyTorch's numbers for PyTorch's names, an integral for everything else."""

import itertools
import math
import threading

import keras
import numpy as np
import pytest
from scipy import integrate, special, stats

from keras_glorot import GlorotUniform, calculate_gain
from keras_glorot.gains import activation_gain, activation_growth

TORCH = {  # torch.nn.init.calculate_gain(name), torch 2.13
    "linear": 1,
    "conv1d": 1,
    "conv2d": 1,
    "conv3d": 1,
    "conv_transpose1d": 1,
    "conv_transpose2d": 1,
    "conv_transpose3d": 1,
    "sigmoid": 1,
    "tanh": 1.6666666666666667,
    "relu": 1.4142135623730951,
    "selu": 0.75,
}

SELU_ALPHA, SELU_SCALE = 1.6732632423543772, 1.0507009873554805

# f written again in NumPy and SciPy, and where its kinks and steps lie.
EXACT = {
    "celu": (lambda z: np.where(z > 0, z, np.expm1(z)), [0]),
    "elu": (lambda z: np.where(z > 0, z, np.expm1(z)), [0]),
    "exponential": (np.exp, []),
    "gelu": (lambda z: z * special.ndtr(z), []),
    "hard_shrink": (lambda z: np.where(np.abs(z) > 0.5, z, 0), [-0.5, 0.5]),
    "hard_sigmoid": (lambda z: np.clip(z / 6 + 0.5, 0, 1), [-3, 3]),
    "hard_silu": (lambda z: z * np.clip(z / 6 + 0.5, 0, 1), [-3, 3]),
    "hard_swish": (lambda z: z * np.clip(z / 6 + 0.5, 0, 1), [-3, 3]),
    "hard_tanh": (lambda z: np.clip(z, -1, 1), [-1, 1]),
    "leaky_relu": (lambda z: np.where(z > 0, z, 0.2 * z), [0]),
    "linear": (lambda z: z, []),
    "log_sigmoid": (special.log_expit, []),
    "mish": (lambda z: z * np.tanh(np.logaddexp(0, z)), []),
    "relu": (lambda z: np.maximum(z, 0), [0]),
    "relu6": (lambda z: np.clip(z, 0, 6), [0, 6]),
    "selu": (
        lambda z: SELU_SCALE * np.where(z > 0, z, SELU_ALPHA * np.expm1(z)),
        [0],
    ),
    "sigmoid": (special.expit, []),
    "silu": (lambda z: z * special.expit(z), []),
    "soft_shrink": (
        lambda z: np.sign(z) * np.maximum(np.abs(z) - 0.5, 0),
        [-0.5, 0.5],
    ),
    "softplus": (lambda z: np.logaddexp(0, z), []),
    "softsign": (lambda z: z / (1 + np.abs(z)), [0]),
    "sparse_plus": (
        lambda z: np.where(z > 1, z, np.where(z > -1, (z + 1) ** 2 / 4, 0)),
        [-1, 1],
    ),
    "sparse_sigmoid": (lambda z: np.clip((z + 1) / 2, 0, 1), [-1, 1]),
    "squareplus": (lambda z: (z + np.sqrt(z * z + 4)) / 2, []),
    "swish": (lambda z: z * special.expit(z), []),
    "tanh": (np.tanh, []),
    "tanh_shrink": (lambda z: z - np.tanh(z), []),
}
# Beyond these Keras has some that mix the units of a layer, and one with arguments.
MIXING = [(name,) for name in ("glu", "log_softmax", "softmax", "sparsemax")]
NO_GAIN = {name for (name,) in MIXING} | {"threshold"}


def integral(f, kinks):
    def integrand(z):
        return f(z) ** 2 * stats.norm.pdf(z)

    edges = [-30, *kinks, 30]
    moment = sum(
        integrate.quad(integrand, a, b, epsabs=1e-13, epsrel=1e-12, limit=500)[0]
        for a, b in itertools.pairwise(edges)
    )
    return 1 / math.sqrt(moment)


@pytest.mark.parametrize("name", TORCH)
def test_torch_names(name):
    assert calculate_gain(name) == pytest.approx(TORCH[name], rel=1e-15)


@pytest.mark.skipif(keras.backend.backend() != "torch", reason="PyTorch is the oracle")
def test_equal_to_torch():
    import torch.nn.init as torch_init

    for name in TORCH:
        assert calculate_gain(name) == pytest.approx(torch_init.calculate_gain(name))
    for slope in (0.0, 0.01, 0.2, 1.0, -0.5, 3):
        assert calculate_gain("leaky_relu", slope) == pytest.approx(
            torch_init.calculate_gain("leaky_relu", slope), rel=1e-15
        )


def test_leaky_relu_default_is_keras_slope():
    assert calculate_gain("leaky_relu") == calculate_gain("leaky_relu", 0.2)
    z = keras.ops.convert_to_tensor([-1.0])
    assert float(keras.activations.leaky_relu(z)[0]) == pytest.approx(-0.2)


@pytest.mark.parametrize("name", EXACT)
def test_exact_gain_is_the_integral(name):
    if not hasattr(keras.activations, name):
        pytest.skip(f"this Keras has no {name}")
    assert calculate_gain(name, exact=True) == pytest.approx(
        integral(*EXACT[name]), rel=1e-6
    )


# Printed once; equal on every backend, or weights would differ between them.
SEVEN_DIGITS = {
    "tanh": 1.592537,
    "gelu": 1.53353,
    "silu": 1.676532,
    "softsign": 2.337533,
}


@pytest.mark.parametrize("name", SEVEN_DIGITS)
def test_integrated_gains_have_the_same_bits_everywhere(name):
    assert calculate_gain(name, exact=True) == SEVEN_DIGITS[name]


def test_every_keras_activation_is_covered():
    public = {
        name
        for name in dir(keras.activations)
        if not name.startswith("_") and callable(getattr(keras.activations, name))
    } - {"get", "serialize", "deserialize"}
    assert public <= set(EXACT) | NO_GAIN


@pytest.mark.parametrize("place", [0.3, -1.2345, 3.3])
def test_steps_and_kinks_anywhere(place):
    """The points know nothing of these places."""
    step = calculate_gain(lambda z: keras.ops.cast(z > place, "float32"))
    assert step == pytest.approx(1 / math.sqrt(stats.norm.sf(place)), rel=1e-4)
    kink = calculate_gain(lambda z: keras.ops.relu(z - place))
    exact = integral(lambda z: np.maximum(z - place, 0), [place])
    assert kink == pytest.approx(exact, rel=1e-6)


def test_callables():
    assert calculate_gain(keras.activations.tanh) == 5 / 3
    assert calculate_gain(lambda z: keras.ops.sin(z)) == pytest.approx(
        integral(np.sin, []), rel=1e-6
    )
    assert calculate_gain(lambda z: 2 * z) == 0.5


def test_a_layer_is_not_built_by_asking_for_its_gain():
    layer = keras.layers.PReLU(keras.initializers.Constant(0.3))
    assert calculate_gain(layer) == pytest.approx(calculate_gain("leaky_relu", 0.3))
    assert layer(np.ones((2, 5), "float32")).shape == (2, 5)
    assert tuple(layer.alpha.shape) == (5,)


def test_selu_normalizes_itself_at_its_exact_gain():
    """50 layers hold the signal; with PyTorch's 3/4 they let it fall to a fifth."""
    assert calculate_gain("selu") == 0.75
    assert activation_gain(keras.activations.selu) == 1
    rng = np.random.default_rng(0)
    for gain, expected in ((activation_gain(keras.activations.selu), 1.0), (0.75, 0.2)):
        h = rng.standard_normal((200, 300))
        for _ in range(50):
            z = h @ (rng.standard_normal((300, 300)) * gain / math.sqrt(300))
            h = 1.0507009873554805 * np.where(z > 0, z, 1.6732632423543772 * np.expm1(z))
        assert h.std() == pytest.approx(expected, rel=0.25)


@pytest.mark.parametrize(
    ("name", "expected"),
    # By integration on 2.4 million points: E[f'²] / E[f²] of tanh and SELU,
    # E[z f f'] / E[f²] of GELU and SiLU; 1 for what is homogeneous.
    [("relu", 1.0), ("linear", 1.0), ("leaky_relu", 1.0), ("gelu", 1.144),
     ("silu", 1.173), ("tanh", 1.178), ("selu", 1.071), ("softmax", 1.0)],
)  # fmt: skip
def test_how_much_a_deviation_grows(name, expected):
    assert activation_growth(keras.activations.get(name)) == pytest.approx(
        expected, abs=3e-3
    )


@pytest.mark.parametrize(
    ("name", "std", "expected"),
    # As above.
    [("relu", 0.1, 1.0), ("gelu", 0.1, 1.018), ("tanh", 0.25, 1.004)],
)
def test_deviations_grow_less_at_a_low_level(name, std, expected):
    found = activation_growth(keras.activations.get(name), std)
    assert found == pytest.approx(expected, abs=3e-3)


def test_the_growth_of_what_is_not_known_is_one():
    assert activation_growth(None) == 1
    assert activation_growth(lambda z: z / 0) == 1
    assert activation_growth(lambda z: 0 * z) == 1


def test_activation_gain():
    assert activation_gain(None) == 1
    assert activation_gain(keras.activations.softmax) == 1
    assert activation_gain(keras.activations.relu) == math.sqrt(2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("no_such_function",), "Argument `nonlinearity` must be the name"),
        # (Keras's sparsemax is zero on many points.)
        *((name, "element by element.*a gain of 1|must not be zero") for name in MIXING),
        (("relu", 0.1), "Argument `param` must be left out"),
        (("leaky_relu", math.nan), "Argument `param` must be a finite number"),
        (("leaky_relu", "0.1"), "Argument `param` must be a finite number"),
        ((lambda z: z * 0,), "must not be zero"),
        ((lambda z: 1 / (z * 0),), "must be finite"),
        ((lambda z: z[:1],), "must act element by element"),
        ((lambda z: z - keras.ops.mean(z),), "must act element by element"),
    ],
)
def test_bad_values(arguments, message):
    with pytest.raises(ValueError, match=message):
        calculate_gain(*arguments)


@pytest.mark.parametrize("nonlinearity", [3, None])
def test_bad_types(nonlinearity):
    with pytest.raises(TypeError, match="Argument `nonlinearity` must be the name"):
        calculate_gain(nonlinearity)


def test_named_gain_in_an_initializer():
    shape = (30, 50)
    assert GlorotUniform("tanh").stddev(shape) == pytest.approx(
        5 / 3 * GlorotUniform().stddev(shape)
    )
    assert GlorotUniform("gelu").limit(shape) == pytest.approx(
        1.53353 * GlorotUniform().limit(shape)
    )


def test_without_a_thread_to_be_had(monkeypatch):
    def exhausted(self):
        raise RuntimeError("can't start new thread")

    expected = calculate_gain(lambda z: keras.ops.sin(z))
    monkeypatch.setattr(threading.Thread, "start", exhausted)
    assert calculate_gain(lambda z: keras.ops.sin(z)) == expected

    def broken(z):
        raise RuntimeError("of its own")

    with pytest.raises(RuntimeError, match="of its own"):
        calculate_gain(broken)
