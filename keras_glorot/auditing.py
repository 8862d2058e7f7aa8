"""`audit`: what initialization did to a model, and where it went wrong."""

import math
from collections import Counter
from typing import Any, NamedTuple

import keras
import ml_dtypes
import numpy as np

from keras_glorot import keras_bridge
from keras_glorot.declared import (
    Law,
    activation_after,
    check_built,
    initializer_of,
    is_kernel,
    law_of,
)
from keras_glorot.fans import Fans, compute_fans, variable_fans
from keras_glorot.gains import activation_gain
from keras_glorot.initializers import GlorotNormal, GlorotUniform
from keras_glorot.keras_bridge import Target
from keras_glorot.sampling import TRUNCATED_STD
from keras_glorot.tables import Finding, Table

__all__ = ["audit"]

# Of a normal distribution. One right tensor in 500 million is beyond it, so that a model
# of a thousand weights is called wrong once in half a million times.
_SIGMAS = 6.0
# What is significant can still be too small to matter.
_TOLERANCE = 0.05
# Elements looked at together: their float64 copy stays in the cache.
_CHUNK = 1 << 16
# In fewer values than this, two tensors of half precision can be alike by chance.
_FEWEST_ALIKE = 8
_RELU_LIKE = ("relu", "relu6", "leaky_relu", "gelu", "silu", "hard_silu", "mish")
_GLOROT = (
    keras.initializers.GlorotNormal,
    keras.initializers.GlorotUniform,
    GlorotNormal,
    GlorotUniform,
)


def audit(model: keras.Layer) -> Table:
    """Compares each fresh weight of a built model with what it was declared to be.

    For each variable: the std that its initializer should give, with the fans that its
    layer really has, and the std, mean and range that it has. Read only; no data needed.
    Findings are of three kinds: "error" (values no training can start from: not finite,
    constant kernels, twins), "warning" (not the declared distribution, or Glorot where it
    does not belong) and "info" (Glorot with gain 1 in front of a ReLU or its kin).

    A kernel is also right if it is what `initialize` draws: Glorot, with gain 1 or that of
    the activation. Scale and mean are called wrong where they are off by more than 5 % and
    by six standard errors, so small tensors are given the benefit of the doubt. A trained
    model is not fresh: expect its kernels to be off.

    Args:
        model: A built layer or model.

    Returns:
        A `Table` with a row per variable. `print` it, or take its `.rows` and `.findings`.

    Raises:
        ValueError: If the model is not built.
        TypeError: If it is not a Keras layer or model.

    Example:

    >>> print(keras_glorot.audit(keras.applications.MobileNetV2(weights=None)))
    """
    check_built(model)
    members = {id(layer) for layer in keras_bridge.sublayers(model)}
    rows, findings, twins = [], [], {}
    for owner, variable, fans in variable_fans(model):
        weight = _look_up(owner, variable, fans, members)
        drawn = (
            _statistics(variable) if keras.backend.is_float_dtype(variable.dtype) else None
        )
        right = _right_law(weight, drawn)
        rows.append(_row(weight, drawn, right))
        for severity, *texts in _find(weight, drawn, right, twins) if drawn else ():
            findings.append(Finding(severity, variable.path, *texts))
    columns = ("path", "shape", "right_std", "std", "ratio", "fan_in", "fan_out", "layer",
               "initializer")  # fmt: skip
    counts = Counter(finding.severity for finding in findings)
    note = f"{len(rows)} variables: {counts['error']} errors, {counts['warning']} warnings."
    return Table("audit", rows, findings, columns, note)


class _Weight(NamedTuple):
    """A variable and what the model says about it."""

    owner: keras.Layer | None
    variable: keras.Variable
    fans: Fans | None
    initializer: Any  # None if it is not known
    law: Law | None  # that of the initializer, with the right fans
    activation: Any  # behind a kernel
    kernel: bool


class _Statistics(NamedTuple):
    size: int
    mean: float
    std: float
    low: float
    high: float


def _look_up(owner, variable, fans: Fans | None, members: set[int]) -> _Weight:
    try:
        initializer, argument = initializer_of(owner, variable)
    except Exception:  # from a layer of the user: anything
        return _Weight(owner, variable, fans, None, None, None, False)
    law = law_of(initializer, tuple(variable.shape), fans, Target(owner, variable))
    kernel = is_kernel(variable, fans, initializer, argument)
    activation = activation_after(owner, variable, members) if kernel else None
    return _Weight(owner, variable, fans, initializer, law, activation, kernel)


