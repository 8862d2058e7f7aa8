"""`audit`: what initialization did to a model, and where it went wrong."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import keras
import ml_dtypes
import numpy as np

from keras_glorot import backends, keras_bridge
from keras_glorot.distributions import Distribution
from keras_glorot.fans import compute_fans
from keras_glorot.gains import known_gain
from keras_glorot.initializers import GlorotNormal, GlorotUniform
from keras_glorot.keras_bridge import CallSite
from keras_glorot.layers import is_relu_like, unit_axis, window_rank
from keras_glorot.symmetry import (
    ONE_IN,
    Slices,
    can_be_chance,
    find_repeats,
    project,
    relation,
)
from keras_glorot.tables import Finding, Row, Severity, Table
from keras_glorot.variables import Weight, describe, distribution_of

__all__ = ["CODES", "audit"]

# Six standard errors: one false alarm in 500 million tensors (`ONE_IN`), so a model of a
# thousand weights is called wrong by chance once in half a million times.
_SIGMAS = 6.0
# What is significant can still be too small to matter.
_TOLERANCE = 0.05
# That of the kurtosis: a third of what uniform and truncated normal values differ by.
_KURTOSIS_TOLERANCE = 0.2
# The variance of a sample's kurtosis, times its size: m8 - 4 m4 m6 + 4 m4**3 - m4**2 of
# the standardized moments. The estimate is skewed in small samples, and always where
# there is no bound, so those are not judged by it.
_KURTOSIS_VARIANCE = {"uniform": 1.32, "truncated_normal": 3.86}
_FEWEST_FOR_KURTOSIS = 100
# Elements looked at together: their float64 copy stays in the cache.
_CHUNK = 1 << 16
_GLOROT = (
    keras.initializers.GlorotNormal,
    keras.initializers.GlorotUniform,
    GlorotNormal,
    GlorotUniform,
)
_REINITIALIZE = "Reinitialize it, or ignore this if the model has been trained."
_UNEXPLAINED = f"The values do not match the declared initializer. {_REINITIALIZE}"


def audit(model: keras.Layer) -> Table:
    """Compares each fresh weight of a built model with what it was declared to be.

    For each variable: the std that its initializer should give, with the fans that its
    layer really has, and the std, mean and range that it has. Read only; no data needed.
    Findings have three severities: "error" (values that no training can start from: not
    finite, constant kernels, all units alike, negative variances), "warning" (not the
    declared distribution or constant, twins, zero or repeated slices, or Glorot where it
    does not belong) and "info" (Glorot with gain 1 before a ReLU-like activation, an
    activation that has no known gain).

    A kernel is also right if it is what `initialize` draws: Glorot, with gain 1 or that of
    the activation. Scale and mean are called wrong where they are off by more than 5 % and
    by six standard errors, so small tensors are given the benefit of the doubt. What is
    made by an initializer that is neither Keras's nor ours can't be compared.

    A trained model is not fresh. Where an optimizer has made steps, or most kernels and
    most constants have left what was declared, one finding says so; beside it only what
    is wrong in a trained model too is reported.

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
    findings += _find_strays(measured)
    trained = _find_trained(model, measured)
    if trained is not None:
        kernels = {each.weight.path for each in measured if each.weight.is_kernel}
        findings = [each for each in findings if _is_wrong_if_trained(each, kernels)]
        findings.insert(0, trained)
    columns = (
        "path",
        "shape",
        "expected_std",
        "std",
        "ratio",
        "fan_in",
        "fan_out",
        "layer",
        "initializer",
    )
    counts = Counter(finding.severity for finding in findings)
    rows = [_row(subject) for subject in measured]
    note = (
        f"{len(rows)} variables; errors: {counts['error']}, warnings: {counts['warning']}."
    )
    return Table("audit", rows, findings, columns, note)


class _Statistics(NamedTuple):
    """What the values of a variable are like."""

    size: int
    mean: float
    std: float
    low: float
    high: float
    kurtosis: float


class _Measured(NamedTuple):
    """A weight, what its values are like, and what they may be drawn from.

    Attributes:
        expected: The plausible distribution nearest to the values: small tensors fit
            several. None where nothing is known.
        fault: The code of what speaks against it; None if nothing does.
        repeats: Slices of it that are zero or repeated; looked for in what is random.
        gain: That of its activation; None where it can't be computed.
    """

    weight: Weight
    statistics: _Statistics
    expected: Distribution | None
    fault: str | None
    repeats: list[Slices]
    gain: float | None

    @property
    def is_finite(self) -> bool:
        return _is_finite(self.statistics)

    @property
    def is_constant(self) -> bool:
        return self.is_finite and self.statistics.low == self.statistics.high

    @property
    def initializer_name(self) -> str:
        return type(self.weight.initializer).__name__


