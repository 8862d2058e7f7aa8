"""Gains: the factor on the std that compensates for an activation."""

import functools
import math
import numbers
import re
import warnings
from collections.abc import Callable
from typing import Any

import keras
import numpy as np

from keras_glorot import _backends as backends
from keras_glorot.arguments import suggestion

__all__ = [
    "activation_gain",
    "activation_growth",
    "calculate_gain",
    "is_wave",
    "known_gain",
]

# PyTorch's table (torch.nn.init.calculate_gain), under PyTorch's names. Linear maps keep
# the variance; a sigmoid is taken as linear (Glorot & Bengio, 2010); 5/3 for tanh is
# LeCun's 1.7159 tanh(2x/3) read backwards, as Torch7 rounded it; ReLU halves the second
# moment (He et al., 2015); 3/4 for SELU trades self-normalization for a better gradient.
_TABLE = {
    "linear": 1.0,
    "sigmoid": 1.0,
    "tanh": 5 / 3,
    "relu": math.sqrt(2),
    "selu": 3 / 4,
}
_LINEAR = re.compile("conv(_transpose)?[123]d")  # names that PyTorch has for linear maps
# keras.activations.leaky_relu's own default; PyTorch's is 0.01.
_LEAKY_SLOPE = 0.2

# These mix the units of a layer, so that no factor belongs to one unit.
_COUPLING = {"softmax", "log_softmax", "sparsemax", "glu"}


def calculate_gain(
    nonlinearity: str | Callable[[Any], Any],
    param: float | None = None,
    exact: bool = False,
) -> float:
    """Computes the gain that belongs to a nonlinearity.

    For PyTorch's names these are PyTorch's values:

    | nonlinearity | gain |
    |---|---|
    | `"linear"`, `"conv1d"` ... `"conv_transpose3d"`, `"sigmoid"` | 1 |
    | `"tanh"` | 5/3 |
    | `"relu"` | sqrt(2) |
    | `"leaky_relu"` | sqrt(2 / (1 + slope²)) |
    | `"selu"` | 3/4 |

    Every other activation `f`, and with `exact=True` each of them, has the gain that
    keeps the second moment of a standard normal signal z at one: `1 / sqrt(E[f(z)²])`,
    integrated to 1e-6, or to 1e-4 where a function of your own has a step.

    `gain="auto"` in an initializer uses these gains too, but 1 before SELU, which is its
    exact gain, and 1 before softmax.

    Args:
        nonlinearity: One of PyTorch's names, the name of a Keras activation, or a
            callable that works element by element on a tensor of the backend.
        param: For `"leaky_relu"`: the slope on the negative side. Defaults to 0.2,
            which is Keras's slope; PyTorch's default is 0.01.
        exact: Whether to integrate even if PyTorch's table has a value.

    Returns:
        The gain, a positive float.

    Raises:
        ValueError: If the name is unknown, `param` does not apply, or the function
            mixes units (softmax), vanishes, or is not finite.
        TypeError: If `nonlinearity` is neither a name nor a callable.

    Example:

    >>> calculate_gain("tanh")
    1.6666666666666667
    >>> round(calculate_gain("tanh", exact=True), 4)
    1.5925
    >>> round(calculate_gain("gelu"), 4)
    1.5335

    Reference:

    - [PyTorch's table](https://pytorch.org/docs/stable/nn.init.html)
    - [Glorot & Bengio, 2010](https://proceedings.mlr.press/v9/glorot10a.html)
    - [He et al., 2015](https://arxiv.org/abs/1502.01852)
    """
    if isinstance(nonlinearity, keras.Layer) and not nonlinearity.built:
        # A call would build it, and not for the shape that it will see.
        nonlinearity = type(nonlinearity).from_config(nonlinearity.get_config())
    name = _name(nonlinearity)
    slope = _slope(name, param)
    if name == "leaky_relu":
        moment = (1 + slope**2) / 2  # in PyTorch's table, and exact
        return 1 / math.sqrt(moment)
    if name in _TABLE and not exact:
        return _TABLE[name]
    if name is not None:
        return _gain_by_name(name)
    assert callable(nonlinearity)  # every string has a name
    return _integrated_gain(nonlinearity)


def activation_gain(activation: str | Callable[[Any], Any] | None) -> float:
    """The gain for a layer with this activation: 1 where it has none or mixes units.

    For SELU it is 1 too, its exact gain, with which it normalizes itself; PyTorch's 3/4
    lets the signal of 50 layers fall to a fifth. Also 1, with a warning, where it has a
    gain that can't be computed.
    """
    gain = known_gain(activation)
    if gain is None:
        message = f"Gain 1 is used before the activation {activation!r}: no gain is known."
        warnings.warn(f"{message} Give `gain` as a number instead.", stacklevel=2)
        return 1.0
    return gain


def known_gain(activation: str | Callable[[Any], Any] | None) -> float | None:
    """The gain for a layer with this activation; None where it can't be computed."""
    try:
        if activation is None or _name(activation) in {*_COUPLING, "selu"}:
            return 1.0
        return calculate_gain(activation)
    except Exception:  # from a function of the user: anything
        return None


