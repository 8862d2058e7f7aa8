"""`find_repeats` against a comparison of all slices with all others."""

import itertools

import ml_dtypes
import numpy as np
import pytest

from keras_glorot._backends.values import Values
from keras_glorot.tools import _slices
from keras_glorot.tools._slices import can_be_chance

SHAPES = [(7, 5), (40, 1, 6), (3, 4, 5), (3, 3, 4, 6), (1, 1, 8, 9), (2, 3, 4, 3, 5)]
COLLISION = 1e-6


def find_repeats(values, folded, collision):
    return _slices.find_repeats(Values.of(values), folded, collision)


def slices(values, axes):
    """By index, the slices that fix these axes."""
    for place in itertools.product(*(range(values.shape[axis]) for axis in axes)):
        index = [slice(None)] * values.ndim
        for axis, at in zip(axes, place, strict=True):
            index[axis] = at
        yield tuple(index), values[tuple(index)]


def repeats_by_brute_force(values, axes):
    dead, copies, seen = [], [], []
    for index, part in slices(values, axes):
        if not part.any():
            dead.append(index)
        elif any(np.array_equal(part, sign * one) for one in seen for sign in (1, -1)):
            copies.append(index)
        seen.append(part)
    return dead, copies


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("sign", [0, 1, -1])
def test_what_is_planted_is_found_and_nothing_else(shape, seed, sign):
    rng = np.random.default_rng(seed)
    values = rng.standard_normal(shape).astype("float32")
    folded = len(shape) - 2 if len(shape) > 3 else 0
    axis = int(rng.choice([a for a in range(folded, len(shape)) if shape[a] > 1]))
    assert not list(find_repeats(values, folded, COLLISION))
    one, other = rng.choice(shape[axis], 2, replace=False)
    target = [slice(None)] * len(shape)
    source = list(target)
    target[axis], source[axis] = int(one), int(other)
    values[tuple(target)] = sign * values[tuple(source)]
    found = list(find_repeats(values, folded, COLLISION))
    assert found[0].axes == (axis,)
    for each in found:
        dead, copies = repeats_by_brute_force(values, each.axes)
        assert each.dead == dead
        assert sorted(str(later) for later, _ in each.copies) == sorted(map(str, copies))
        for later, earlier in each.copies:
            np.testing.assert_array_equal(abs(values[later]), abs(values[earlier]))


def test_a_tensor_larger_than_a_part():
    rng = np.random.default_rng(0)
    for shape, index, source in [
        ((3, 70_000), np.s_[:, 69_999], np.s_[:, 5]),
        ((70_000, 4), 69_999, 5),
        ((300, 2, 300), np.s_[:, 1, 299], np.s_[:, 0, 7]),
    ]:
        values = rng.standard_normal(shape)
        assert not list(find_repeats(values, 0, 1e-12))
        values[index] = -values[source]
        (found,) = list(find_repeats(values, 0, 1e-12))
        assert len(found.copies) == 1


def test_the_second_of_two_equal_slices_may_be_summed_otherwise():
    """Every place in a row of slices, so that all remainders of a loop are met."""
    rng = np.random.default_rng(0)
    row = rng.standard_normal(37).astype("float32")
    for width in range(2, 40):
        values = np.repeat(row[:, None], width, 1)
        (found,) = list(find_repeats(values, 0, COLLISION))
        assert (found.total, len(found.copies)) == (width, width - 1)


def test_short_slices_can_be_equal_by_chance():
    """256 equally likely values: two columns of two are equal in 1 of 131,072 pairs."""
    rng = np.random.default_rng(0)
    values = rng.integers(-128, 128, (2, 2000)).astype(ml_dtypes.bfloat16)
    assert repeats_by_brute_force(values[:, :500], [1])[1]
    assert not list(find_repeats(values, 0, 1 / 128))
    assert can_be_chance(2000, 2, 1 / 128)
    assert not can_be_chance(2000, 8, 1 / 128)
