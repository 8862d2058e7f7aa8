"""`audit`: what initialization did to a model, and where it went wrong."""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import keras
import ml_dtypes
import numpy as np

from keras_glorot import backends
from keras_glorot.distributions import Distribution
from keras_glorot.fans import compute_fans
from keras_glorot.gains import activation_gain
from keras_glorot.initializers import GlorotNormal, GlorotUniform
from keras_glorot.keras_bridge import CallSite
from keras_glorot.layers import is_relu_like
from keras_glorot.tables import Finding, Row, Severity, Table
from keras_glorot.variables import Weight, describe, distribution_of

__all__ = ["CODES", "audit"]

# Six standard errors: one false alarm in 500 million tensors, so a model of a thousand
# weights is called wrong by chance once in half a million times.
_SIGMAS = 6.0
# What is significant can still be too small to matter.
_TOLERANCE = 0.05
# Elements looked at together: their float64 copy stays in the cache.
_CHUNK = 1 << 16
# In fewer values than this, two tensors of half precision can be equal by chance.
_FEWEST_TO_COMPARE = 8
_GLOROT = (
    keras.initializers.GlorotNormal,
    keras.initializers.GlorotUniform,
    GlorotNormal,
    GlorotUniform,
)
_REINITIALIZE = "Reinitialize it, or ignore this if the model has been trained."


def audit(model: keras.Layer) -> Table:
    """Compares each fresh weight of a built model with what it was declared to be.

    For each variable: the std that its initializer should give, with the fans that its
    layer really has, and the std, mean and range that it has. Read only; no data needed.
    Findings have three severities: "error" (values that no training can start from: not
    finite, constant kernels), "warning" (not the declared distribution, twins, or Glorot
    where it does not belong) and "info" (Glorot with gain 1 before a ReLU-like activation).

    A kernel is also right if it is what `initialize` draws: Glorot, with gain 1 or that of
    the activation. Scale and mean are called wrong where they are off by more than 5 % and
    by six standard errors, so small tensors are given the benefit of the doubt. A trained
    model is not fresh: expect its kernels to be off.

    Args:
        model: A built layer or model.

    Returns:
        A `Table` with a row per variable. `print` it, or take its `.rows` and `.findings`.
        The keys of a row: `path`, `layer`, `shape`, `dtype`, `initializer`, `fan_in`,
        `fan_out`, `expected_std`, `std`, `ratio` (of these two) and `mean`; what can't be
        known is None.

    Raises:
        ValueError: If the model is not built.
        TypeError: If it is not a Keras layer or model.

    Example:

    >>> layer = keras.layers.DepthwiseConv2D(3, name="depthwise")  # stock Keras
    >>> layer.build((None, 32, 32, 512))
    >>> [(finding.code, finding.path) for finding in audit(layer).findings]
    [('std', 'depthwise/kernel')]
    """
    measured = [_measure_weight(weight) for weight in describe(model)]
    findings = [finding for subject in measured for finding in _check(subject)]
    findings += _find_twins(measured)
    columns = (
        "path",
        "expected_std",
        "std",
        "ratio",
        "shape",
        "fan_in",
        "fan_out",
        "layer",
        "initializer",
    )
    rows = [_row(subject) for subject in measured]
    return Table("audit", rows, findings, columns, _note(measured, findings))


def _note(measured: list["_Measured"], findings: list[Finding]) -> str:
    """How many kernels have the std that they should have."""
    kernels = [subject for subject in measured if subject.weight.is_kernel]
    known = [subject for subject in kernels if subject.expected is not None]
    off = {
        finding.path
        for finding in findings
        if finding.code in ("std", "constant-kernel", "not-finite")
    }
    expected = sum(subject.weight.path not in off for subject in known)
    parts = []
    if kernels:
        parts.append(f"{expected} of {len(kernels)} kernels have the expected std")
    if len(known) < len(kernels):
        parts.append(f"of {len(kernels) - len(known)} it is not known")
    parts.append(f"{len(measured)} variables in all")
    return f"{'; '.join(parts)}."