def _measure_weight(weight: Weight) -> _Measured:
    declared = weight.distribution
    center = 0.0 if declared is None else declared.mean
    statistics = _measure(weight.variable, center)
    gain = known_gain(weight.activation) if weight.is_kernel else 1.0
    expected, fault = None, None
    if declared is not None:
        stds = _glorot_stds(weight, gain or 1.0) if weight.is_kernel else ()
        expected, fault = _best_fit(weight, statistics, _plausible(declared, stds))
    repeats = []
    varies = _is_finite(statistics) and statistics.low < statistics.high
    if varies and expected is not None and expected.std:
        values = backends.to_array(weight.variable)
        window = window_rank(weight.owner, weight.shape)
        repeats = list(find_repeats(values, window, _collision(weight, expected)))
    return _Measured(weight, statistics, expected, fault, repeats, gain)


def _plausible(declared: Distribution, stds: Iterable[float]) -> list[Distribution]:
    """Acceptable distributions: the declared one and, of kernels, those of `initialize`."""
    forms = ("uniform", "truncated_normal")
    return [
        declared,
        *(Distribution.from_std(form, std) for std in stds for form in forms),
    ]


def _glorot_stds(weight: Weight, gain: float) -> tuple[float, float]:
    """What `initialize` gives a kernel: with gain 1, and with the activation's gain."""
    std = math.sqrt(2 / max(2, sum(weight.fans or ())))
    return std, std * gain


def _best_fit(
    weight: Weight, statistics: _Statistics, plausible: list[Distribution]
) -> tuple[Distribution | None, str | None]:
    """The distribution that least speaks against, nearest in std; and what does."""
    if not _is_finite(statistics) or statistics.size == 0:
        return plausible[0], None
    faults = [_fault(weight, statistics, distribution) for distribution in plausible]
    ranks = [list(_FAULTS).index(fault) for fault in faults]
    distances = [abs(each.std - statistics.std) for each in plausible]
    best = min(range(len(plausible)), key=lambda i: (ranks[i], distances[i]))
    return plausible[best], faults[best]


def _fault(
    weight: Weight, statistics: _Statistics, distribution: Distribution
) -> str | None:
    """The first thing that speaks against a distribution; later ones may follow from it."""
    if distribution.form == "constant":
        is_off = _is_other_constant(weight, statistics, distribution)
        return "constant" if is_off else None
    if not keras.backend.is_float_dtype(weight.variable.dtype):
        return None
    if _is_off(statistics, distribution):
        return "std"
    if _is_mean_off(statistics, distribution):
        return "mean"
    if _is_out_of_bounds(weight, statistics, distribution):
        return "bounds"
    if _is_other_form(weight, statistics, distribution):
        return "form"
    return None


# What can speak against a distribution: the later in this list, the more.
_FAULTS = (None, "form", "bounds", "mean", "constant", "std")


def _chunks(variable: keras.Variable) -> Iterator[np.ndarray]:
    """The values in float64, a part at a time: to copy them all could be too much."""
    values = backends.to_array(variable).reshape(-1)
    for start in range(0, values.size, _CHUNK):
        yield values[start : start + _CHUNK].astype(np.float64)


@np.errstate(all="ignore")  # what is not finite is found by its range
def _measure(variable: keras.Variable, center: float) -> _Statistics:
    """One pass, in float64: a float32 sum over a large kernel loses its digits.

    Args:
        variable: What to measure.
        center: The mean that is expected; the moments are taken around it.
    """
    total, squares, fourths = 0.0, 0.0, 0.0
    low, high = math.inf, -math.inf
    for chunk in _chunks(variable):
        low = np.minimum(low, chunk.min())  # keeps nan
        high = np.maximum(high, chunk.max())
        if center:
            chunk -= center
        total += chunk.sum()
        chunk *= chunk  # not `@`: starting BLAS threads costs more than the sum
        squares += chunk.sum()
        chunk *= chunk
        fourths += chunk.sum()
    size = math.prod(variable.shape)
    offset = total / max(size, 1)
    variance = (squares - total * offset) / max(size - 1, 1)
    varies = low < high and variance > 0
    std = math.sqrt(variance) if varies else 0.0
    kurtosis = size * fourths / squares**2 if varies else math.nan
    mean = float(center + offset)
    return _Statistics(size, mean, std, float(low), float(high), float(kurtosis))