def _statistics(variable: keras.Variable) -> _Statistics:
    """One pass in float64: a float32 sum over a large kernel loses its digits."""
    values = np.asarray(keras.ops.convert_to_numpy(variable)).reshape(-1)
    if not values.size:
        return _Statistics(0, 0.0, 0.0, 0.0, 0.0)
    total = squares = 0.0
    low, high = math.inf, -math.inf
    for start in range(0, values.size, _CHUNK):
        chunk = values[start : start + _CHUNK].astype(np.float64)
        low, high = (
            np.minimum(low, chunk.min()),
            np.maximum(high, chunk.max()),
        )  # keep nan
        total += chunk.sum()
        chunk *= chunk  # not `@`: waking BLAS's threads takes longer than the sum
        squares += chunk.sum()
    mean = total / values.size
    variance = (squares - total * mean) / max(values.size - 1, 1)
    std = math.sqrt(max(variance, 0.0)) if low < high else 0.0 * (high - low)
    return _Statistics(values.size, float(mean), std, float(low), float(high))


def _glorot_stds(weight: _Weight) -> tuple[float, float]:
    """What `initialize` gives a kernel: with gain 1, and with that of its activation."""
    std = math.sqrt(2 / max(2, sum(weight.fans or (1, 1))))
    return std, std * activation_gain(weight.activation)


def _right_law(weight: _Weight, drawn: _Statistics | None) -> Law | None:
    """What the weight should be drawn from: the declared law, or one of `initialize`'s."""
    laws = [weight.law] if weight.law is not None else []
    if laws and weight.kernel and drawn is not None:
        laws += [Law("normal", std, std) for std in _glorot_stds(weight)]
        for law in laws:
            if law.std and not _is_off(drawn, law.std):
                return law
    return laws[0] if laws else None


def _is_off(drawn: _Statistics, std: float) -> bool:
    if drawn.size < 2:
        return False
    ratio, spread = drawn.std / std, 2 / (9 * (drawn.size - 1))
    # Wilson and Hilferty: the cube root of a chi-squared variable is all but normal, also
    # in small tensors. Uniform and truncated values scatter less than normal ones.
    sigmas = (ratio ** (2 / 3) - (1 - spread)) / math.sqrt(spread)
    return abs(sigmas) > _SIGMAS and abs(ratio - 1) > _TOLERANCE


def _find(weight: _Weight, drawn: _Statistics, right: Law | None, twins: dict):
    """Yields (severity, what is wrong, what to do) for one variable."""
    variable, name = weight.variable, type(weight.initializer).__name__
    random = right is not None and right.std > 0
    if not math.isfinite(drawn.low + drawn.high):
        yield "error", "It holds values that are not finite.", "Initialize it anew."
    elif weight.kernel and drawn.size > 1 and drawn.low == drawn.high:
        text = f"All values of the kernel are {drawn.low:.4g}: its units stay alike."
        severity = (
            "error" if weight.law is None or weight.law.form != "constant" else "info"
        )
        yield severity, text, "Draw it at random, unless that is meant."
    elif (weight.kernel or random) and drawn.low < drawn.high:
        twin = twins.setdefault((variable.shape, drawn), variable)
        if (
            twin is not variable
            and drawn.size >= _FEWEST_ALIKE
            and _are_equal(twin, variable)
        ):
            text = f"Its values are those of {twin.path}."
            yield "warning", text, "Give each layer its own seed, or none."
        if random and right is not None:
            yield from _find_misfits(weight, drawn, right)
    if isinstance(weight.initializer, _GLOROT):
        if "embedding" in variable.name:
            text = f"{name} on an embedding: its rows are looked up, not summed."
            yield (
                "warning",
                text,
                "Use `embeddings_initializer='uniform'`, Keras's default.",
            )
        elif "recurrent" in variable.name:
            text = f"{name} on a recurrent kernel: its powers vanish or explode."
            yield (
                "warning",
                text,
                "Use `recurrent_initializer='orthogonal'`, Keras's default.",
            )


