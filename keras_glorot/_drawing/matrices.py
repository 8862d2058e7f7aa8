"""A kernel as matrices from inputs to outputs: one for each group, expert or channel.

A window has one tap that is not zero. So the kernel sends every position of an image
through its matrix, and an orthogonal matrix makes the map of the whole layer orthogonal
(Xiao et al. 2018: delta-orthogonal).
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import numpy as np

from keras_glorot.fans import Fans, axes_of

__all__ = ["Matrices"]


class Matrices(NamedTuple):
    """How a kernel is made of matrices.

    Attributes:
        shape: The kernel's shape, of rank 1 or more.
        inputs: Its axes that are rows of the matrices.
        outputs: Those that are columns.
        window: Those of the receptive field. Any other axis is a batch axis.
        parts: How many matrices stand side by side along the last axis, which is an axis of
            outputs: the groups of a convolution, the gates of a recurrent kernel.
        last_tap: Whether the tap is the last one of the window, not the middle one.
    """

    shape: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    window: tuple[int, ...] = ()
    parts: int = 1
    last_tap: bool = False

    @classmethod
    def from_axes(
        cls, shape: tuple[int, ...], input_axes: Sequence[int], output_axes: Sequence[int]
    ) -> Self:
        """By explicit axes, as `compute_fans` takes them."""
        inputs, outputs = axes_of(shape, input_axes, output_axes)
        both = tuple(axis for axis in inputs if axis in outputs)
        rows = tuple(axis for axis in inputs if axis not in both)
        columns = tuple(axis for axis in outputs if axis not in both)
        return cls(shape or (1,), rows, columns, both)

    @classmethod
    def from_shape(cls, shape: tuple[int, ...]) -> Self:
        """By Keras's rule: `(*window, inputs, outputs)`. A vector is one row."""
        rank = len(shape)
        if rank < 2:
            return cls(shape or (1,), (), (0,))
        return cls(shape, (rank - 2,), (rank - 1,), tuple(range(rank - 2)))

    @classmethod
    def from_letters(cls, shape: tuple[int, ...], equation: str) -> Self:
        """By an equation of einsum. A letter in all three is a batch."""
        operands, outputs = equation.split("->")
        inputs, kernel = operands.split(",")
        axes = range(len(kernel))
        return cls.from_axes(
            shape,
            [axis for axis in axes if kernel[axis] not in outputs],
            [axis for axis in axes if kernel[axis] not in inputs],
        )

    @classmethod
    def from_fans(cls, shape: tuple[int, ...], fans: Fans) -> Self:
        """By the shape; but if its last two axes alone have these fans, others are a batch.

        A rule of the user tells fans, and not the axes that they were counted from.
        """
        by_shape = cls.from_shape(shape)
        if len(shape) > 2 and tuple(fans) == shape[-2:]:
            return by_shape._replace(window=())
        return by_shape

    @property
    def fans(self) -> Fans:
        """How many inputs are summed into an output, how many outputs an input reaches."""
        window = self.window_size
        return Fans(window * self.rows, window * self.columns)

    @property
    def window_size(self) -> int:
        return math.prod(self.shape[axis] for axis in self.window)

    @property
    def rows(self) -> int:
        """The inputs of each matrix."""
        return math.prod(self.shape[axis] for axis in self.inputs)

    @property
    def columns(self) -> int:
        """The outputs of each matrix."""
        return math.prod(self.shape[axis] for axis in self.outputs) // self.parts

    @property
    def total(self) -> int:
        """How many matrices there are."""
        return math.prod(self.shape[axis] for axis in self.batch) * self.parts

    @property
    def batch(self) -> tuple[int, ...]:
        """The axes that number the matrices."""
        matrix = {*self.inputs, *self.outputs, *self.window}
        return tuple(axis for axis in range(len(self.shape)) if axis not in matrix)

    @property
    def taps(self) -> tuple[int, ...]:
        """Where in the window the matrices are: where padding never takes one away."""
        sizes = [self.shape[axis] for axis in self.window]
        return tuple(max(0, n - 1 if self.last_tap else (n - 1) // 2) for n in sizes)

    @property
    def scale(self) -> float:
        """The singular values of matrices with which the whole kernel has std 1."""
        return math.sqrt(self.window_size * max(self.rows, self.columns))

    @property
    def size(self) -> int:
        """How many values they have together."""
        return self.total * self.rows * self.columns

    def free_share(self, bits: float) -> float:
        """How many of their values are free, if each of them has so many bits.

        An orthogonal matrix of one value is only a sign.
        """
        long, short = max(self.rows, self.columns), min(self.rows, self.columns)
        angles = long * short - short * (short + 1) // 2
        return min(1.0, (angles + short / bits) / (long * short))

    def at_tap(self, values: Any) -> np.ndarray:
        """The part of a kernel that is not zero, of the same rank: of an array, a view."""
        place = [slice(None)] * len(values.shape)
        for axis, tap in zip(self.window, self.taps, strict=True):
            place[axis] = slice(tap, tap + 1)
        return values[tuple(place)]

    def first_lengths(self, values: Any) -> np.ndarray:
        """Those of two columns of the first matrix, or of two rows if rows are longer."""
        place: list[Any] = [0] * len(self.shape)
        for axis, tap in zip(self.window, self.taps, strict=True):
            place[axis] = tap
        short, long = self.inputs, self.outputs
        if self.rows >= self.columns:
            short, long = long, short
        for axis in long:
            parts = self.parts if axis == len(self.shape) - 1 else 1
            place[axis] = slice(0, self.shape[axis] // parts)
        for axis in short[-1:]:
            place[axis] = slice(0, 2)
        kept = [axis for axis, at in enumerate(place) if isinstance(at, slice)]
        first = np.asarray(values[tuple(place)], np.float64)
        others = tuple(i for i, axis in enumerate(kept) if axis not in short)
        return np.sqrt((first * first).sum(axis=others))

    def split(self, values: np.ndarray) -> np.ndarray:
        """A view of a kernel at its tap: axes of batches, of inputs, then of outputs."""
        last = len(self.shape)
        split = self.at_tap(values.reshape(self.shape))
        width = split.shape[-1] // self.parts
        split = split.reshape(*split.shape[:-1], self.parts, width)
        # The last axis is two now: the parts, and what each of them has of it.
        inputs, outputs, window, batch = (
            [last if axis == last - 1 else axis for axis in axes]
            for axes in (self.inputs, self.outputs, self.window, self.batch)
        )
        split = split.transpose(*window, *batch, last - 1, *inputs, *outputs)
        return split[(0,) * len(window)]

    def stack(self, values: np.ndarray) -> np.ndarray:
        """The matrices of a kernel, `(total, rows, columns)`: a view if memory allows."""
        return self.split(values).reshape(self.total, self.rows, self.columns)
