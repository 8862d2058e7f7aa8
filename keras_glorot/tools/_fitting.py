"""Whether the values of a weight can come from a distribution, and if not, why."""

import math
from typing import NamedTuple

import keras
import ml_dtypes
import numpy as np

from keras_glorot import _backends as backends
from keras_glorot._backends.values import CHUNK
from keras_glorot._drawing.distributions import Distribution
from keras_glorot._models.survey import Weight
from keras_glorot.initializers import GlorotNormal
from keras_glorot.tools._slices import ONE_IN

__all__ = [
    "Statistics",
    "best_fit",
    "collision",
    "has_form",
    "is_little_larger",
    "is_off",
    "measure",
]

# Six standard errors: one false alarm in 500 million tensors (`ONE_IN`), so a model of a
# thousand weights is called wrong by chance once in half a million times.
_SIGMAS = 6.0
# A significant difference can still be too small to matter.
_TOLERANCE = 0.05
# That of the kurtosis: uniform and truncated normal values differ by 24 %.
_KURTOSIS_TOLERANCE = 0.1
_FEWEST_FOR_KURTOSIS = 100


class Statistics(NamedTuple):
    """Statistics of the values of a variable."""

    size: int
    mean: float
    std: float
    low: float
    high: float
    kurtosis: float

    @property
    def is_finite(self) -> bool:
        return self.size == 0 or math.isfinite(self.low + self.high)


def best_fit(
    weight: Weight, statistics: Statistics, plausible: list[Distribution]
) -> tuple[Distribution | None, str | None]:
    """The distribution that least speaks against, nearest in std; and what does."""
    # Keras takes a negative stddev or gain, which only mirrors the values.
    plausible = [d._replace(scale=abs(d.scale), std=abs(d.std)) for d in plausible]
    if not statistics.is_finite or statistics.size == 0:
        return plausible[0], None
    orthogonal = [
        d for d in plausible if _is_nearly_orthogonal(weight, _at_scale(d, statistics))
    ]
    others = [d for d in plausible[1:] if d.form != "orthogonal"]
    plausible = orthogonal or [plausible[0], *others]
    faults = [_fault(weight, statistics, distribution) for distribution in plausible]
    known = any(_has_form(statistics, distribution) for distribution in plausible)

    def rank(index: int) -> tuple[bool, int, bool, float]:
        # The std of a form that the values have is the fault, not a form that they don't.
        fault, distribution = faults[index], plausible[index]
        is_foreign = known and fault == "form"
        distance = abs(distribution.std - statistics.std)
        is_other = _has_form(statistics, distribution) is False
        return is_foreign, _FAULTS.index(fault), is_other, distance

    best = min(range(len(plausible)), key=rank)
    return plausible[best], faults[best]


def _at_scale(distribution: Distribution, statistics: Statistics) -> Distribution:
    """The same form with the size that the values have."""
    if not distribution.std or not statistics.std:
        return distribution
    square = statistics.std**2 * (1 - 1 / statistics.size) + statistics.mean**2
    ratio = math.sqrt(square) / distribution.std
    return distribution._replace(
        scale=ratio * distribution.scale, std=ratio * distribution.std
    )


def has_form(weight: Weight, statistics: Statistics, distribution: Distribution) -> bool:
    """Whether nothing but the std speaks against a distribution."""
    if distribution.form == "mirrored":
        return True  # which its pairs have told
    same = _at_scale(distribution, statistics)
    is_off = _is_mean_off(statistics, same) or _is_other_form(weight, statistics, same)
    return not is_off


def _fault(
    weight: Weight, statistics: Statistics, distribution: Distribution
) -> str | None:
    """The first thing that speaks against a distribution; later ones may follow from it."""
    if not distribution.std:
        is_other = _is_other_constant(weight, statistics, distribution)
        return "constant" if is_other else None
    if not keras.backend.is_float_dtype(weight.variable.dtype):
        return None
    if is_off(statistics, distribution):
        return "std"
    if _is_mean_off(statistics, distribution):
        return "mean"
    if _is_out_of_bounds(weight, statistics, distribution):
        return "bounds"
    if _is_other_form(weight, statistics, distribution):
        return "form"
    return None


# The faults, the gravest last.
_FAULTS: tuple[str | None, ...] = (None, "bounds", "form", "mean", "constant", "std")


