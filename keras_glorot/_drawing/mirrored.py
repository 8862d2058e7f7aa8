"""Kernels that repeat the rows and columns of orthogonal matrices with other signs.

A unit and its partner have opposite weights, z and -z; the next kernel takes the two with
opposite signs. So between the pairs there is one orthogonal matrix of half the size.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from keras_glorot._drawing.matrices import Matrices
from keras_glorot._drawing.orthogonal import draw_orthogonal

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
            math.prod(map(float, (np.sum(side.factors**2) for side in sides)))
            * _scale(shape) ** 2
            * self._tap_count
            / max(shape)
            for _, sides, shape in self._groups(np.empty(self.matrices.shape, bool))
        ]
        return math.sqrt(sum(squares) / math.prod(self.matrices.shape))

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """Those of the matrices."""
        empty = np.empty(self.matrices.shape, bool)
        return [shape for _, _, shape in self._groups(empty)]

    def draw(self, scale: float, seed_words: Sequence[int]) -> np.ndarray:
        """Draws a kernel, in float64: matrix by matrix, each with its number as a seed."""

        def matrix(number: int, shape: tuple[int, int]) -> np.ndarray:
            axes, seed = Matrices.from_shape(shape), (*seed_words, number)
            return draw_orthogonal(axes, shape, scale * _scale(shape), "float64", seed)

        return self._assemble(matrix)

    def fold(self, kernel: np.ndarray) -> list[np.ndarray]:
        """The matrices in a kernel, by the first unit of each pair, at scale 1."""
        folded = []
        for block, (inputs, outputs), shape in self._groups(kernel):
            values = block.reshape(-1, len(inputs.places), len(outputs.places))
            rows, columns = inputs.firsts, outputs.firsts
            values = values[:, rows[:, None], columns].astype(np.float64)
            values /= inputs.factors[rows, None] * outputs.factors[columns]
            folded.append(values.reshape(shape) / _scale(shape))
        return folded

    def unfold(self, matrices: Sequence[np.ndarray]) -> np.ndarray:
        """The kernel that `fold` makes these matrices of."""
        return self._assemble(lambda number, shape: matrices[number] * _scale(shape))

    def _assemble(self, matrix: Callable[[int, tuple[int, int]], np.ndarray]) -> np.ndarray:
        kernel = np.zeros(self.matrices.shape)
        groups = self._groups(kernel)
        for number, (block, (inputs, outputs), shape) in enumerate(groups):
            values = matrix(number, shape).reshape(-1, inputs.total, outputs.total)
            values = values[:, inputs.places[:, None], outputs.places]
            values *= inputs.factors[:, None] * outputs.factors
            block[...] = values.reshape(block.shape)
        return kernel

    def _groups(
        self, kernel: np.ndarray
    ) -> Iterator[tuple[np.ndarray, tuple[Side, Side], tuple[int, int]]]:
        """For each group: a view of its values, its units, the shape of its matrix."""
        m = self.matrices
        place = [slice(None)] * kernel.ndim
        for axis, tap in zip(m.window, self.taps, strict=True):
            place[axis] = tap
        whole = kernel[tuple(place)].transpose(*m.window, *m.inputs, *m.outputs)
        blocks = np.split(whole, m.parts, axis=-1)
        parts = [
            [np.split(each, m.parts) for each in side]
            for side in (self.inputs, self.outputs)
        ]
        for number, block in enumerate(blocks):
            inputs, outputs = (
                Side(places[number], factors[number]) for places, factors in parts
            )
            shape = self._tap_count * inputs.total, outputs.total
            yield block, (inputs, outputs), shape

    @property
    def _tap_count(self) -> int:
        return math.prod(tap.stop - tap.start for tap in self.taps)


def _scale(shape: tuple[int, int]) -> float:
    """Glorot's: 1 for a square matrix."""
    return math.sqrt(2 * max(shape) / sum(shape))
