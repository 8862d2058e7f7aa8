"""`audit`: what initialization did to a model, and where it went wrong."""

import math
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import keras
import ml_dtypes
import numpy as np

from keras_glorot import backends, keras_bridge
from keras_glorot.declared import Law, activation_after, initializer_of, law_of
from keras_glorot.fans import Fans, compute_fans, variable_fans
from keras_glorot.gains import activation_gain
from keras_glorot.initializers import GlorotNormal, GlorotUniform
from keras_glorot.keras_bridge import Target
from keras_glorot.sampling import TRUNCATED_STD
from keras_glorot.tables import Finding, Table

__all__ = ["audit"]

# One right normal tensor in 500 million is beyond: a model of a thousand weights is called
# wrong once in half a million times.
_SIGMAS = 6.0
# The variance of squared values over that of their mean, squared: the kurtosis less one.
_SCATTER = {"uniform": 0.8, "truncated_normal": 1.366}
# What is significant can still be too small to matter.
_TOLERANCE = 0.05
# Elements looked at together: their float64 copy stays in the cache.
_CHUNK = 1 << 16
# In fewer values than this, two tensors of half precision can be alike by chance.
_FEWEST_ALIKE = 8
_RELU_LIKE = ("relu", "relu6", "leaky_relu", "gelu", "silu", "hard_silu", "mish",
              "call")  # of a ReLU, LeakyReLU or ELU layer  # fmt: skip
_GLOROT = (keras.initializers.GlorotNormal, keras.initializers.GlorotUniform, GlorotNormal,
           GlorotUniform)  # fmt: skip
_ANEW = "Initialize it anew, or pay no heed if it has been trained."


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
    weights = variable_fans(model, "model")
    members = {id(layer) for layer in keras_bridge.sublayers(model)}
    rows, findings, twins = [], [], {}
    for owner, variable, fans in weights:
        weight = _look_at(owner, variable, fans, members)
        rows.append(_row(weight))
        findings += [
            Finding(found[0], variable.path, *found[1:]) for found in _find(weight, twins)
        ]
    columns = ("path", "shape", "right_std", "std", "ratio", "fan_in", "fan_out", "layer",
               "initializer")  # fmt: skip
    counts = Counter(finding.severity for finding in findings)
    note = (
        f"{len(rows)} variables; errors: {counts['error']}, warnings: {counts['warning']}."
    )
    return Table("audit", rows, findings, columns, note)


class _Drawn(NamedTuple):
    """What the values of a variable are like."""

    size: int
    mean: float
    std: float
    low: float
    high: float


class _Weight(NamedTuple):
    """A variable, what the model says about it, and what it is."""

    owner: keras.Layer | None
    variable: keras.Variable
    fans: Fans | None
    initializer: Any  # None if it is not known
    declared: Law | None  # what the initializer draws from, with the right fans
    kernel: bool
    activation: Any  # behind a kernel
    drawn: _Drawn

    @property
    def glorot_stds(self) -> tuple[float, float]:
        """What `initialize` gives a kernel: with gain 1, and with the activation's gain."""
        std = math.sqrt(2 / max(2, sum(self.fans or ())))
        return std, std * activation_gain(self.activation)

    @property
    def laws(self) -> list[Law]:
        """What it may be drawn from: as declared or, a kernel, as `initialize` draws."""
        if self.declared is None or not self.kernel:
            return [self.declared] if self.declared else []
        ours = (
            Law("truncated_normal", std / TRUNCATED_STD, std) for std in self.glorot_stds
        )
        laws = [self.declared, *ours]
        return [law for law in laws if law.std and not _is_off(self.drawn, law)] or laws[:1]

    @property
    def right(self) -> Law | None:
        """The nearest of these. In a small tensor several fit."""
        return min(self.laws, key=lambda law: abs(law.std - self.drawn.std), default=None)