@np.errstate(all="ignore")  # values that are not finite are found by their range
def measure(variable: keras.Variable, center: float) -> Statistics:
    """One pass, in float64: a float32 sum over a large kernel loses its digits.

    Args:
        variable: The variable to measure.
        center: The mean that is expected; the moments are taken around it.
    """
    total, squares, fourths = 0.0, 0.0, 0.0
    low, high = math.inf, -math.inf
    values = backends.values(variable)
    for chunk in values.chunks():
        low = np.minimum(low, chunk.min())  # keeps nan
        high = np.maximum(high, chunk.max())
        if center:
            chunk -= center
        total += chunk.sum()
        chunk *= chunk  # not `@`: starting BLAS threads costs more than the sum
        squares += chunk.sum()
        chunk *= chunk
        fourths += chunk.sum()
    # Of all processes, each of which has seen its own part.
    seen = values.stack(np.array([low, high, total, squares, fourths]))
    low, high = np.minimum.reduce(seen[:, 0]), np.maximum.reduce(seen[:, 1])
    total, squares, fourths = seen[:, 2:].sum(axis=0)
    size = math.prod(variable.shape)
    offset = total / max(size, 1)
    variance = (squares - total * offset) / max(size - 1, 1)
    std, kurtosis = 0.0, math.nan
    if size and not math.isfinite(low + high):
        std = math.nan
    elif low < high and variance > 0:
        std, kurtosis = math.sqrt(variance), size * fourths / squares**2
    mean = float(center + offset)
    return Statistics(size, mean, std, float(low), float(high), float(kurtosis))


def is_off(statistics: Statistics, distribution: Distribution) -> bool:
    """Whether a std is wrong: by more than the tolerance and more than chance allows."""
    if statistics.size < 2 or not distribution.std:
        return False
    if distribution.form == "orthogonal":  # where nothing is left to chance
        share = statistics.std**2 * (1 - 1 / statistics.size) + statistics.mean**2
        return abs(math.sqrt(share) / distribution.std - 1) > _TOLERANCE
    # Wilson and Hilferty: the cube root of a chi-squared variable is all but normal, also
    # in small tensors. In large ones, uniform and truncated values scatter less.
    degrees_of_freedom = statistics.size - 1.0
    if statistics.size > 100:
        degrees_of_freedom *= 2 / (distribution.standard.kurtosis - 1)
    ratio = statistics.std / distribution.std
    spread = 2 / (9 * degrees_of_freedom)
    sigmas = (ratio ** (2 / 3) - (1 - spread)) / math.sqrt(spread)
    return abs(sigmas) > _SIGMAS and abs(ratio - 1) > _TOLERANCE


def _is_mean_off(statistics: Statistics, distribution: Distribution) -> bool:
    tolerance = max(_TOLERANCE, _SIGMAS / math.sqrt(statistics.size))
    scale = max(statistics.std, distribution.std)
    return abs(statistics.mean - distribution.mean) > tolerance * scale


def _is_other_constant(
    weight: Weight, statistics: Statistics, distribution: Distribution
) -> bool:
    """Whether any value differs from the declared one, beyond rounding to the dtype."""
    slack = _rounding(weight) * abs(distribution.mean)
    return _reach(statistics, distribution) > slack


def _is_out_of_bounds(
    weight: Weight, statistics: Statistics, distribution: Distribution
) -> bool:
    reach = _reach(statistics, distribution)
    if math.isinf(distribution.bound) or _has_no_bound(weight, distribution):
        # No hard bound; beyond this, chance gives fewer than one value in `ONE_IN`.
        return statistics.size * _normal_tail(reach / distribution.scale) < ONE_IN
    return reach > _limit(weight, distribution)


def is_little_larger(
    weight: Weight, statistics: Statistics, distribution: Distribution
) -> bool:
    """Whether values pass a bound by no factor that their std can tell from chance."""
    spread = math.sqrt((distribution.standard.kurtosis - 1) / (4 * statistics.size))
    most = (1 + max(_TOLERANCE, _SIGMAS * spread)) * _limit(weight, distribution)
    return _reach(statistics, distribution) <= most < math.inf


def _reach(statistics: Statistics, distribution: Distribution) -> float:
    """How far from the mean the values lie."""
    mean = distribution.mean
    return max(statistics.high - mean, mean - statistics.low)


def _limit(weight: Weight, distribution: Distribution) -> float:
    """How far from the mean a value can lie, when rounded to the weight's dtype."""
    bound = distribution.bound
    return bound + _rounding(weight) * (bound + abs(distribution.mean))


def _rounding(weight: Weight) -> float:
    """The relative change that rounding can make; 0 for integers."""
    dtype = weight.variable.dtype
    if not keras.backend.is_float_dtype(dtype):
        return 0.0
    return float(ml_dtypes.finfo(dtype).eps)


def _normal_tail(sigmas: float) -> float:
    """The share of a normal distribution that lies further from its mean than that."""
    return math.erfc(sigmas / math.sqrt(2))


def _has_no_bound(weight: Weight, distribution: Distribution) -> bool:
    """Whether it is a truncated normal of Keras's PyTorch backend, which has strays.

    Keras draws each value from a normal distribution up to four times, and keeps the
    first of the four where none was within two stds.
    """
    return (
        keras.backend.backend() == "torch"
        and distribution.form == "truncated_normal"
        and distribution == weight.distribution
        and not isinstance(weight.initializer, GlorotNormal)
    )


def _is_other_form(
    weight: Weight, statistics: Statistics, distribution: Distribution
) -> bool:
    """Whether the values have the std and bounds of a distribution, but not its form."""
    if distribution.form == "orthogonal":
        return not _is_orthogonal(weight, _at_scale(distribution, statistics))
    return _has_form(statistics, distribution) is False


