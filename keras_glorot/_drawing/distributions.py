"""Distributions of weights: the form, and how wide it is."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import keras
import ml_dtypes
import numpy as np

from keras_glorot._drawing.matrices import Matrices
from keras_glorot._drawing.mirrored import Mirror
from keras_glorot._drawing.orthogonal import draw_orthogonal
from keras_glorot._drawing.stream import TRUNCATED_STD, Bounds, draw
from keras_glorot.fans import Fans, compute_fans, fan_of

__all__ = ["Distribution", "keras_distribution"]


class Distribution(NamedTuple):
    """A distribution, symmetric about its mean.

    Attributes:
        form: Its name, a key of `_FORMS`.
        scale: The factor on a draw of the standard form: the limit of a uniform
            distribution, half that of a triangular one, the std of a normal one before
            truncation, the singular values of orthogonal matrices.
        std: The standard deviation of all values together, also where some are always
            zero.
        mean: The mean of the values.
        matrices: Those of an orthogonal one; None for one that Keras draws.
        mirror: How a mirrored one repeats its orthogonal matrices.
    """

    form: str
    scale: float
    std: float
    mean: float = 0.0
    matrices: Matrices | None = None
    mirror: Mirror | None = None

    @classmethod
    def from_std(cls, form: str, std: float, mean: float = 0.0) -> "Distribution":
        """The distribution of this form that has this std."""
        return cls(form, std / _FORMS[form].std, std, mean)

    @classmethod
    def from_scale(cls, form: str, scale: float) -> "Distribution":
        """The distribution of this form that has this scale."""
        return cls(form, scale, scale * _FORMS[form].std)

    @classmethod
    def constant(cls, value: float) -> "Distribution":
        """The distribution that has one value only."""
        return cls("constant", 0.0, 0.0, value)

    @classmethod
    def orthogonal(cls, std: float, matrices: Matrices) -> "Distribution":
        """Random orthogonal matrices in a kernel that has this std."""
        return cls("orthogonal", std * matrices.scale, std, 0.0, matrices)

    @classmethod
    def mirrored(cls, scale: float, mirror: Mirror) -> "Distribution":
        """Orthogonal matrices between pairs of opposite sign."""
        return cls("mirrored", scale, scale * mirror.std, mirror=mirror)

    @classmethod
    def tap(cls, value: float, matrices: Matrices) -> "Distribution":
        """One value at the tap of each filter, and zeros beside it."""
        size = matrices.window_size
        std = value * math.sqrt((1 - 1 / size) / size)
        return cls("tap", value, std, value / size, matrices)

    def matrices_of(self, shape: tuple[int, ...]) -> Matrices | None:
        """The matrices of a weight of this shape; None if it is not orthogonal."""
        if self.mirror is not None:
            return Matrices.from_shape(self.mirror.shapes[0])
        if self.form != "orthogonal" or self.matrices is not None:
            return self.matrices
        axes = range(len(shape))  # Keras's has all axes but the last one as rows
        return Matrices.from_axes(shape, axes[:-1], axes[-1:])

    @property
    def is_random(self) -> bool:
        """Whether two draws differ."""
        return self.std > 0 and self.form != "tap"

    @property
    def bound(self) -> float:
        """How far from the mean a value can lie."""
        return self.scale * self.standard.bound if self.scale else 0.0

    @property
    def standard(self) -> "Form":
        """The standard form, at scale 1."""
        return _FORMS[self.form]

    def range_fault(self, dtype: str) -> str | None:
        """How the values must be instead, if a dtype can't hold them: not nan, nor
        infinite, nor all zeros."""
        if math.isnan(self.std) or math.isnan(self.mean):
            return "numbers, not nan"
        if not self.std:
            return None
        limits = ml_dtypes.finfo(dtype)
        largest, smallest = float(limits.max), float(limits.smallest_subnormal)
        if largest < self.bound < math.inf:
            return f"smaller for weights of {dtype}, which end at {largest:g}"
        if self.std < smallest:
            return f"larger for weights of {dtype}, which begin at {smallest:g}"
        return None

    def draw(
        self,
        shape: tuple[int, ...],
        dtype: str,
        seed: Sequence[int],
        region: Bounds | None = None,
    ) -> np.ndarray:
        """Draws a tensor, or a region of it, by NumPy: the same on every backend.

        Args:
            shape: The tensor's shape.
            dtype: Any dtype for a constant, else a floating dtype.
            seed: One or more integers.
            region: A start and a stop for each axis.
        """
        return self.standard.draw(self, shape, dtype, seed, region)

    def region_drawer(
        self, shape: tuple[int, ...], dtype: str, seed: Sequence[int]
    ) -> Callable[[Bounds], np.ndarray]:
        """Draws one region after the other; a form without a stream whole, once."""
        if self.matrices is not None or not self.standard.is_whole:
            return functools.partial(self.draw, shape, dtype, seed)
        whole = functools.cache(lambda: self.draw(shape, dtype, seed))

        def cut(bounds: Bounds) -> np.ndarray:
            return np.asarray(whole()[tuple(slice(*each) for each in bounds)], order="C")

        return cut


def _draw_constant(distribution, shape, dtype, seed, region) -> np.ndarray:
    if region is not None:
        shape = [stop - start for start, stop in region]
    return np.full(shape, distribution.mean, dtype)


def _draw_from_stream(distribution, shape, dtype, seed, region) -> np.ndarray:
    form, scale, _, mean = distribution[:4]
    if mean == 0:
        return draw(form, shape, scale, dtype, seed, region)
    work = "float64" if dtype == "float64" else "float32"
    values = draw(form, shape, scale, work, seed, region)
    values += mean
    return values.astype(dtype, copy=False)


def _draw_triangular(distribution, shape, dtype, seed, region) -> np.ndarray:
    """The sum of two independent uniform draws."""
    work = "float64" if dtype == "float64" else "float32"
    values, others = (
        draw("uniform", shape, distribution.scale, work, (*seed, part), region)
        for part in range(2)
    )
    values += others
    return values.astype(dtype, copy=False)


def _draw_normal(distribution, shape, dtype, seed, region) -> np.ndarray:
    values = _generator(seed).standard_normal(shape, np.float32)
    return _finish(values, distribution, dtype, region)


def _draw_orthogonal(distribution, shape, dtype, seed, region) -> np.ndarray:
    if distribution.matrices is not None:
        matrices, scale = distribution.matrices, distribution.scale
        return draw_orthogonal(matrices, shape, scale, dtype, seed, region)
    rows, columns = math.prod(shape[:-1]), shape[-1]
    tall = _generator(seed).standard_normal((max(rows, columns), min(rows, columns)))
    q, r = np.linalg.qr(tall)
    q *= np.sign(np.diagonal(r))  # without it, not uniform over orthogonal matrices
    values = np.ascontiguousarray(q if rows >= columns else q.T).reshape(shape)
    return _finish(values, distribution, dtype, region)


def _draw_mirrored(distribution, shape, dtype, seed, region) -> np.ndarray:
    return distribution.mirror.draw(distribution.scale, dtype, seed, region)


def _draw_tap(distribution, shape, dtype, seed, region) -> np.ndarray:
    values = np.zeros(shape, np.float32)
    distribution.matrices.at_tap(values)[...] = distribution.scale
    return _cut(values, dtype, region)


def _generator(seed: Sequence[int]) -> np.random.Generator:
    # Unlike our own stream, these bits may change with NumPy.
    return np.random.Generator(np.random.PCG64(list(seed)))


def _finish(values, distribution, dtype, region) -> np.ndarray:
    values *= distribution.scale
    values += distribution.mean
    return _cut(values, dtype, region)


def _cut(values, dtype, region) -> np.ndarray:
    if region is not None:
        values = values[tuple(slice(*bounds) for bounds in region)]
    return np.ascontiguousarray(values, dtype)


class Form(NamedTuple):
    """A form of distributions.

    Attributes:
        std, bound: Those at scale 1.
        kurtosis: The fourth central moment over the squared variance.
        draw: Draws a tensor.
        kurtosis_variance: That of a sample's kurtosis, times its size; None if it can't
            judge.
        words: How the values are, in words.
        is_whole: Whether a region costs as much as the whole.
    """

    std: float
    bound: float
    kurtosis: float
    draw: Callable[..., np.ndarray]
    kurtosis_variance: float | None = None
    words: str = ""
    is_whole: bool = False


# A new form is one entry here and, if Keras draws from it, one case below. The kurtosis's
# variance is m8 - 4 m4 m6 + 4 m4**3 - m4**2 of the standardized moments; four times that
# of a normal one, where single values can be so far out that they decide it. Those of a
# truncated normal are integrated.
_FORMS = {
    "constant": Form(0.0, 0.0, 1.0, _draw_constant),
    "uniform": Form(1 / math.sqrt(3), 1.0, 1.8, _draw_from_stream, 1.32, "uniform"),
    "triangular": Form(
        math.sqrt(2 / 3), 2.0, 2.4, _draw_triangular, 4.28, "the sum of two uniform draws"
    ),
    "truncated_normal": Form(
        TRUNCATED_STD, 2.0, 2.366, _draw_from_stream, 3.86, "truncated normal"
    ),
    "normal": Form(1.0, math.inf, 3.0, _draw_normal, 96, "normal", is_whole=True),
    # Its std depends on the shape; single entries are all but normal, and at most 1.
    "orthogonal": Form(
        math.nan, 1.0, 3.0, _draw_orthogonal, words="an orthogonal matrix", is_whole=True
    ),
    "mirrored": Form(math.nan, math.inf, 3.0, _draw_mirrored),
    "tap": Form(math.nan, math.inf, 3.0, _draw_tap),
}


def keras_distribution(
    initializer: Any, shape: Sequence[int], fans: Fans | None
) -> Distribution | None:
    """The distribution of an initializer of Keras; None for everyone else's.

    Args:
        initializer: Anything that makes weights.
        shape: The weight's shape.
        fans: Its fans. Defaults to those of the shape.
    """
    name = type(initializer).__name__
    if getattr(keras.initializers, name, None) is not type(initializer):
        return None  # a subclass may do anything
    match initializer:
        case keras.initializers.Zeros():
            return Distribution.constant(0.0)
        case keras.initializers.Ones():
            return Distribution.constant(1.0)
        case keras.initializers.Constant(value=int() | float() as value):
            return Distribution.constant(value)
        case keras.initializers.RandomUniform(minval=low, maxval=high):
            limit = (high - low) / 2
            return Distribution("uniform", limit, limit / math.sqrt(3), (high + low) / 2)
        case keras.initializers.RandomNormal(mean=mean, stddev=std):
            return Distribution.from_std("normal", std, mean)
        case keras.initializers.TruncatedNormal(mean=mean, stddev=scale):
            return Distribution("truncated_normal", scale, scale * TRUNCATED_STD, mean)
        case keras.initializers.Orthogonal(gain=gain):
            std = gain / math.sqrt(max(math.prod(shape[:-1]), shape[-1]))
            return Distribution("orthogonal", gain, std)
        case keras.initializers.VarianceScaling(mode=mode, distribution=form):
            fan = fan_of(fans or compute_fans(shape), mode)
            std = math.sqrt(initializer.scale / max(1, fan))
            if form == "untruncated_normal":
                form = "normal"
            return Distribution.from_std(form, std)
    return None