def activation_growth(
    activation: str | Callable[[Any], Any] | None, std: float = 1.0
) -> float:
    """How much a deviation grows per layer even where the gain keeps the signal level.

    The larger of two factors on variances, for normal z of this std: of a small difference
    between two inputs (and of the gradient), `E[f'(z)²] E[z²] / E[f(z)²]`, and of a
    deviation of the scale, `E[z f(z) f'(z)] / E[f(z)²]`. 1 for ReLU; 1 where it can't be
    told.

    Reference:

    - [Schoenholz et al., 2017](https://arxiv.org/abs/1611.01232)
    """
    try:
        if activation is None or _name(activation) in _COUPLING:
            return 1.0
        return backends.outside_traces(_growth, activation, std)
    except Exception:  # from an activation of the user: anything
        return 1.0


def is_wave(activation: Callable[[Any], Any]) -> bool:
    """Whether a function goes up and down again and again, as a sine does."""

    def turns() -> int:
        steps = np.diff(_evaluate(activation, _FEW))
        signs = np.sign(steps[np.abs(steps) > 1e-4 * np.abs(steps).max()])
        return int(np.count_nonzero(np.diff(signs)))

    try:
        return backends.outside_traces(turns) > 4
    except Exception:  # from an activation of the user: anything
        return False


@functools.cache
def _gain_by_name(name: str) -> float:
    return _integrated_gain(keras.activations.get(name))


def _integrated_gain(function: Callable[[Any], Any]) -> float:
    # Numbers are needed, not symbols.
    moment = _mean(backends.outside_traces(_evaluate, function, _MANY) ** 2)
    if moment <= 0:
        raise ValueError(
            "Argument `nonlinearity` must not be zero wherever a standard normal input "
            f"lies: no gain restores its signal. Received: nonlinearity={function}"
        )
    # Backends compute tanh and the like to 1e-8 of each other; weights must be equal.
    return float(f"{1 / math.sqrt(moment):.7g}")


def _name(nonlinearity: str | Callable[[Any], Any]) -> str | None:
    """The name under which a nonlinearity is known, None for a user's own function."""
    if isinstance(nonlinearity, str):
        if _LINEAR.fullmatch(nonlinearity):
            return "linear"
        try:
            nonlinearity = keras.activations.get(nonlinearity)
        except ValueError:
            raise ValueError(
                "Argument `nonlinearity` must be the name of an activation of Keras or "
                "PyTorch, such as 'tanh', or a callable. "
                f"Received: nonlinearity={nonlinearity!r}."
                f"{suggestion(nonlinearity, dir(keras.activations))}"
            ) from None
    if not callable(nonlinearity):
        raise TypeError(
            "Argument `nonlinearity` must be the name of an activation, such as "
            f"'tanh', or a callable. Received: nonlinearity={nonlinearity} "
            f"(of type {type(nonlinearity)})"
        )
    # Keras keeps several names for one function ("swish", "silu"); its own is the one.
    name = getattr(nonlinearity, "__name__", None)
    if name is not None and getattr(keras.activations, name, None) is nonlinearity:
        return name
    return None


def _slope(name: str | None, param: float | None) -> float:
    if param is None:
        return _LEAKY_SLOPE
    if name != "leaky_relu":
        raise ValueError(
            "Argument `param` must be left out for every nonlinearity but "
            f"'leaky_relu'. Received: param={param} for nonlinearity={name!r}"
        )
    if not isinstance(param, numbers.Real) or not math.isfinite(param):
        raise ValueError(
            "Argument `param` must be a finite number, the slope. "
            f"Received: param={param!r}"
        )
    return float(param)


def _growth(activation: Callable[[Any], Any], std: float) -> float:
    """To two digits."""
    step = 2e-3
    values = _evaluate(lambda z: activation(std * z), _FEW)
    above = _evaluate(lambda z: activation(std * (z + step)), _FEW)
    below = _evaluate(lambda z: activation(std * (z - step)), _FEW)
    slopes = (above - below) / (2 * step)
    scale = _mean(_points_and_weights(_FEW)[0] * values * slopes)
    return max(_mean(slopes**2), scale) / _mean(values**2)


# Beyond |z| = 16 the normal density is below 1e-55. Between two of the many points a kink
# costs the mean 1e-8, a step less than 1e-4.
_REACH = 16.0
_FEW, _MANY = 1 << 12, 1 << 18


@functools.cache
def _points_and_weights(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Evenly spaced values of z; the steps of Keras's activations lie between two."""
    points = (np.arange(count) + 0.5) * (2 * _REACH / count) - _REACH
    density = np.exp(-(points**2) / 2)
    return points, density / density.sum()


def _mean(values: np.ndarray) -> float:
    """The mean of a function of a standard normal z, of which these are the values."""
    return float(values @ _points_and_weights(len(values))[1])


def _evaluate(function: Callable[[Any], Any], count: int) -> np.ndarray:
    """A function's values at so many points."""

    def call(points: np.ndarray) -> np.ndarray:
        result = function(keras.ops.convert_to_tensor(points))
        return np.asarray(keras.ops.convert_to_numpy(result), np.float64)

    points, some = _points_and_weights(count)[0], slice(count // 4, None, count // 64)
    values = call(points)
    if not np.isfinite(values).all():
        raise ValueError(
            f"Argument `nonlinearity` must be finite on [-{_REACH:g}, {_REACH:g}], where a "
            f"standard normal input lies. Received: nonlinearity={function}"
        )
    is_alone = values.shape == (count,)
    if not is_alone or not np.allclose(values[some], call(points[some])):
        raise ValueError(
            "Argument `nonlinearity` must act element by element: one number in, one "
            "number out, whatever the others are. Before one that mixes the units of a "
            f"layer use a gain of 1. Received: nonlinearity={function}"
        )
    return values
