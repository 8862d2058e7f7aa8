"""A kernel as matrices from inputs to outputs: one for each group, expert or channel.

A window has one tap that is not zero. So the kernel sends every position of an image
through its matrix, and an orthogonal matrix makes the map of the whole layer orthogonal
(Xiao et al. 2018: delta-orthogonal).
"""

import math
from collections.abc import Iterator, Sequence
from itertools import product, zip_longest
from typing import Any, NamedTuple, Self

import numpy as np

from keras_glorot._drawing.stream import Bounds
from keras_glorot.fans import Fans, axes_of

__all__ = ["Matrices", "Piece", "span"]


class Piece(NamedTuple):
    """The part of one matrix that lies in a region of the kernel.

    Attributes:
        number: The matrix's.
        place: The bounds of the whole matrix in the kernel.
        bounds: Those of the part.
    """

    number: int
    place: Bounds
    bounds: Bounds

    def indices(self, axes: Sequence[int]) -> np.ndarray:
        """Where in the matrix its entries lie along axes that are counted as one."""
        flat = np.zeros(1, np.int64)
        for axis in axes:
            (left, right), (start, stop) = self.place[axis], self.bounds[axis]
            inside = np.arange(start - left, stop - left)
            flat = np.add.outer(flat * (right - left), inside).reshape(-1)
        return flat


def span(indices: np.ndarray) -> tuple[int, int]:
    """The bounds of all that indices reach."""
    return int(indices.min()), int(indices.max()) + 1


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

    def taps(self, strides: Sequence[int] = ()) -> tuple[slice, ...]:
        """Where in the window the matrices are: where padding never takes one away.

        As many taps as a stride has positions, so that none of these is left out.
        """
        taps = []
        for axis, stride in zip_longest(self.window, strides, fillvalue=1):
            width = min(self.shape[axis], stride)
            left = self.shape[axis] - width
            start = left if self.last_tap else left // 2
            taps.append(slice(start, start + width))
        return tuple(taps)

    @property
    def whole(self) -> Bounds:
        """The bounds of the kernel."""
        return tuple((0, size) for size in self.shape)

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
        for axis, tap in zip(self.window, self.taps(), strict=True):
            place[axis] = tap
        return values[tuple(place)]

    def pieces(self, region: Bounds, taps: Sequence[slice]) -> Iterator[Piece]:
        """The matrices that a region has a part of; they may have several taps."""
        width = self.shape[-1] // self.parts
        places = [[bounds] for bounds in self.whole]
        for axis, tap in zip(self.window, taps, strict=True):
            places[axis] = [(tap.start, tap.stop)]
        for axis in self.batch:
            places[axis] = [(at, at + 1) for at in range(*region[axis])]
        if self.parts > 1:
            places[-1] = [(at, at + width) for at in range(0, self.shape[-1], width)]
        for place in product(*places):
            bounds = tuple(map(_overlap, place, region))
            if all(start < stop for start, stop in bounds):
                number = 0
                for axis in self.batch:
                    number = number * self.shape[axis] + place[axis][0]
                yield Piece(number * self.parts + place[-1][0] // width, place, bounds)

    def view(self, kernel: np.ndarray, region: Bounds, bounds: Bounds) -> np.ndarray:
        """A part of a kernel, of which there is a region: inputs and outputs come last."""
        cut = tuple(
            slice(start - left, stop - left)
            for (left, _), (start, stop) in zip(region, bounds, strict=True)
        )
        return kernel[cut].transpose(*self.window, *self.batch, *self.inputs, *self.outputs)

    def first(self, count: int) -> tuple[slice, ...]:
        """Where the first matrix is, and of its short side so many places at most."""
        place = list(next(self.pieces(self.whole, self.taps())).place)
        short = self.outputs if self.rows >= self.columns else self.inputs
        for number, axis in enumerate(reversed(short)):
            place[axis] = 0, (1 if number else min(count, place[axis][1]))
        return tuple(slice(*each) for each in place)

    def split(self, values: np.ndarray) -> np.ndarray:
        """A view of a kernel at its tap: axes of batches, of inputs, then of outputs."""
        last = len(self.shape)
        split = self.at_tap(values.reshape(self.shape))
        width = split.shape[-1] // self.parts
        split = split.reshape(*split.shape[:-1], self.parts, width)
        # The last axis is two now: the parts, and the share that each of them has.
        inputs, outputs, window, batch = (
            [last if axis == last - 1 else axis for axis in axes]
            for axes in (self.inputs, self.outputs, self.window, self.batch)
        )
        split = split.transpose(*window, *batch, last - 1, *inputs, *outputs)
        return split[(0,) * len(window)]

    def stack(self, values: np.ndarray) -> np.ndarray:
        """The matrices of a kernel, `(total, rows, columns)`: a view if memory allows."""
        return self.split(values).reshape(self.total, self.rows, self.columns)


def _overlap(one: tuple[int, int], other: tuple[int, int]) -> tuple[int, int]:
    return max(one[0], other[0]), min(one[1], other[1])