def _is_finite(statistics: _Statistics) -> bool:
    return statistics.size == 0 or math.isfinite(statistics.low + statistics.high)


def _is_off(statistics: _Statistics, distribution: Distribution) -> bool:
    """Whether a std is wrong: by more than the tolerance and more than chance allows."""
    if statistics.size < 2 or not distribution.std:
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


def _is_mean_off(statistics: _Statistics, distribution: Distribution) -> bool:
    tolerance = max(_TOLERANCE, _SIGMAS / math.sqrt(statistics.size))
    scale = max(statistics.std, distribution.std)
    return abs(statistics.mean - distribution.mean) > tolerance * scale


def _is_other_constant(
    weight: Weight, statistics: _Statistics, distribution: Distribution
) -> bool:
    """Whether any value differs from the declared one, beyond rounding to the dtype."""
    slack = _rounding(weight) * abs(distribution.mean)
    return _reach(statistics, distribution) > slack


def _is_out_of_bounds(
    weight: Weight, statistics: _Statistics, distribution: Distribution
) -> bool:
    reach = _reach(statistics, distribution)
    if math.isinf(distribution.bound):
        # No bound, but where among so many values chance puts not one.
        return statistics.size * _normal_tail(reach / distribution.std) < ONE_IN
    if reach <= _limit(weight, distribution):
        return False
    return not _are_strays(weight, statistics, distribution)


def _reach(statistics: _Statistics, distribution: Distribution) -> float:
    """How far from the mean the values lie."""
    mean = distribution.mean
    return max(statistics.high - mean, mean - statistics.low)


def _limit(weight: Weight, distribution: Distribution) -> float:
    """How far from the mean a value can lie, when rounded to the weight's dtype."""
    bound = distribution.bound
    return bound + _rounding(weight) * (bound + abs(distribution.mean))


def _rounding(weight: Weight) -> float:
    """What rounding can change, relative to the value; 0 for integers."""
    dtype = weight.variable.dtype
    if not keras.backend.is_float_dtype(dtype):
        return 0.0
    return float(ml_dtypes.finfo(dtype).eps)


def _normal_tail(sigmas: float) -> float:
    """The share of a normal distribution that lies further from its mean than that."""
    return math.erfc(sigmas / math.sqrt(2))


def _are_strays(
    weight: Weight, statistics: _Statistics, distribution: Distribution
) -> bool:
    """Whether what lies out of bounds is what Keras's PyTorch backend lets through.

    It draws each value of a truncated normal distribution from a normal one up to four
    times, and keeps the first of the four where none was within two stds.
    """
    if not _lets_strays_through(weight, distribution):
        return False
    size, outside = statistics.size, _normal_tail(2.0)
    sigmas = _reach(statistics, distribution) / distribution.scale
    if size * outside**3 * _normal_tail(sigmas) < ONE_IN:
        return False
    expected = size * outside**4
    count = _count_strays(weight, distribution)
    if count <= expected:
        return True
    # Chernoff's bound of the chance that a Poisson variable reaches the count.
    log_chance = count - expected + count * math.log(expected / count)
    return log_chance > math.log(ONE_IN)


def _lets_strays_through(weight: Weight, distribution: Distribution) -> bool:
    return (
        keras.backend.backend() == "torch"
        and distribution.form == "truncated_normal"
        and distribution == weight.distribution
        and not isinstance(weight.initializer, GlorotNormal)
    )


def _count_strays(weight: Weight, distribution: Distribution) -> int:
    limit = _limit(weight, distribution)
    return sum(
        int(np.count_nonzero(np.abs(part - distribution.mean) > limit))
        for part in _chunks(weight.variable)
    )


def _is_other_form(
    weight: Weight, statistics: _Statistics, distribution: Distribution
) -> bool:
    """Whether the values have the std and bounds of a distribution, but not its form."""
    if distribution.form == "orthogonal":
        return not _is_orthogonal(weight, distribution)
    variance = _KURTOSIS_VARIANCE.get(distribution.form)
    if variance is None or statistics.size < _FEWEST_FOR_KURTOSIS:
        return False
    sigmas = _SIGMAS * math.sqrt(variance / statistics.size)
    tolerance = max(_KURTOSIS_TOLERANCE, sigmas)
    return abs(statistics.kurtosis - distribution.kurtosis) > tolerance