def _has_form(statistics: Statistics, distribution: Distribution) -> bool | None:
    """Whether the kurtosis is that of a distribution, at any scale; None: it can't tell."""
    variance = distribution.standard.kurtosis_variance
    if variance is None or statistics.size < _FEWEST_FOR_KURTOSIS:
        return None
    # The reciprocal of a sample's kurtosis is all but normal, the kurtosis is skewed.
    spread = math.sqrt(variance / statistics.size) / distribution.standard.kurtosis
    ratio = distribution.standard.kurtosis / statistics.kurtosis
    return abs(ratio - 1) <= max(_KURTOSIS_TOLERANCE, _SIGMAS * spread)


def _is_orthogonal(weight: Weight, distribution: Distribution) -> bool:
    return bool(max(_disorder(weight, distribution)) < _slack(weight))


def _slack(weight: Weight) -> float:
    """Float32 keeps it to 1e-6; a half-precision weight was rounded afterwards."""
    return max(1e-3, 2 * _rounding(weight))


def _is_nearly_orthogonal(weight: Weight, distribution: Distribution) -> bool:
    """Whether it can't be chance that the matrices are as orthogonal as they are."""
    matrices = distribution.matrices_of(weight.shape)
    if matrices is None:
        return False
    disorders = _disorder(weight, distribution)
    if math.isinf(disorders[0]):
        return False
    disorder = np.median(disorders)
    if matrices.size < math.prod(weight.shape):
        return True  # zeros beside the tap
    # Of independent values its square is a chi-squared variable over `long`, with `short`
    # degrees of freedom, whose cube root is all but normal (Wilson and Hilferty).
    long, short = sorted((matrices.rows, matrices.columns))[::-1]
    spread = 2 / (9 * short)
    least = max(0.0, 1 - spread - _SIGMAS * math.sqrt(spread))
    # In a small matrix only one that is orthogonal to the last digits is beyond chance.
    slack = _slack(weight) if _slack(weight) ** short < ONE_IN else 0.0
    return bool(disorder < max(slack, math.sqrt(least**3 * short / long)))


def _disorder(weight: Weight, distribution: Distribution) -> np.ndarray:
    """How far each matrix M moves a random vector v if Mᵀ M v / scale² should be v.

    As a share of its length. M has v on its short side. Infinite where the first look tells
    that the values are not from such matrices: most weights need not be read to the end.
    One row of n that is another one moves v by about sqrt(2 / n): more than 1e-3, up to two
    million rows.
    """
    matrices = distribution.matrices_of(weight.shape)
    values = backends.values(weight.variable)
    if matrices is None or not matrices.size or not weight.shape:
        return np.array([math.inf])
    lengths = matrices.first_lengths(values)
    slack = max(0.02, 4 / max(matrices.rows, matrices.columns))  # one value can be wrong
    if np.abs(lengths / distribution.scale - 1).min() > slack:
        return np.array([math.inf])
    values = values[(slice(None),) * len(weight.shape)]
    stack = matrices.stack(values)
    if matrices.rows < matrices.columns:
        stack = stack.swapaxes(1, 2)
    if np.count_nonzero(values) > np.count_nonzero(stack):
        return np.array([math.inf])
    vector = np.random.Generator(np.random.PCG64(0)).standard_normal(stack.shape[2])
    moved = _back_and_forth(stack, vector) / distribution.scale**2 - vector
    return np.sqrt((moved * moved).sum(1) / (vector * vector).sum())


def _back_and_forth(stack: np.ndarray, vector: np.ndarray) -> np.ndarray:
    """For each matrix M the product Mᵀ M v, in float64, a part at a time."""
    count, rows, columns = stack.shape
    deep = min(count, max(1, CHUNK // (rows * columns)))
    high = min(rows, max(1, CHUNK // columns))
    total = np.zeros((count, columns))
    for i in range(0, count, deep):
        for j in range(0, rows, high):
            part = stack[i : i + deep, j : j + high].astype(np.float64)
            # Not `@`: starting BLAS threads costs more than the sum.
            image = np.einsum("ijk,k->ij", part, vector)
            total[i : i + deep] += np.einsum("ijk,ij->ik", part, image)
    return total


def collision(weight: Weight, distribution: Distribution) -> float:
    """A bound of the chance that two values are equal.

    The coarsest generators draw multiples of eps (of the dtype) times the limit. Around a
    mean other than zero, and below the normal numbers, the dtype itself is coarser. In an
    orthogonal matrix some of the values are free; here each of them counts for a part.
    """
    info = ml_dtypes.finfo(weight.variable.dtype)
    steps = 2 * float(info.eps) * (1 + abs(distribution.mean) / distribution.std)
    chance = min(0.5, steps + float(info.smallest_subnormal) / distribution.std)
    matrices = distribution.matrices_of(weight.shape)
    return chance if matrices is None else chance ** matrices.free_share(-math.log2(chance))