def _look_at(owner, variable, fans: Fans | None, members: set[int]) -> _Weight:
    drawn = _measure(variable)
    try:
        initializer, kernel = initializer_of(owner, variable, fans)
    except LookupError:
        initializer, kernel = None, False
    if initializer is None or not keras.backend.is_float_dtype(variable.dtype):
        return _Weight(owner, variable, fans, initializer, None, False, None, drawn)
    law = law_of(initializer, variable.shape, fans, Target(owner, variable))
    activation = activation_after(owner, variable, members) if kernel else None
    return _Weight(owner, variable, fans, initializer, law, kernel, activation, drawn)


def _chunks(variable: keras.Variable) -> Iterator[np.ndarray]:
    """The values in float64, a part at a time: to copy them all could be too much."""
    values = backends.to_array(variable).reshape(-1)
    for start in range(0, values.size, _CHUNK):
        yield values[start : start + _CHUNK].astype(np.float64)


@np.errstate(all="ignore")  # what is not finite is found by its range
def _measure(variable: keras.Variable) -> _Drawn:
    """One pass, in float64: a float32 sum over a large kernel loses its digits."""
    total, squares, low, high = 0.0, 0.0, math.inf, -math.inf
    for chunk in _chunks(variable):
        low, high = np.minimum(low, chunk.min()), np.maximum(high, chunk.max())  # keep nan
        total += chunk.sum()
        chunk *= chunk  # not `@`: to wake the threads of BLAS takes longer than the sum
        squares += chunk.sum()
    size = math.prod(variable.shape)
    mean = total / max(size, 1)
    variance = (squares - total * mean) / max(size - 1, 1)
    std = math.sqrt(variance) if low < high and variance > 0 else 0.0
    return _Drawn(size, float(mean), std, float(low), float(high))


def _is_off(drawn: _Drawn, law: Law) -> bool:
    if drawn.size < 2:
        return False
    # Wilson and Hilferty: the cube root of a chi-squared variable is all but normal, also
    # in small tensors. In large ones, uniform and truncated values scatter less.
    free = (drawn.size - 1) * (2 / _SCATTER.get(law.form, 2.0) if drawn.size > 100 else 1)
    ratio, spread = drawn.std / law.std, 2 / (9 * free)
    sigmas = (ratio ** (2 / 3) - (1 - spread)) / math.sqrt(spread)
    return abs(sigmas) > _SIGMAS and abs(ratio - 1) > _TOLERANCE


def _find(weight: _Weight, twins: dict[Any, keras.Variable]) -> Iterator[Any]:
    """What is wrong with one variable: severity, a sentence, what to do."""
    variable, drawn, right = weight.variable, weight.drawn, weight.right
    name = type(weight.initializer).__name__
    random = right is not None and right.std > 0
    if drawn.size and not math.isfinite(drawn.low + drawn.high):
        yield "error", "It holds values that are not finite.", "Initialize it anew."
    elif weight.kernel and drawn.size > 1 and drawn.low == drawn.high:
        meant = weight.declared is not None and weight.declared.form == "constant"
        text = f"All values of the kernel are {drawn.low:.4g}, so its units stay alike."
        yield "info" if meant else "error", text, "Draw it at random, unless that is meant."
    elif (weight.kernel or random) and drawn.low < drawn.high:
        twin = twins.setdefault((variable.shape, drawn), variable)
        if (
            twin is not variable
            and drawn.size >= _FEWEST_ALIKE
            and _are_equal(twin, variable)
        ):
            text = f"Its values are those of {twin.path}."
            yield "warning", text, "Give each layer a seed of its own, or none."
        if random and right is not None:
            yield from _find_misfits(weight, right)
    if isinstance(weight.initializer, _GLOROT):
        if "embedding" in variable.name:
            text = f"{name} on an embedding, whose rows are looked up and not summed."
            advice = "Use `embeddings_initializer='uniform'`, Keras's default."
            yield "warning", text, advice
        elif "recurrent" in variable.name:
            text = f"{name} on a recurrent kernel, whose powers then vanish or explode."
            advice = "Use `recurrent_initializer='orthogonal'`, Keras's default."
            yield "warning", text, advice