def _is_orthogonal(weight: Weight, distribution: Distribution) -> bool:
    """Whether the matrix keeps the length of one random vector, from its short side.

    A matrix that is not orthogonal but has the same std changes it by a share of about
    1 / sqrt(2 n), n the long side: that is seen up to a million rows.
    """
    rows, columns = math.prod(weight.shape[:-1]), weight.shape[-1]
    matrix = backends.to_array(weight.variable).reshape(rows, columns)
    vector = np.random.Generator(np.random.PCG64(0)).standard_normal(min(rows, columns))
    product = project(matrix, 1 if columns <= rows else 0, vector)
    ratio = math.hypot(*product) / (math.hypot(*vector) * abs(distribution.scale))
    # Float32 keeps it to 1e-6; a half-precision weight was rounded afterwards.
    return abs(ratio - 1) < max(1e-3, 2 * _rounding(weight))


def _collision(weight: Weight, distribution: Distribution) -> float:
    """A bound of the chance that two values are equal.

    The coarsest generators draw multiples of eps (of the dtype) times the limit. Around a
    mean other than zero, and below the normal numbers, the dtype itself is coarser.
    """
    info = ml_dtypes.finfo(weight.variable.dtype)
    steps = 2 * float(info.eps) * (1 + abs(distribution.mean) / distribution.std)
    return min(1.0, steps + float(info.smallest_subnormal) / distribution.std)


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


def _check_variance(subject: _Measured) -> _Verdict | None:
    """Variances are told by their names: `moving_variance`, of Normalization `variance`."""
    low = subject.statistics.low
    if not subject.weight.variable.name.endswith("variance") or not low < 0:
        return None
    message = f"A variance is {low:.4g}: its square root is not a number."
    return _Verdict("error", message, "Reinitialize it.")


def _check_constant_kernel(subject: _Measured) -> _Verdict | None:
    statistics, expected = subject.statistics, subject.expected
    if not _is_constant_kernel(subject):
        return None
    is_declared = expected is not None and expected.form == "constant"
    is_meant = is_declared and subject.fault is None
    message = (
        f"All kernel values are {statistics.low:.4g}, so every unit learns the same thing."
    )
    advice = "Use a random initializer, unless this is intended."
    return _Verdict("info" if is_meant else "error", message, advice)


def _is_constant_kernel(subject: _Measured) -> bool:
    size, expected = subject.statistics.size, subject.expected
    if not (subject.weight.is_kernel and subject.is_constant and size > 1):
        return False
    # A few random values of half precision can be equal by chance.
    is_random = expected is not None and expected.std > 0
    return not is_random or not can_be_chance(
        1, size - 1, _collision(subject.weight, expected)
    )


def _check_constant(subject: _Measured) -> _Verdict | None:
    statistics, expected = subject.statistics, subject.expected
    if expected is None or subject.fault != "constant" or _is_constant_kernel(subject):
        return None
    values = f"Values range from {statistics.low:.4g} to {statistics.high:.4g}"
    if statistics.low == statistics.high:
        values = f"All values are {statistics.low:.4g}"
    return _Verdict("warning", f"{values}, expected {expected.mean:.4g}.", _REINITIALIZE)


def _check_std(subject: _Measured) -> _Verdict | None:
    expected, statistics = subject.expected, subject.statistics
    if expected is None or subject.fault != "std" or _is_constant_kernel(subject):
        return None
    ratio = statistics.std / expected.std
    message = f"The std is {ratio:.3g} times the expected value."
    return _Verdict("warning", message, _explain_std(subject.weight, statistics))


def _check_mean(subject: _Measured) -> _Verdict | None:
    expected, mean = subject.expected, subject.statistics.mean
    if expected is None or subject.fault != "mean" or _is_constant_kernel(subject):
        return None
    message = f"The mean is {mean:.4g}, expected {expected.mean:.4g}."
    return _Verdict("warning", message, _REINITIALIZE)


def _check_bounds(subject: _Measured) -> _Verdict | None:
    statistics = subject.statistics
    if subject.fault != "bounds" or _is_constant_kernel(subject):
        return None
    message = (
        f"Values range from {statistics.low:.4g} to {statistics.high:.4g}, outside the "
        f"bounds of {subject.initializer_name}."
    )
    return _Verdict("warning", message, _REINITIALIZE)


