"""The values of a tensor, read where they lie: in parts, in one process or in several.

NumPy only. A tensor can be divided among devices, and these among processes. Sums are made
of the parts, so a process reads no more than it holds.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from keras_glorot._drawing.stream import Bounds

__all__ = ["CHUNK", "Values", "blocks"]

# Elements looked at together: their float64 copy stays in the cache.
CHUNK = 1 << 16

Parts = Callable[[], Iterable[tuple[Bounds, np.ndarray]]]


class Values:
    """The values of a tensor, to be read only.

    Where a process holds some parts only, all processes must ask the same, in one order.

    Args:
        shape: The tensor's shape.
        dtype: Its dtype.
        parts: Returns this process's parts, with their bounds. All processes together
            have each value once.
        stack: Stacks the arrays of all processes, in one order. The same in each.
    """

    def __init__(
        self,
        shape: Sequence[int],
        dtype: Any,
        parts: Parts,
        stack: Callable[[np.ndarray], np.ndarray] = lambda array: array[None],
    ):
        self.shape, self.dtype = tuple(shape), np.dtype(dtype)
        self.parts, self.stack = parts, stack

    @classmethod
    def of(cls, array: np.ndarray) -> "Values":
        """Those of an array."""
        bounds = tuple((0, size) for size in array.shape)
        return cls(array.shape, array.dtype, lambda: [(bounds, array)])

    def chunks(self) -> Iterator[np.ndarray]:
        """This process's values in float64, a chunk at a time: all of them can be many."""
        for _, part in self.parts():
            flat = part.reshape(-1)
            for start in range(0, flat.size, CHUNK):
                yield flat[start : start + CHUNK].astype(np.float64)

    def any(self) -> bool:
        """Whether one of them is not zero."""
        found = any(bool(np.any(part)) for _, part in self.parts())
        return bool(self.stack(np.array([found])).any())

    def __getitem__(self, index: tuple[Any, ...]) -> np.ndarray:
        """A slice, by an integer or a `slice` of step 1 for each axis."""
        axes = tuple(axis for axis, at in enumerate(index) if not isinstance(at, slice))
        wanted = tuple(map(_bounds, index, self.shape))
        out = np.zeros([stop - start for start, stop in wanted], self.dtype)
        for bounds, part in self.parts():
            if part.shape == self.shape:
                return part[index]
            common = [
                (max(a, c), min(b, d))
                for (a, b), (c, d) in zip(wanted, bounds, strict=True)
            ]
            if all(start < stop for start, stop in common):
                out[_within(common, wanted)] = part[_within(common, bounds)]
        # Each value comes from one process, the others have zeros there. As bits: a sum of
        # floats would lose the sign of a zero.
        bits = self.stack(np.frombuffer(out.tobytes(), np.uint8))
        whole = np.bitwise_or.reduce(bits).view(self.dtype).reshape(out.shape)
        return whole.squeeze(axes)

    def project(self, fixed: Sequence[int], weights: Sequence[np.ndarray]) -> np.ndarray:
        """The weighted sum of each slice that fixes some axes, in float64.

        Args:
            fixed: These axes, ascending.
            weights: For each axis a factor for each place on it; those of fixed axes are
                not used. A value's weight is the product of its factors.
        """
        free = [axis for axis in range(len(self.shape)) if axis not in fixed]
        total = np.zeros([self.shape[axis] for axis in fixed])
        for bounds, part in self.parts():
            for index in blocks(part.shape):
                places = tuple(map(_shift, index, part.shape, bounds))
                sums: Any = part[index].astype(np.float64)
                axes = list(range(part.ndim))
                for axis in reversed(free):
                    rest = [each for each in axes if each != axis]
                    # Not `@`: starting BLAS threads costs more than the sum.
                    sums = np.einsum(sums, axes, weights[axis][places[axis]], [axis], rest)
                    axes = rest
                total[tuple(places[axis] for axis in fixed)] += sums
        return self.stack(total).sum(axis=0)


def blocks(shape: tuple[int, ...]) -> Iterator[tuple[slice, ...]]:
    """Indices of blocks of at most `CHUNK` values that cover a tensor."""
    if math.prod(shape) <= CHUNK:
        yield tuple(map(slice, shape))
        return
    rows = max(1, CHUNK // math.prod(shape[1:]))
    for start in range(0, shape[0], rows):
        for rest in blocks(shape[1:]):
            yield (slice(start, min(start + rows, shape[0])), *rest)


def _bounds(at: Any, size: int) -> tuple[int, int]:
    return at.indices(size)[:2] if isinstance(at, slice) else (at, at + 1)


def _shift(at: slice, size: int, bounds: tuple[int, int]) -> slice:
    """The place in a tensor of a place in one of its parts."""
    start, stop = _bounds(at, size)
    return slice(bounds[0] + start, bounds[0] + stop)


def _within(region: Iterable[tuple[int, int]], outer: Bounds) -> tuple[slice, ...]:
    """The index of a region in the array that holds the outer one."""
    return tuple(
        slice(start - first, stop - first)
        for (start, stop), (first, _) in zip(region, outer, strict=True)
    )
