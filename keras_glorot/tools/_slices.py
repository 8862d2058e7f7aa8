"""Finds slices of a tensor that are all zeros or repeat others.

NumPy only. A slice is represented by its random projection, one number; slices with the
same number, or its negative, are then compared value by value.
"""

import functools
import itertools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from keras_glorot._backends.values import Values

__all__ = ["ONE_IN", "Slices", "can_be_chance", "find_repeats"]

# How often chance may look like a fault: in one tensor of 500 million, the share that a
# normal variable has beyond six standard errors.
ONE_IN = 2e-9
# Equal slices can be summed in another order, which changes the last bits.
_ROUNDING = 1e-12

Index = tuple[Any, ...]


class Slices(NamedTuple):
    """The slices of a tensor that fix the same axes, and those that are zero or repeated.

    Attributes:
        axes: The fixed axes.
        total: How many slices there are.
        dead: The slices that are all zeros, as indices: `values[index]` is the slice.
        copies: Pairs of indices: a slice, and an earlier one that it equals or negates.
    """

    axes: tuple[int, ...]
    total: int
    dead: list[Index]
    copies: list[tuple[Index, Index]]


def find_repeats(values: Values, folded: int, collision: float) -> Iterator[Slices]:
    """Looks for dead and copied slices, with one axis fixed and with all but one fixed.

    Args:
        values: Those of a tensor, all finite.
        folded: How many leading axes count as one: the window of a convolution.
        collision: A bound of the chance that two values are equal. Slices so short and
            so many that chance could make two equal are left out.

    Yields:
        The `Slices` that have dead ones or copies, those with one fixed axis first; the
        last axis (in most kernels the units) before the others.
    """
    shape = values.shape
    groups = [tuple(range(folded)), *((axis,) for axis in range(folded, len(shape)))]
    groups = [axes for axes in groups if math.prod(shape[axis] for axis in axes) > 1]
    if len(groups) < 2:
        return
    weights = _random_weights(shape)
    for size in sorted({1, len(groups) - 1}):
        for chosen in reversed([*itertools.combinations(groups, size)]):
            axes = tuple(itertools.chain(*chosen))
            total = math.prod(shape[axis] for axis in axes)
            if not can_be_chance(total, math.prod(shape) // total, collision):
                projections = values.project(axes, weights)
                slices = Slices(axes, total, *_compare(values, axes, projections))
                if slices.dead or slices.copies:
                    yield slices


@functools.lru_cache
def _random_weights(shape: tuple[int, ...]) -> list[np.ndarray]:
    rng = np.random.Generator(np.random.PCG64(0))
    return [rng.standard_normal(size) for size in shape]


def can_be_chance(count: int, length: float, collision: float) -> bool:
    """Whether among so many slices of so many values chance makes two equal or one zero.

    Of `count` slices there are `count**2 / 2` pairs, each equal in one of two signs.
    """
    return 2 * math.log(count) + length * math.log(collision) > math.log(ONE_IN)


def _compare(
    values: Values, axes: tuple[int, ...], projections: np.ndarray
) -> tuple[list[Index], list[tuple[Index, Index]]]:
    """The dead slices and the copies, as `Slices` has them."""

    def index(flat: int) -> Index:
        place: list[Any] = [slice(None)] * len(values.shape)
        for axis, at in zip(axes, np.unravel_index(flat, projections.shape), strict=True):
            place[axis] = int(at)
        return tuple(place)

    sizes = np.abs(projections.reshape(-1))
    zeros = map(index, np.flatnonzero(sizes == 0).tolist())
    dead = [place for place in zeros if not np.any(values[place] != 0)]
    ordered = np.sort(sizes)  # much faster than `argsort`, and mostly enough
    slack = _ROUNDING * ordered[-1]
    close = (np.diff(ordered) <= slack) & (ordered[1:] > slack)
    order = np.argsort(sizes, kind="stable") if close.any() else ordered
    copies = []
    for k in np.flatnonzero(close).tolist():
        earlier, later = map(index, sorted(order[k : k + 2]))
        one, other = values[later], values[earlier]
        if np.array_equal(one, other) or np.array_equal(one, -other):
            copies.append((later, earlier))
    return dead, copies