class _Statistics(NamedTuple):
    """What the values of a variable are like."""

    size: int
    mean: float
    std: float
    low: float
    high: float


class _Measured(NamedTuple):
    """A weight, what its values are like, and what they may be drawn from."""

    weight: Weight
    statistics: _Statistics
    plausible: list[Distribution]

    @property
    def expected(self) -> Distribution | None:
        """The plausible distribution nearest to the values: small tensors fit several."""
        std = self.statistics.std
        return min(self.plausible, key=lambda each: abs(each.std - std), default=None)

    @property
    def is_finite(self) -> bool:
        low, high = self.statistics.low, self.statistics.high
        return self.statistics.size == 0 or math.isfinite(low + high)

    @property
    def varies(self) -> bool:
        return self.is_finite and self.statistics.low < self.statistics.high

    @property
    def initializer_name(self) -> str:
        return type(self.weight.initializer).__name__


def _measure_weight(weight: Weight) -> _Measured:
    statistics = _measure(weight.variable)
    return _Measured(weight, statistics, _plausible(weight, statistics))


def _plausible(weight: Weight, statistics: _Statistics) -> list[Distribution]:
    """Acceptable distributions: the declared one and, of kernels, those of `initialize`."""
    declared = weight.distribution
    if declared is None or not keras.backend.is_float_dtype(weight.variable.dtype):
        return []
    if not weight.is_kernel:
        return [declared]
    candidates = [
        declared,
        *(Distribution.from_std("truncated_normal", std) for std in _glorot_stds(weight)),
    ]
    fitting = [
        distribution
        for distribution in candidates
        if distribution.std and not _is_off(statistics, distribution)
    ]
    return fitting or [declared]


def _glorot_stds(weight: Weight) -> tuple[float, float]:
    """What `initialize` gives a kernel: with gain 1, and with the activation's gain."""
    std = math.sqrt(2 / max(2, sum(weight.fans or ())))
    return std, std * activation_gain(weight.activation)


def _chunks(variable: keras.Variable) -> Iterator[np.ndarray]:
    """The values in float64, a part at a time: to copy them all could be too much."""
    values = backends.to_array(variable).reshape(-1)
    for start in range(0, values.size, _CHUNK):
        yield values[start : start + _CHUNK].astype(np.float64)


@np.errstate(all="ignore")  # what is not finite is found by its range
def _measure(variable: keras.Variable) -> _Statistics:
    """One pass, in float64: a float32 sum over a large kernel loses its digits."""
    total, squares = 0.0, 0.0
    low, high = math.inf, -math.inf
    for chunk in _chunks(variable):
        low = np.minimum(low, chunk.min())  # keeps nan
        high = np.maximum(high, chunk.max())
        total += chunk.sum()
        chunk *= chunk  # not `@`: starting BLAS threads costs more than the sum
        squares += chunk.sum()
    size = math.prod(variable.shape)
    mean = total / max(size, 1)
    variance = (squares - total * mean) / max(size - 1, 1)
    std = math.sqrt(variance) if low < high and variance > 0 else 0.0
    return _Statistics(size, float(mean), std, float(low), float(high))


def _is_off(statistics: _Statistics, distribution: Distribution) -> bool:
    """Whether a std is wrong: by more than the tolerance and more than chance allows."""
    if statistics.size < 2:
        return False
    # Wilson and Hilferty: the cube root of a chi-squared variable is all but normal, also
    # in small tensors. In large ones, uniform and truncated values scatter less.
    degrees_of_freedom = statistics.size - 1.0
    if statistics.size > 100:
        degrees_of_freedom *= 2 / (distribution.kurtosis - 1)
    ratio = statistics.std / distribution.std
    spread = 2 / (9 * degrees_of_freedom)
    sigmas = (ratio ** (2 / 3) - (1 - spread)) / math.sqrt(spread)
    return abs(sigmas) > _SIGMAS and abs(ratio - 1) > _TOLERANCE


class _Verdict(NamedTuple):
    """What a check says of a weight: a `Finding` without its code and path."""

    severity: Severity
    message: str
    advice: str


