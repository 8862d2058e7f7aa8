"""Kernels that repeat the rows and columns of orthogonal matrices with other signs.

A unit and its partner have opposite weights, z and -z; the next kernel takes the two with
opposite signs. So between the pairs there is one orthogonal matrix of half the size.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from keras_glorot._drawing.matrices import Matrices, Piece, span
from keras_glorot._drawing.orthogonal import draw_orthogonal
from keras_glorot._drawing.stream import Bounds

__all__ = ["Mirror", "Side"]


class Side(NamedTuple):
    """The inputs or the outputs of a kernel, one group after the other.

    Attributes:
        places: For each, its row or column in the matrix of its group. Both of a pair have
            the same.
        factors: For each, the factor on its row or column.
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

    def split(self, groups: int) -> list["Side"]:
        """That of each group."""
        return list(map(Side, *(np.split(each, groups) for each in self)))

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
            math.prod(float(np.sum(side.factors**2)) for side in sides)
            * _scale(shape) ** 2
            * self._tap_count
            / max(shape)
            for _, sides, shape in self._groups(self.matrices.whole)
        ]
        return math.sqrt(sum(squares) / math.prod(self.matrices.shape))

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """Those of the matrices."""
        return [shape for _, _, shape in self._groups(self.matrices.whole)]

    def draw(
        self,
        scale: float,
        dtype: str,
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

        return self._assemble(matrix, dtype, region or self.matrices.whole)

    def fold(self, kernel: np.ndarray) -> list[np.ndarray]:
        """The matrices in a kernel, by the first unit of each pair, at scale 1."""
        folded, whole = [], self.matrices.whole
        for piece, (inputs, outputs), shape in self._groups(whole):
            block = self.matrices.view(kernel, whole, piece.bounds)
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

        return self._assemble(matrix, "float64", self.matrices.whole)

    def _assemble(
        self,
        matrix: Callable[[int, tuple[int, int], Bounds], np.ndarray],
        dtype: str,
        region: Bounds,
    ) -> np.ndarray:
        """`matrix` takes a number, a shape, and which rows and columns are needed."""
        m = self.matrices
        kernel = np.zeros([stop - start for start, stop in region], dtype)
        for piece, (inputs, outputs), shape in self._groups(region):
            taps, ins, outs = map(piece.indices, (m.window, m.inputs, m.outputs))
            rows = (taps[:, None] * inputs.total + inputs.places[ins]).reshape(-1)
            columns, factors = outputs.places[outs], np.tile(inputs.factors[ins], len(taps))
            area = span(rows), span(columns)
            values = matrix(piece.number, shape, area)
            rows, columns = rows - area[0][0], columns - area[1][0]
            # Many rows at a time would be a second kernel, in float64.
            step = max(1, _PIECE // len(columns))
            view = m.view(kernel, region, piece.bounds)
            lines = view.shape[: -len(m.outputs)]
            for start in range(0, len(rows), step):
                part = slice(start, start + step)
                block = values[rows[part, None], columns]
                block *= factors[part, None] * outputs.factors[outs]
                if kernel.dtype != np.float64:
                    block = block.astype(np.float32)
                at = np.unravel_index(np.arange(start, start + len(block)), lines)
                view[at] = block.reshape(-1, *view.shape[len(lines) :])
        return kernel

    def _groups(
        self, region: Bounds
    ) -> Iterator[tuple[Piece, tuple[Side, Side], tuple[int, int]]]:
        """The matrices that a region has a part of, their units, and their shapes."""
        sides = [side.split(self.matrices.parts) for side in (self.inputs, self.outputs)]
        for piece in self.matrices.pieces(region, self.taps):
            inputs, outputs = (side[piece.number] for side in sides)
            shape = self._tap_count * inputs.total, outputs.total
            yield piece, (inputs, outputs), shape

    @property
    def _tap_count(self) -> int:
        return math.prod(tap.stop - tap.start for tap in self.taps)


_PIECE = 1 << 18


def _scale(shape: tuple[int, int]) -> float:
    """Glorot's: 1 for a square matrix."""
    return math.sqrt(2 * max(shape) / sum(shape))