def _check_form(subject: _Measured) -> _Verdict | None:
    expected = subject.expected
    if expected is None or subject.fault != "form" or _is_constant_kernel(subject):
        return None
    message = (
        f"Mean and std are right, but the values are not {_FORM_NAMES[expected.form]}."
    )
    return _Verdict("warning", message, _REINITIALIZE)


_FORM_NAMES = {
    "uniform": "uniform",
    "truncated_normal": "truncated normal",
    "orthogonal": "an orthogonal matrix",
}


def _check_zero_slices(subject: _Measured) -> _Verdict | None:
    for slices in subject.repeats:
        if slices.dead:
            where = f"{len(slices.dead)} of {slices.count} slices are all zeros"
            message = f"{where}, the first is {_slice_text(slices.dead[0])}."
            return _Verdict("warning", message, "Reinitialize it, unless this is intended.")
    return None


def _check_repeated_slices(subject: _Measured) -> _Verdict | None:
    weight = subject.weight
    for slices in subject.repeats:
        if slices.copies:
            one, other = (_slice_text(index) for index in slices.copies[0])
            count = len(slices.copies)
            message = (
                f"{count} of {slices.count} slices repeat another one or its negative: "
                f"{one} repeats {other}."
            )
            units = len(weight.shape) + unit_axis(weight.owner)
            all_alike = count == slices.count - 1 and units in slices.axes
            severity = "error" if weight.is_kernel and all_alike else "warning"
            return _Verdict(severity, message, "Reinitialize it, unless this is intended.")
    return None


def _slice_text(index: tuple[object, ...]) -> str:
    """An index as it is written: `[:, 3]`."""
    return f"[{', '.join(':' if isinstance(at, slice) else str(at) for at in index)}]"


def _check_activation(subject: _Measured) -> _Verdict | None:
    activation = subject.weight.activation
    if subject.gain is not None:
        return None
    name = getattr(activation, "__name__", activation)
    message = f"The activation {name!r} has no known gain: 1 is taken."
    advice = "Give the initializer `gain` as a number, if 1 is not right."
    return _Verdict("info", message, advice)


def _check_relu_gain(subject: _Measured) -> _Verdict | None:
    weight, statistics, expected = subject.weight, subject.statistics, subject.expected
    if not (weight.is_kernel and statistics.std and is_relu_like(weight.activation)):
        return None
    if not isinstance(weight.initializer, _GLOROT) or expected is None:
        return None
    plain, with_gain = _glorot_stds(weight, subject.gain or 1.0)
    if subject.fault == "std" or 2 * statistics.std >= plain + with_gain:
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
    "negative-variance": _check_variance,
    "constant-kernel": _check_constant_kernel,
    "constant": _check_constant,
    "std": _check_std,
    "mean": _check_mean,
    "bounds": _check_bounds,
    "form": _check_form,
    "zero-slice": _check_zero_slices,
    "repeated-slice": _check_repeated_slices,
    "relu-gain": _check_relu_gain,
    "activation": _check_activation,
    "embedding": _check_embedding,
    "recurrent": _check_recurrent,
}


# What `audit` can find, by code.
CODES = (*_CHECKS, "twin", "strays", "trained")


def _find_twins(measured: list[_Measured]) -> Iterator[Finding]:
    """Random weights with the same values, perhaps negated or transposed.

    Of those with the same size and std all values are compared. Twins have their std from
    sums in different orders, so its last digits may differ.
    """
    found: dict[int, Finding] = {}
    order = [i for i, subject in enumerate(measured) if _can_be_twin(subject, measured)]
    order.sort(key=lambda i: (measured[i].statistics.size, measured[i].statistics.std))
    start = 0
    for position, i in enumerate(order):
        size, _, std = measured[i].statistics[:3]
        while measured[order[start]].statistics.size != size or measured[
            order[start]
        ].statistics.std < std * (1 - 1e-9):
            start += 1
        for j in order[start:position]:
            first, later = sorted((i, j))
            if later not in found:
                twin, weight = measured[first].weight, measured[later].weight
                kind = relation(
                    *(backends.to_array(each.variable) for each in (twin, weight))
                )
                if kind is not None:
                    message = f"{kind} {twin.path}."
                    advice = "Give each layer its own seed, or no seed."
                    found[later] = Finding("warning", "twin", weight.path, message, advice)
    return iter(finding for _, finding in sorted(found.items()))