def _check(subject: _Measured) -> Iterator[Finding]:
    for code, check in _CHECKS.items():
        verdict = check(subject)
        if verdict is not None:
            severity, message, advice = verdict
            yield Finding(severity, code, subject.weight.path, message, advice)


def _check_finite(subject: _Measured) -> _Verdict | None:
    if subject.is_finite:
        return None
    return _Verdict("error", "Some values are not finite.", "Reinitialize it.")


def _check_constant(subject: _Measured) -> _Verdict | None:
    weight, statistics = subject.weight, subject.statistics
    is_constant = statistics.size > 1 and statistics.low == statistics.high
    if not (weight.is_kernel and is_constant and subject.is_finite):
        return None
    declared = weight.distribution
    is_declared = declared is not None and declared.form == "constant"
    message = (
        f"All kernel values are {statistics.low:.4g}, so every unit learns the same thing."
    )
    advice = "Use a random initializer, unless this is intended."
    return _Verdict("info" if is_declared else "error", message, advice)


def _check_std(subject: _Measured) -> _Verdict | None:
    expected, statistics = subject.expected, subject.statistics
    if not subject.varies or expected is None or not expected.std:
        return None
    if not _is_off(statistics, expected):
        return None
    ratio = statistics.std / expected.std
    message = f"The std is {ratio:.3g} times the expected value."
    return _Verdict("warning", message, _explain_std(subject.weight, statistics))


def _check_bounds(subject: _Measured) -> _Verdict | None:
    expected, statistics = subject.expected, subject.statistics
    if not subject.varies or expected is None or not expected.std:
        return None
    if _is_off(statistics, expected) or not _is_out_of_bounds(subject, expected):
        return None
    message = (
        f"Values range from {statistics.low:.4g} to {statistics.high:.4g}, outside the "
        f"bounds of {subject.initializer_name}."
    )
    return _Verdict("warning", message, _REINITIALIZE)


def _check_mean(subject: _Measured) -> _Verdict | None:
    expected, statistics = subject.expected, subject.statistics
    if not subject.varies or expected is None or not expected.std:
        return None
    tolerance = max(_TOLERANCE, _SIGMAS / math.sqrt(statistics.size))
    if abs(statistics.mean - expected.mean) <= tolerance * max(
        statistics.std, expected.std
    ):
        return None
    message = f"The mean is {statistics.mean:.4g}, expected {expected.mean:.4g}."
    return _Verdict("warning", message, _REINITIALIZE)


def _check_relu_gain(subject: _Measured) -> _Verdict | None:
    weight, statistics, expected = subject.weight, subject.statistics, subject.expected
    if not (weight.is_kernel and subject.varies and is_relu_like(weight.activation)):
        return None
    if not isinstance(weight.initializer, _GLOROT) or expected is None:
        return None
    plain, with_gain = _glorot_stds(weight)
    if _is_off(statistics, expected) or 2 * statistics.std >= plain + with_gain:
        return None
    message = f"{subject.initializer_name} with gain 1 before a ReLU-like activation."
    return _Verdict("info", message, "Use `GlorotUniform(gain='relu')` or `HeNormal`.")


def _check_embedding(subject: _Measured) -> _Verdict | None:
    if not isinstance(subject.weight.initializer, _GLOROT):
        return None
    if "embedding" not in subject.weight.variable.name:
        return None
    name = subject.initializer_name
    message = f"{name} on an embedding: its rows are looked up, not summed."
    advice = "Use `embeddings_initializer='uniform'`, Keras's default."
    return _Verdict("warning", message, advice)


def _check_recurrent(subject: _Measured) -> _Verdict | None:
    if not isinstance(subject.weight.initializer, _GLOROT):
        return None
    if "recurrent" not in subject.weight.variable.name:
        return None
    message = (
        f"{subject.initializer_name} on a recurrent kernel: repeated multiplication makes "
        "the state vanish or explode."
    )
    advice = "Use `recurrent_initializer='orthogonal'`, Keras's default."
    return _Verdict("warning", message, advice)


