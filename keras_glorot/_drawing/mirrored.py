"""Kernels that repeat the rows and columns of orthogonal matrices with other signs.

A unit and its partner have opposite weights, z and -z; the next kernel takes the two with
opposite signs. So between the pairs there is one orthogonal matrix of half the size.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from keras_glorot._drawing.matrices import Matrices
from keras_glorot._drawing.orthogonal import draw_orthogonal, flat_indices
from keras_glorot._drawing.stream import Bounds

__all__ = ["Mirror", "Side"]


class Side(NamedTuple):
    """The inputs or the outputs of a kernel, one group after the other.

    Attributes:
        places: For each, its row or column in the matrix of its group. Both of a pair have
            the same.
        factors: For each, what its row or column is multiplied by.
    """

    places: np.ndarray
    factors: np.ndarray

    @classmethod
    def of(cls, partner: np.ndarray, groups: int) -> "Side":
        """From each unit's partner, or -1. The second of two has the factor -1."""
        is_second = (partner >= 0) & (partner < np.arange(len(partner)))
        firsts = np.cumsum(~is_second.reshape(groups, -1), axis=1).reshape(-1) - 1
        places = np.where(is_second, firsts[np.maximum(partner, 0)], firsts)
        return cls(places, np.where(is_second, -1.0, 1.0))

    @property
    def total(self) -> int:
        """How many different ones there are."""
        return int(self.places.max()) + 1

    @property
    def firsts(self) -> np.ndarray:
        """The number of the first unit of each pair, and of those without a partner."""
        return np.unique(self.places, return_index=True)[1]