def _find_misfits(weight: _Weight, drawn: _Statistics, right: Law):
    """Yields where a random weight is not what it should be drawn from."""
    name = type(weight.initializer).__name__
    error = max(drawn.std, right.std) * max(_TOLERANCE, _SIGMAS / math.sqrt(drawn.size))
    if _is_off(drawn, right.std):
        text = f"Its std is {drawn.std / right.std:.0%} of the right one."
        yield "warning", text, _cause(weight, drawn)
    elif _is_out_of_bounds(weight, drawn, right):
        text = (
            f"It reaches from {drawn.low:.4g} to {drawn.high:.4g}, beyond {name}'s bounds."
        )
        yield (
            "warning",
            text,
            "Initialize it anew, or pay no heed if it has been trained.",
        )
    if abs(drawn.mean - right.mean) > error:
        text = f"Its mean is {drawn.mean:.4g}, not {right.mean:.4g}."
        yield (
            "warning",
            text,
            "Initialize it anew, or pay no heed if it has been trained.",
        )
    plain, gained = _glorot_stds(weight)
    relu = getattr(weight.activation, "__name__", "") in _RELU_LIKE
    if relu and isinstance(weight.initializer, _GLOROT) and not _is_off(drawn, plain):
        if abs(drawn.std - plain) < abs(drawn.std - gained):
            text = f"{name} with gain 1 in front of {weight.activation.__name__}."
            yield "info", text, "Use `GlorotUniform(gain='relu')` or `HeNormal`."


def _is_out_of_bounds(weight: _Weight, drawn: _Statistics, right: Law) -> bool:
    reach = max(drawn.high - right.mean, right.mean - drawn.low)
    slack = 1 + float(ml_dtypes.finfo(weight.variable.dtype).eps)
    if reach <= right.bound * slack:
        return False
    if not weight.kernel or reach > 2 / TRUNCATED_STD * right.std * slack:
        return True
    # Both of our distributions will do, whichever was declared. Beyond the limit of the
    # uniform one the normal has 8.6 % of its values: a few are strays.
    values = np.abs(keras.ops.convert_to_numpy(weight.variable).astype(np.float64))
    return np.mean(values > right.bound * slack) < 0.01


def _cause(weight: _Weight, drawn: _Statistics) -> str:
    """Why a std is off, and what to do, from the fans that would explain it."""
    owner, shape = weight.owner, tuple(weight.variable.shape)
    by_shape = compute_fans(shape)
    stock = law_of(weight.initializer, shape, by_shape, Target())
    if by_shape == weight.fans or stock is None or _is_off(drawn, stock.std):
        return "It was not drawn as declared, or it has been trained: initialize it anew."
    fan_in, fan_out = weight.fans or by_shape
    if getattr(owner, "depth_multiplier", None) is not None:
        cause = "Keras counted all channels of a depthwise kernel as inputs"
    elif getattr(owner, "groups", 1) > 1:
        cause = "Keras did not divide fan_out by the groups"
    elif fan_in * fan_out < math.prod(shape):
        cause = "Keras took the experts of the kernel for inputs"
    else:
        cause = "Keras took the fans of attention heads from the shape alone"
    return f"{cause}: use `keras_glorot.initialize`, or 'xavier_uniform' in the layer."


def _are_equal(one: keras.Variable, other: keras.Variable) -> bool:
    return np.array_equal(*map(keras.ops.convert_to_numpy, (one, other)))


def _row(weight: _Weight, drawn: _Statistics | None, right: Law | None) -> dict[str, Any]:
    fan_in, fan_out = weight.fans or (None, None)
    std = drawn.std if drawn is not None and drawn.size > 1 else None
    return {
        "path": weight.variable.path,
        "layer": type(weight.owner).__name__ if weight.owner is not None else None,
        "shape": tuple(weight.variable.shape),
        "dtype": weight.variable.dtype,
        "initializer": None if weight.initializer is None else _name(weight.initializer),
        "fan_in": fan_in,
        "fan_out": fan_out,
        "right_std": right.std if right is not None else None,
        "std": std,
        "ratio": std / right.std
        if right is not None and right.std and std is not None
        else None,
        "mean": drawn.mean if drawn is not None else None,
    }


def _name(initializer: Any) -> str:
    return getattr(initializer, "__name__", type(initializer).__name__)