def _can_be_twin(subject: _Measured, measured: list[_Measured]) -> bool:
    """Whether the weight is random, and so large that no other is like it by chance."""
    expected, statistics = subject.expected, subject.statistics
    if not statistics.std or not math.isfinite(statistics.std):
        return False
    if expected is None or not expected.std:
        expected = Distribution.from_std("normal", statistics.std)
        if not subject.weight.is_kernel:
            return False
    # The entries of an orthogonal matrix hang together: at least a third are free.
    free = statistics.size / (3 if expected.form == "orthogonal" else 1)
    return not can_be_chance(len(measured), free, _collision(subject.weight, expected))


def _find_strays(measured: list[_Measured]) -> Iterator[Finding]:
    """One finding for all weights with values that Keras's PyTorch backend let through."""
    found = [subject for subject in measured if _has_strays(subject)]
    if found:
        others = f" and {len(found) - 1} more weights" if len(found) > 1 else ""
        message = (
            f"This weight{others} have a few values beyond two stds: Keras's truncated "
            "normal lets some through on PyTorch."
        )
        advice = "Use 'xavier_normal' where that matters."
        yield Finding("info", "strays", found[0].weight.path, message, advice)


def _has_strays(subject: _Measured) -> bool:
    weight, expected = subject.weight, subject.expected
    if expected is None or subject.fault is not None or not subject.is_finite:
        return False
    return _lets_strays_through(weight, expected) and _reach(
        subject.statistics, expected
    ) > _limit(weight, expected)


def _find_trained(model: keras.Layer, measured: list[_Measured]) -> Finding | None:
    """Whether the model is not fresh: then its weights are not what was declared."""
    steps = max(map(_count_steps, _optimizers(model)), default=0)
    kernels = [each for each in measured if each.weight.is_kernel and _is_random(each)]
    constants = [
        each
        for each in measured
        if each.expected is not None and each.expected.form == "constant"
    ]
    left = [each for each in kernels if _has_left(each)]
    changed = [each for each in constants if each.fault == "constant"]
    if steps:
        message = f"Looks trained: its optimizer has made {steps} steps."
    # A fresh model can be wrong in every kernel, but not in its biases as well.
    elif (
        2 * len(left) > len(kernels)
        and (2 * len(changed) > len(constants) or not constants)
        and len(left) + len(changed) > 1
    ):
        message = (
            f"Looks trained: {len(left)} of {len(kernels)} kernels and {len(changed)} of "
            f"{len(constants)} constants are not what was declared."
        )
    else:
        return None
    advice = "Audit it before training, or after `initialize`."
    return Finding("info", "trained", model.name, message, advice)


def _optimizers(model: keras.Layer) -> list[keras.optimizers.Optimizer]:
    values = [
        value for layer in keras_bridge.sublayers(model) for value in vars(layer).values()
    ]
    return [value for value in values if isinstance(value, keras.optimizers.Optimizer)]


def _count_steps(optimizer: keras.optimizers.Optimizer) -> int:
    return int(keras.ops.convert_to_numpy(optimizer.iterations))


def _is_random(subject: _Measured) -> bool:
    return subject.expected is not None and subject.expected.std > 0


def _has_left(subject: _Measured) -> bool:
    """Whether a kernel is not as declared, for another reason than Keras's fans."""
    is_off = subject.fault in ("std", "mean", "bounds", "form")
    return is_off and _explain_std(subject.weight, subject.statistics) == _UNEXPLAINED


# What is wrong in a trained model too.
_WRONG_IF_TRAINED = {"not-finite", "negative-variance", "constant-kernel"}


def _is_wrong_if_trained(finding: Finding, kernels: set[str]) -> bool:
    """In a kernel also dead and equal units; rows of embeddings may be unused."""
    if finding.code in ("zero-slice", "repeated-slice"):
        return finding.path in kernels
    return finding.code in _WRONG_IF_TRAINED


def _explain_std(weight: Weight, statistics: _Statistics) -> str:
    """Why a std is off, if the fans of the shape alone explain it, and what to do."""
    fans_by_shape = compute_fans(weight.shape)
    fans = weight.fans or fans_by_shape
    stock = distribution_of(weight.initializer, weight.shape, fans_by_shape, CallSite())
    if fans == fans_by_shape or stock is None or _is_off(statistics, stock):
        return _UNEXPLAINED
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
    weight, statistics, expected = subject[:3]
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