# A new finding is one function and one entry here; the README lists the codes.
_CHECKS: dict[str, Callable[[_Measured], _Verdict | None]] = {
    "not-finite": _check_finite,
    "constant-kernel": _check_constant,
    "std": _check_std,
    "bounds": _check_bounds,
    "mean": _check_mean,
    "relu-gain": _check_relu_gain,
    "embedding": _check_embedding,
    "recurrent": _check_recurrent,
}


# What `audit` can find, by code.
CODES = (*_CHECKS, "twin")


def _find_twins(measured: list[_Measured]) -> Iterator[Finding]:
    """Random weights with the same values: the same statistics first, then all values."""
    first_of: dict[tuple[object, ...], Weight] = {}
    for weight, statistics, _ in filter(_is_random, measured):
        twin = first_of.setdefault((weight.shape, statistics), weight)
        if twin is not weight and _are_equal(twin.variable, weight.variable):
            message = f"Identical to {twin.path}."
            advice = "Give each layer its own seed, or no seed."
            yield Finding("warning", "twin", weight.path, message, advice)


def _is_random(subject: _Measured) -> bool:
    expected = subject.expected
    is_drawn = subject.weight.is_kernel or (expected is not None and expected.std > 0)
    return is_drawn and subject.varies and subject.statistics.size >= _FEWEST_TO_COMPARE


def _are_equal(one: keras.Variable, other: keras.Variable) -> bool:
    return all(map(np.array_equal, _chunks(one), _chunks(other)))


def _is_out_of_bounds(subject: _Measured, expected: Distribution) -> bool:
    weight, statistics = subject.weight, subject.statistics
    slack = 1 + float(ml_dtypes.finfo(weight.variable.dtype).eps)
    reach = max(statistics.high - expected.mean, expected.mean - statistics.low)
    if reach > max(each.bound for each in subject.plausible) * slack:
        return True
    if reach <= expected.bound * slack or statistics.size < 100:
        return False
    # `initialize` may have drawn from the other form of Glorot's distribution. The normal
    # one has 8.6 % of its values beyond the uniform one's limit: a few are strays.
    limit = expected.bound * slack
    parts = _chunks(weight.variable)
    outside = sum(int(np.count_nonzero(np.abs(part) > limit)) for part in parts)
    return outside < 0.01 * statistics.size


def _explain_std(weight: Weight, statistics: _Statistics) -> str:
    """Why a std is off, if the fans of the shape alone explain it, and what to do."""
    fans_by_shape = compute_fans(weight.shape)
    fans = weight.fans or fans_by_shape
    stock = distribution_of(weight.initializer, weight.shape, fans_by_shape, CallSite())
    if fans == fans_by_shape or stock is None or _is_off(statistics, stock):
        return f"The values do not match the declared initializer. {_REINITIALIZE}"
    if getattr(weight.owner, "depth_multiplier", None) is not None:
        cause = "Keras counted all channels of a depthwise kernel as inputs"
    elif getattr(weight.owner, "groups", 1) > 1:
        cause = "Keras did not divide fan_out by the groups"
    elif math.prod(fans) < math.prod(weight.shape):
        cause = "Keras counted the experts as inputs or outputs"
    else:
        cause = "Keras took the fans of attention heads from the shape alone"
    return f"{cause}: use `keras_glorot.initialize`, or 'xavier_uniform' in the layer."


def _row(subject: _Measured) -> Row:
    weight, statistics, _ = subject
    expected = subject.expected
    fan_in, fan_out = weight.fans or (None, None)
    std = statistics.std if statistics.size > 1 else None
    row: Row = {
        "path": weight.path,
        "layer": None if weight.owner is None else type(weight.owner).__name__,
        "shape": weight.shape,
        "dtype": weight.variable.dtype,
        "initializer": None,
        "fan_in": fan_in,
        "fan_out": fan_out,
        "expected_std": None,
        "std": std,
        "ratio": None,
        "mean": statistics.mean,
    }
    if weight.initializer is not None:
        row["initializer"] = getattr(
            weight.initializer, "__name__", subject.initializer_name
        )
    if expected is not None:
        row["expected_std"] = expected.std
        if expected.std and std is not None:
            row["ratio"] = std / expected.std
    return row
