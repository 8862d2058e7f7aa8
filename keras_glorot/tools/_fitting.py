"""Whether the values of a weight can come from a distribution, and if not, why."""

import functools
import math
from collections.abc import Iterable
from typing import NamedTuple

import keras
import ml_dtypes
import numpy as np

from keras_glorot import _backends as backends
from keras_glorot._backends.values import CHUNK, Values
from keras_glorot._drawing.distributions import Distribution
from keras_glorot._drawing.matrices import Matrices
from keras_glorot._models.survey import Weight
from keras_glorot.initializers import GlorotNormal
from keras_glorot.tools._slices import ONE_IN

__all__ = [
    "Fitting",
    "Statistics",
    "collision",
    "disorder",
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
# The rows or columns of a large matrix that tell whether to read it to the end.
_FIRST = 64
# The part of the values of an orthogonal matrix that are free, at least.
_FREE = 1 / 3
# The disorder of values that are not of matrices.
_NONE = np.array([math.inf])


class Statistics(NamedTuple):
    """Statistics of the values of a variable.

    Attributes:
        rounding: The relative change that rounding to the dtype can make; 0 for integers.
    """

    size: int
    mean: float
    std: float
    low: float
    high: float
    kurtosis: float
    rounding: float

    @property
    def is_finite(self) -> bool:
        return self.size == 0 or math.isfinite(self.low + self.high)


class Fitting:
    """The values of a weight, and how well distributions fit them, if all are finite.

    Args:
        weight: The weight.
        center: The mean that is expected.
    """

    def __init__(self, weight: Weight, center: float):
        self._weight = weight
        self.values = backends.values(weight.variable)
        self.statistics = measure(self.values, center)
        self._disorders: dict[Matrices, np.ndarray] = {}

    def candidates(self, plausible: Iterable[Distribution]) -> list[Distribution]:
        """Those among them that the values can be from, and the first."""
        first, *others = (self._as_drawn(distribution) for distribution in plausible)
        every = [first, *others]
        sure = [d for d in every if d.matrices and not self._is_chance(d.matrices)]
        # Chance can make a small matrix orthogonal: a vector always is.
        others = [d for d in others if not d.matrices or self._is_orthogonal(d.matrices)]
        return sure or [first, *others]

    def best(self, candidates: list[Distribution]) -> tuple[Distribution, str | None]:
        """The one that least speaks against, nearest in std; and what does."""
        return min(((each, self._fault(each)) for each in candidates), key=self._rank)

    def _rank(self, fit: tuple[Distribution, str | None]) -> tuple[bool, int, float]:
        """The less, the better: a form that the values do not have comes last."""
        distribution, fault = fit
        distance = abs(distribution.std - self.statistics.std)
        is_other = _has_form(self.statistics, distribution) is False
        return is_other, _FAULTS.index(fault), distance

    def is_scaled(self, distribution: Distribution) -> bool:
        """Whether nothing but the std speaks against a distribution."""
        unscaled = distribution._replace(std=0.0)
        is_mean_off = _is_mean_off(self.statistics, unscaled)
        return not is_mean_off and not self._is_other_form(distribution)

    def _as_drawn(self, distribution: Distribution) -> Distribution:
        """With a positive scale, which mirrors the values, and with its matrices."""
        form, scale, std, mean = distribution[:4]
        matrices = distribution.matrices_of(self._weight.shape)
        return Distribution(form, abs(scale), abs(std), mean, matrices)

    def _fault(self, distribution: Distribution) -> str | None:
        """The first thing that speaks against it; later ones may follow from that."""
        if not distribution.std:
            is_other = _is_other_constant(self.statistics, distribution)
            return "constant" if is_other else None
        if not keras.backend.is_float_dtype(self._weight.variable.dtype):
            return None
        if is_off(self.statistics, distribution):
            return "std"
        if _is_mean_off(self.statistics, distribution):
            return "mean"
        if self._is_out_of_bounds(distribution):
            return "bounds"
        return "form" if self._is_other_form(distribution) else None

    def _is_out_of_bounds(self, distribution: Distribution) -> bool:
        reach = _reach(self.statistics, distribution)
        if math.isinf(distribution.bound) or self._has_no_bound(distribution):
            return _is_too_far(self.statistics, reach / distribution.scale)
        return reach > _limit(self.statistics, distribution)

    def _has_no_bound(self, distribution: Distribution) -> bool:
        """Whether it is a truncated normal of Keras's PyTorch backend, which has strays.

        Keras draws each value from a normal distribution up to four times, and keeps the
        first of the four where none was within two stds.
        """
        return (
            keras.backend.backend() == "torch"
            and distribution.form == "truncated_normal"
            and distribution == self._weight.distribution
            and not isinstance(self._weight.initializer, GlorotNormal)
        )

    def _is_other_form(self, distribution: Distribution) -> bool:
        """Whether the values are not of this form, at any scale."""
        if distribution.matrices is not None:
            return not self._is_orthogonal(distribution.matrices)
        return _has_form(self.statistics, distribution) is False

    def _is_orthogonal(self, matrices: Matrices) -> bool:
        """Whether the values are so, at any scale. Single ones are all but normal."""
        if self._disorder(matrices).max() >= self._slack:
            return False
        reach = max(-self.statistics.low, self.statistics.high)
        std = _root_mean_square(self.statistics) * math.sqrt(matrices.window_size)
        return not _is_too_far(self.statistics, reach / std)

    def _is_chance(self, matrices: Matrices) -> bool:
        """Whether independent values can be as orthogonal as these are."""
        disorders = np.sort(self._disorder(matrices))
        middle = disorders[len(disorders) // 2]  # one of many matrices can be wrong
        return _is_chance(middle, matrices, self._slack)

    @property
    def _slack(self) -> float:
        """Float32 keeps it to 1e-6; a half-precision weight was rounded afterwards."""
        return max(1e-3, 2 * self.statistics.rounding)

    def _disorder(self, matrices: Matrices) -> np.ndarray:
        if matrices not in self._disorders:
            # Most weights need not be read to the end.
            is_other = self._is_flat(matrices) or self._is_first_chance(matrices)
            found = _NONE if is_other else _disorder_of(self.values, matrices)
            self._disorders[matrices] = found
        return self._disorders[matrices]

    def _is_flat(self, matrices: Matrices) -> bool:
        """Whether single values are more uniform than those of orthogonal matrices."""
        long = max(matrices.rows, matrices.columns)
        error = math.sqrt(24 / (_FREE * max(1, self.statistics.size)))  # of the kurtosis
        return self.statistics.kurtosis < 3 * long / (long + 2) - _SIGMAS * error

    def _is_first_chance(self, matrices: Matrices) -> bool:
        """Whether the first rows or columns of a large matrix are independent."""
        if matrices.size <= CHUNK or min(matrices.rows, matrices.columns) <= _FIRST:
            return False
        values = self.values[matrices.first(_FIRST)]
        part = matrices._replace(shape=values.shape, parts=1)
        return _is_chance(disorder([part.stack(values)])[0][0], part, self._slack)


def _disorder_of(values: Values, matrices: Matrices) -> np.ndarray:
    """That of each matrix; infinite if there is something beside the tap."""
    whole = values[(slice(None),) * len(values.shape)]
    stack = matrices.stack(whole)
    if matrices.window and np.count_nonzero(whole) > np.count_nonzero(stack):
        return _NONE
    return disorder([stack])[0]


def _is_chance(disorder: float, matrices: Matrices, slack: float) -> bool:
    """Whether independent values can be as orthogonal as that."""
    if math.isinf(disorder) or matrices.window_size > 1:
        return math.isinf(disorder)  # no chance makes the zeros beside the tap
    # Of independent values its square is a chi-squared variable over `long`, whose cube
    # root is all but normal (Wilson and Hilferty). The scale takes one degree of freedom.
    short, long = sorted((matrices.rows, matrices.columns))
    degrees = short - 1
    if not degrees:
        return True
    spread = 2 / (9 * degrees)
    least = max(0.0, 1 - spread - _SIGMAS * math.sqrt(spread))
    # In a small matrix only one that is orthogonal to the last digits is beyond chance.
    exact = slack if slack**degrees < ONE_IN else 0.0
    return disorder >= max(exact, math.sqrt(least**3 * degrees / long))


# The faults, the gravest last.
_FAULTS: tuple[str | None, ...] = (None, "bounds", "form", "mean", "constant", "std")


@np.errstate(all="ignore")  # values that are not finite are found by their range
def measure(values: Values, center: float) -> Statistics:
    """One pass, in float64: a float32 sum over a large kernel loses its digits.

    Args:
        values: The values to measure.
        center: The mean that is expected; the moments are taken around it.
    """
    total, squares, fourths = 0.0, 0.0, 0.0
    low, high = math.inf, -math.inf
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
    size = math.prod(values.shape)
    offset = total / max(size, 1)
    variance = (squares - total * offset) / max(size - 1, 1)
    std, kurtosis = 0.0, math.nan
    if size and not math.isfinite(low + high):
        std = math.nan
    elif low < high and variance > 0:
        std, kurtosis = math.sqrt(variance), size * fourths / squares**2
    mean = float(center + offset)
    rounding = _rounding(values.dtype.name)
    return Statistics(size, mean, std, float(low), float(high), float(kurtosis), rounding)


def is_off(statistics: Statistics, distribution: Distribution) -> bool:
    """Whether a std is wrong: by more than the tolerance and more than chance allows."""
    if statistics.size < 2 or not distribution.std:
        return False
    if distribution.form == "orthogonal":  # where nothing is left to chance
        return abs(_root_mean_square(statistics) / distribution.std - 1) > _TOLERANCE
    # Wilson and Hilferty: the cube root of a chi-squared variable is all but normal, also
    # in small tensors. In large ones, uniform and truncated values scatter less.
    excess = distribution.standard.kurtosis - 1 if statistics.size > 100 else 2.0
    spread = excess / (9 * (statistics.size - 1))
    ratio = statistics.std / distribution.std
    is_significant = abs(ratio ** (2 / 3) - (1 - spread)) > _SIGMAS * math.sqrt(spread)
    return is_significant and abs(ratio - 1) > _TOLERANCE


def is_little_larger(statistics: Statistics, distribution: Distribution) -> bool:
    """Whether values pass a bound by no more than the factor that their std allows."""
    spread = math.sqrt((distribution.standard.kurtosis - 1) / (4 * statistics.size))
    factor = max(1.0, statistics.std / distribution.std) * (1 + _SIGMAS * spread)
    most = factor * _limit(statistics, distribution)
    return _reach(statistics, distribution) <= most < math.inf


def _is_mean_off(statistics: Statistics, distribution: Distribution) -> bool:
    tolerance = max(_TOLERANCE, _SIGMAS / math.sqrt(statistics.size))
    scale = max(statistics.std, distribution.std)
    return abs(statistics.mean - distribution.mean) > tolerance * scale


def _is_other_constant(statistics: Statistics, distribution: Distribution) -> bool:
    """Whether any value differs from the declared one, beyond rounding to the dtype."""
    slack = statistics.rounding * abs(distribution.mean)
    return _reach(statistics, distribution) > slack


def _reach(statistics: Statistics, distribution: Distribution) -> float:
    """How far from the mean the values lie."""
    mean = distribution.mean
    return max(statistics.high - mean, mean - statistics.low)


def _limit(statistics: Statistics, distribution: Distribution) -> float:
    """How far from the mean a value can lie, when rounded to the weight's dtype."""
    bound = distribution.bound
    return bound + statistics.rounding * (bound + abs(distribution.mean))


@functools.cache
def _rounding(dtype: str) -> float:
    if not keras.backend.is_float_dtype(dtype):
        return 0.0
    return float(ml_dtypes.finfo(dtype).eps)


def _root_mean_square(statistics: Statistics) -> float:
    square = statistics.std**2 * (1 - 1 / statistics.size) + statistics.mean**2
    return math.sqrt(square)


def _is_too_far(statistics: Statistics, sigmas: float) -> bool:
    """Whether a normal value lies so far from the mean in fewer than `ONE_IN` tensors."""
    return statistics.size * math.erfc(sigmas / math.sqrt(2)) < ONE_IN


def _has_form(statistics: Statistics, distribution: Distribution) -> bool | None:
    """Whether the kurtosis is that of a distribution, at any scale; None: it can't tell."""
    variance = distribution.standard.kurtosis_variance
    if variance is None or statistics.size < _FEWEST_FOR_KURTOSIS:
        return None
    # The reciprocal of a sample's kurtosis is all but normal, the kurtosis is skewed.
    spread = math.sqrt(variance / statistics.size) / distribution.standard.kurtosis
    ratio = distribution.standard.kurtosis / statistics.kurtosis
    return abs(ratio - 1) <= max(_KURTOSIS_TOLERANCE, _SIGMAS * spread)


def disorder(stacks: Iterable[np.ndarray]) -> tuple[np.ndarray, float]:
    """How far matrices are from orthogonal ones with one factor, and this factor.

    For each matrix M how far Mᵀ M / factor² moves a random vector v, as a share of its
    length. M has v on its short side. One row of n that is another one moves v by about
    sqrt(2 / n): more than 1e-3, up to two million rows.

    Args:
        stacks: Arrays of matrices, of one shape in each array.
    """
    rng = np.random.Generator(np.random.PCG64(0))
    pairs = []
    for stack in stacks:
        tall = stack if stack.shape[1] >= stack.shape[2] else stack.swapaxes(1, 2)
        vector = rng.standard_normal(tall.shape[2])
        pairs.append((vector, _back_and_forth(tall, vector)))
    lengths = [len(moved) * (vector @ vector) for vector, moved in pairs]
    square = sum((moved @ vector).sum() for vector, moved in pairs) / sum(lengths)
    if not square:
        return _NONE, 0.0
    found = [
        np.sqrt(((moved / square - vector) ** 2).sum(1) / (vector @ vector))
        for vector, moved in pairs
    ]
    return np.concatenate(found), math.sqrt(square)


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
    chance = min(1.0, steps + float(info.smallest_subnormal) / distribution.std)
    matrices = distribution.matrices_of(weight.shape)
    if matrices is None or chance == 1:
        return chance
    return chance ** matrices.free_share(-math.log2(chance))