def _find_misfits(weight: _Weight, right: Law) -> Iterator[Any]:
    """Where a random variable is not what it should be drawn from."""
    drawn, name = weight.drawn, type(weight.initializer).__name__
    error = max(drawn.std, right.std) * max(_TOLERANCE, _SIGMAS / math.sqrt(drawn.size))
    if _is_off(drawn, right):
        text = f"Its std is {drawn.std / right.std:.3g} times the right one."
        yield "warning", text, _cause(weight)
    elif _is_out_of_bounds(weight, right):
        text = f"It goes from {drawn.low:.4g} to {drawn.high:.4g}, beyond {name}'s bounds."
        yield "warning", text, _ANEW
    if abs(drawn.mean - right.mean) > error:
        yield "warning", f"Its mean is {drawn.mean:.4g}, not {right.mean:.4g}.", _ANEW
    plain, gained = weight.glorot_stds
    rectified = getattr(weight.activation, "__name__", "") in _RELU_LIKE
    is_plain = not _is_off(drawn, right) and 2 * drawn.std < plain + gained
    if rectified and is_plain and isinstance(weight.initializer, _GLOROT):
        text = f"{name} with gain 1 in front of a ReLU or its kin."
        yield "info", text, "Use `GlorotUniform(gain='relu')` or `HeNormal`."


def _is_out_of_bounds(weight: _Weight, right: Law) -> bool:
    slack = 1 + float(ml_dtypes.finfo(weight.variable.dtype).eps)
    reach = max(weight.drawn.high - right.mean, right.mean - weight.drawn.low)
    if reach > max(law.bound for law in weight.laws) * slack:
        return True
    if reach <= right.bound * slack or weight.drawn.size < 100:
        return False
    # `initialize` may have drawn from the other form of Glorot's distribution. The normal
    # one has 8.6 % of its values beyond the uniform one's limit: a few are strays.
    outside = (np.abs(chunk) > right.bound * slack for chunk in _chunks(weight.variable))
    return sum(map(np.count_nonzero, outside)) < 0.01 * weight.drawn.size


def _are_equal(one: keras.Variable, other: keras.Variable) -> bool:
    return all(map(np.array_equal, _chunks(one), _chunks(other)))


def _cause(weight: _Weight) -> str:
    """Why a std is off, if the fans of the shape alone explain it, and what to do."""
    owner, shape = weight.owner, tuple(weight.variable.shape)
    fans, by_shape = weight.fans or compute_fans(shape), compute_fans(shape)
    stock = law_of(weight.initializer, shape, by_shape, Target())
    if fans == by_shape or stock is None or _is_off(weight.drawn, stock):
        return f"It was not drawn as declared. {_ANEW}"
    if getattr(owner, "depth_multiplier", None) is not None:
        cause = "Keras counted all channels of a depthwise kernel as inputs"
    elif getattr(owner, "groups", 1) > 1:
        cause = "Keras did not divide fan_out by the groups"
    elif math.prod(fans) < math.prod(shape):
        cause = "Keras counted the experts as inputs or outputs"
    else:
        cause = "Keras took the fans of attention heads from the shape alone"
    return f"{cause}: use `keras_glorot.initialize`, or 'xavier_uniform' in the layer."


def _row(weight: _Weight) -> dict[str, Any]:
    initializer, right, drawn = weight.initializer, weight.right, weight.drawn
    fan_in, fan_out = weight.fans or (None, None)
    return {
        "path": weight.variable.path,
        "layer": None if weight.owner is None else type(weight.owner).__name__,
        "shape": tuple(weight.variable.shape),
        "dtype": weight.variable.dtype,
        "initializer": None if initializer is None
        else getattr(initializer, "__name__", type(initializer).__name__),
        "fan_in": fan_in,
        "fan_out": fan_out,
        "right_std": None if right is None else right.std,
        "std": drawn.std if drawn.size > 1 else None,
        "ratio": drawn.std / right.std if right and right.std and drawn.size > 1 else None,
        "mean": drawn.mean,
    }  # fmt: skip