class Mirror(NamedTuple):
    """How a kernel is made of orthogonal matrices, one for each group.

    Attributes:
        matrices: The axes of the kernel, and the number of its groups.
        taps: The part of its window that is not zero. Each tap has rows of its own.
        inputs, outputs: How they stand in pairs.
    """

    matrices: Matrices
    taps: tuple[slice, ...]
    inputs: Side
    outputs: Side

    @property
    def std(self) -> float:
        """That of the whole kernel at scale 1, as the mean over all matrices."""
        squares = [
            math.prod(map(float, (np.sum(side.factors**2) for side in group.sides)))
            * _scale(group.shape) ** 2
            * self._tap_count
            / max(group.shape)
            for group in self._groups()
        ]
        return math.sqrt(sum(squares) / math.prod(self.matrices.shape))

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """Those of the matrices."""
        return [group.shape for group in self._groups()]

    def draw(
        self,
        scale: float,
        dtype: np.dtype | str,
        seed_words: Sequence[int],
        region: Bounds | None = None,
    ) -> np.ndarray:
        """Draws a kernel, or a region of it: each matrix with its number as a seed.

        Beside the result it takes the memory of one matrix, in float64.
        """

        def matrix(number: int, shape: tuple[int, int], area: Bounds) -> np.ndarray:
            axes, seed = Matrices.from_shape(shape), (*seed_words, number)
            size = scale * _scale(shape)
            return draw_orthogonal(axes, shape, size, "float64", seed, area)

        return self._assemble(matrix, dtype, region or self._whole)

    def fold(self, kernel: np.ndarray) -> list[np.ndarray]:
        """The matrices in a kernel, by the first unit of each pair, at scale 1."""
        folded = []
        for place, (inputs, outputs), shape in self._groups():
            block = self._view(kernel, place, self._whole)
            values = block.reshape(-1, len(inputs.places), len(outputs.places))
            rows, columns = inputs.firsts, outputs.firsts
            values = values[:, rows[:, None], columns].astype(np.float64)
            values /= inputs.factors[rows, None] * outputs.factors[columns]
            folded.append(values.reshape(shape) / _scale(shape))
        return folded

    def unfold(self, matrices: Sequence[np.ndarray]) -> np.ndarray:
        """The kernel that `fold` makes these matrices of."""

        def matrix(number: int, shape: tuple[int, int], area: Bounds) -> np.ndarray:
            rows, columns = (slice(*bounds) for bounds in area)
            return matrices[number][rows, columns] * _scale(shape)

        return self._assemble(matrix, "float64", self._whole)

    def _assemble(
        self,
        matrix: Callable[[int, tuple[int, int], Bounds], np.ndarray],
        dtype: np.dtype | str,
        bounds: Bounds,
    ) -> np.ndarray:
        """`matrix` takes a number, a shape, and which rows and columns are needed."""
        m = self.matrices
        kernel = np.zeros([stop - start for start, stop in bounds], dtype)
        for number, (place, (inputs, outputs), shape) in enumerate(self._groups()):
            inside = tuple(map(_common, place, bounds))
            if any(start >= stop for start, stop in inside):
                continue
            taps, ins, outs = (
                _places(place, inside, axes) for axes in (m.window, m.inputs, m.outputs)
            )
            rows = (taps[:, None] * inputs.total + inputs.places[ins]).reshape(-1)
            columns, factors = outputs.places[outs], np.tile(inputs.factors[ins], len(taps))
            area = _span(rows), _span(columns)
            values = matrix(number, shape, area)
            rows, columns = rows - area[0][0], columns - area[1][0]
            # Many rows at a time would be a second kernel, in float64.
            step = max(1, _PIECE // len(columns))
            view = self._view(kernel, inside, bounds)
            lines = view.shape[: -len(m.outputs)]
            for start in range(0, len(rows), step):
                part = slice(start, start + step)
                piece = values[rows[part, None], columns]
                piece *= factors[part, None] * outputs.factors[outs]
                if kernel.dtype != np.float64:
                    piece = piece.astype(np.float32)
                at = np.unravel_index(np.arange(start, start + len(piece)), lines)
                view[at] = piece.reshape(-1, *view.shape[len(lines) :])
        return kernel

    @property
    def _whole(self) -> Bounds:
        return tuple((0, size) for size in self.matrices.shape)

    def _view(self, kernel: np.ndarray, inside: Bounds, bounds: Bounds) -> np.ndarray:
        """A part of a kernel, of which there is what lies in `bounds`."""
        m = self.matrices
        starts = [start for start, _ in bounds]
        cut = [slice(a - s, b - s) for (a, b), s in zip(inside, starts, strict=True)]
        return kernel[tuple(cut)].transpose(*m.window, *m.inputs, *m.outputs)

    def _groups(self) -> "Iterator[_Group]":
        m = self.matrices
        place = list(self._whole)
        for axis, tap in zip(m.window, self.taps, strict=True):
            place[axis] = tap.start, tap.stop
        width = m.shape[-1] // m.parts
        parts = [
            [np.split(each, m.parts) for each in side]
            for side in (self.inputs, self.outputs)
        ]
        for number in range(m.parts):
            inputs, outputs = (
                Side(places[number], factors[number]) for places, factors in parts
            )
            if m.parts > 1:
                place[-1] = number * width, (number + 1) * width
            shape = self._tap_count * inputs.total, outputs.total
            yield _Group(tuple(place), (inputs, outputs), shape)

    @property
    def _tap_count(self) -> int:
        return math.prod(tap.stop - tap.start for tap in self.taps)


class _Group(NamedTuple):
    """Where a group lies in the kernel, its units, and the shape of its matrix."""

    place: Bounds
    sides: tuple[Side, Side]
    shape: tuple[int, int]


_PIECE = 1 << 18


def _common(one: tuple[int, int], other: tuple[int, int]) -> tuple[int, int]:
    return max(one[0], other[0]), min(one[1], other[1])


def _places(place: Bounds, inside: Bounds, axes: Sequence[int]) -> np.ndarray:
    """Along these axes, counted as one, where in a group the entries of a part lie."""
    return flat_indices(
        [
            (stop - start, (inside[axis][0] - start, inside[axis][1] - start))
            for axis in axes
            for start, stop in [place[axis]]
        ]
    )


def _span(indices: np.ndarray) -> tuple[int, int]:
    return int(indices.min()), int(indices.max()) + 1


def _scale(shape: tuple[int, int]) -> float:
    """Glorot's: 1 for a square matrix."""
    return math.sqrt(2 * max(shape) / sum(shape))
